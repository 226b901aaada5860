"""Rows of a dataset: files, folders, the Hub, the package; streamed too.

`datasets` finds, fetches, caches and splits all of them, and reads typed files. Text files are read by `_records.py`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import pyarrow
from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.text.text import Text

from hf_contmerge.errors import DataError, ResourceError, unknown
from hf_contmerge.models.folder import dataset_readme
from hf_contmerge.models.licence import readme_license
from hf_contmerge.run.recipe.parts import DataSource
from hf_contmerge.runtime.foreign import expanded
from hf_contmerge.training._records import Kind, Records, parse_record

Row = dict[str, Any]

_FileKind = Kind | Literal["parquet", "arrow"]
_READERS: dict[str, _FileKind] = {
    ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text",
    ".arrow": "arrow",
}  # fmt: skip
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_TYPED = {"parquet": Parquet, "arrow": Arrow}
_GUESSING: dict[type, Kind] = {Json: "json", Csv: "csv", Text: "text"}
_MISTAKES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Of a file's metadata, as libraries find them: features in a Parquet file may be of any type."""
_FORMAT = "1"
"""Of the records in the cache; raise it when the same file gives others."""
_BUFFER = 10_000
"""Rows among which a stream is shuffled."""
_CHUNK = 1000


@dataclass(frozen=True, eq=False)
class Rows:
    """A dataset's rows as Python values, with their places."""

    path: str
    data: datasets.Dataset
    """Typed columns, or records of text files."""
    are_records: bool = False
    before: tuple[str, ...] = ()
    """Columns of a stream's earlier parts."""

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns; in records, of all keys so far."""
        if not self.are_records:
            return self.data.column_names
        return list(dict.fromkeys([*self.before, *(name for row in self for name in row)]))

    def __iter__(self) -> Iterator[Row]:
        for batch in self._batches():
            if self.are_records:
                yield from map(parse_record, batch["text"])
            else:
                yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

    def _batches(self) -> Iterator[Row]:
        """Yield column -> values of many rows: faster than single ones."""
        done = 0
        try:
            for batch in cast(Iterable[Row], self.data.iter(_CHUNK)):
                yield batch
                done += _CHUNK
        except (pyarrow.ArrowException, *_MISTAKES) as error:  # typed files are checked only here
            raise self._unreadable(done, error) from error

    def _unreadable(self, start: int, why: Exception) -> DataError:
        """Return the error for the first row that has no value."""
        for number in range(start, len(self.data)):
            try:
                self.data[number]
            except (pyarrow.ArrowException, *_MISTAKES) as error:
                return DataError(f"{self.place(number)}: cannot be read: {error}. Write the file without this row.")
        return DataError(f"{self.path} cannot be read: {why}")

    def place(self, number: int) -> str:
        """Return where a row stands: its file and line, or its number."""
        where = self.data[number]["place"] if self.are_records else f"row {number + 1}"
        return f"{self.path}, {where}"


def load_rows(spec: DataSource) -> Rows:
    """Load all rows of a dataset entry.

    Raises:
        DataError: the dataset is missing, empty or cannot be read.
        ResourceError: the Hub cannot be reached.
    """
    with _clear(spec):
        rows, builder = _saved(spec), None
        if rows is None:
            builder = _builder(spec)
            builder.download_and_prepare()
            rows = cast(datasets.Dataset, builder.as_dataset(split=cast(Any, spec.split)))
    if len(rows) == 0:
        raise empty(spec)
    return Rows(spec.path, rows, isinstance(builder, Records))


def stream_rows(spec: DataSource, *, seed: int) -> Iterator[Rows]:
    """Yield a stream's rows in parts, shuffled through a buffer.

    Raises as `load_rows`, from the first part on.
    """
    with _clear(spec):
        saved = _saved(spec)
        builder = _builder(spec) if saved is None else None
        stream: Any = builder.as_streaming_dataset(spec.split) if builder else saved.to_iterable_dataset()  # pyright: ignore
        stream = stream.shuffle(seed=seed, buffer_size=_BUFFER)
        rows = iter(stream)
        part = list(islice(rows, _CHUNK))
    if not part:
        raise empty(spec)
    columns: tuple[str, ...] = ()
    while part:
        data = datasets.Dataset.from_list(part, features=stream.features)
        read = Rows(spec.path, data, isinstance(builder, Records), columns)
        yield read
        columns = tuple(read.columns)
        with _clear(spec):
            part = list(islice(rows, _CHUNK))


def dataset_license(spec: DataSource) -> str | None:
    """Return the licence in a dataset's README, local or on the Hub."""
    folder = expanded(spec.path)
    return readme_license(folder / "README.md" if folder.is_dir() else dataset_readme(spec.path, spec.revision))


def empty(spec: DataSource) -> DataError:
    """Return the error for a dataset without rows."""
    return DataError(f"{spec.path} (split {spec.split}) is empty.")


def _saved(spec: DataSource) -> datasets.Dataset | None:
    """Return rows of the package, or of `Dataset.save_to_disk`."""
    folder = expanded(spec.path)
    if spec.path.startswith("quickstart:"):
        from hf_contmerge.runtime.quickstart import load_quickstart, quickstart_names

        name = spec.path.removeprefix("quickstart:")
        if name not in quickstart_names():
            raise DataError(unknown("quickstart text", name, quickstart_names()))
        return datasets.Dataset.from_list(load_quickstart(name))
    if not (folder / "dataset_info.json").is_file():
        return None
    if spec.split != "train":
        raise DataError(
            f"{spec.path} holds one dataset without splits, and so no {spec.split!r}. Remove `split` and "
            "`heldout_split`, or save a DatasetDict there."
        )
    return datasets.Dataset.load_from_disk(str(folder))


# Builders of `datasets`


def _builder(spec: DataSource) -> datasets.DatasetBuilder:
    """Return the builder of a dataset's rows. Raises DataError for other files."""
    path = expanded(spec.path)
    kind = _kind(path)
    if "::" in str(path) and path.exists():
        raise DataError(f"{path}: `datasets` takes a name with '::' for a file in an archive. Rename it.")
    if kind and "://" in spec.path:
        return _file_builder(kind, DataFilesDict.from_patterns({"train": [spec.path]}))
    if kind and not path.is_dir():
        return _file_builder(kind, _local_file(path, spec))
    if path.is_file():
        raise DataError(f"{path} is of no kind that can be read. Give one of {', '.join(_READERS)}.")
    if path.is_dir() and glob.has_magic(str(path.resolve())):
        return _folder_builder(path.resolve())
    folder = str(path) if path.is_dir() else spec.path
    if folder in _PACKAGED_DATASETS_MODULES:  # the name of a reader, of what lies in the current folder
        if not path.is_dir():
            raise DataError(
                f"There is no folder {path} in {Path.cwd()}. Name a file, a folder or a dataset of the Hub."
            )
        folder = str(path.absolute())
    return _in_parts(_exact(datasets.load_dataset_builder(folder, spec.config, revision=spec.revision)))


def _kind(path: Path) -> _FileKind | None:
    """Return a file's reader by its name; text files may be compressed."""
    name = path.name.lower()
    whole = next((name.removesuffix(end) for end in _PACKED if name.endswith(end)), name)
    return _READERS.get(f".{whole.rpartition('.')[2]}" if "." in whole else "")


def _local_file(path: Path, spec: DataSource) -> DataFilesDict:
    if not path.is_file():
        raise DataError(f"There is no file {path}. Give a path from {Path.cwd()}, or an absolute one.")
    facts = path.stat()
    if facts.st_size == 0:
        raise empty(spec)
    found = DataFilesList([str(path.resolve())], [(str(facts.st_mtime_ns), str(facts.st_size))])
    return DataFilesDict({"train": found})


def _file_builder(kind: _FileKind, files: DataFilesDict) -> datasets.DatasetBuilder:
    """Return the builder of literally named files, wildcards included."""
    if kind in ("parquet", "arrow"):
        return _in_parts(_TYPED[kind](data_files=files, hash=datasets.__version__))
    return Records(data_files=files, hash=_FORMAT, kind=kind)


def _in_parts(builder: datasets.DatasetBuilder) -> datasets.DatasetBuilder:
    """Set how many rows of a Parquet file are decoded at once.

    A few bytes may stand for a row of any length.
    """
    config: Any = builder.config
    if isinstance(builder, Parquet) and config.batch_size is None:
        config.batch_size = _CHUNK
    return builder


def _folder_builder(folder: Path) -> datasets.DatasetBuilder:
    """Return the builder of a folder with wildcards in its name."""
    base = glob.escape(str(folder))
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    kinds: list[_FileKind] = [kind for names in found.values() for name in names if (kind := _kind(Path(name)))]
    if not kinds:
        raise FileNotFoundError(f"The directory at {folder} doesn't contain any data files")
    kind = max(kinds, key=kinds.count)
    chosen = {split: [glob.escape(n) for n in names if _kind(Path(n)) == kind] for split, names in found.items()}
    return _file_builder(kind, DataFilesDict.from_patterns({s: names for s, names in chosen.items() if names}))


def _exact(found: datasets.DatasetBuilder) -> datasets.DatasetBuilder:
    """Replace a type-guessing reader of text files.

    One with settings of the dataset's card is kept.
    """
    reader = next((reader for reader in _GUESSING if isinstance(found, reader)), None)
    config: Any = found.config
    if reader is None or not _is_plain(config, reader):
        return found
    sign = getattr(config, "sep", ",")  # pandas' default, not the dataset's word
    return Records(
        data_files=config.data_files, dataset_name=found.dataset_name, config_name=config.name, hash=_FORMAT,
        base_path=found.base_path, repo_id=found.repo_id, kind=_GUESSING[reader],
        delimiter=None if sign == "," else sign,
    )  # fmt: skip


def _is_plain(config: Any, reader: Any) -> bool:
    plain = reader.BUILDER_CONFIG_CLASS()
    free = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
    return all(getattr(config, f.name) == getattr(plain, f.name) for f in fields(config) if f.name not in free)


@contextmanager
def _clear(spec: DataSource) -> Iterator[None]:
    """Turn loading failures into clear errors."""
    try:
        yield
    except (DataError, ResourceError):  # the former is a ValueError too
        raise
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise DataError(f"There is no dataset {spec.path}, here or on the Hub: {error}") from error
    except ConnectionError as error:
        raise ResourceError(
            f"Cannot fetch the dataset {spec.path}: no file of that name is here, and the Hub cannot be reached. "
            "Check the network and HF_HUB_OFFLINE, or name a local file."
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise DataError(
            f"{spec.path} is made by a script of its own, which datasets {datasets.__version__} no longer runs. Set "
            "`revision: refs/convert/parquet`, where the Hub keeps a copy of many such datasets, or name another."
        ) from error
    except (DatasetGenerationError, pyarrow.ArrowException, *_MISTAKES) as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from error
        if "corresponds to no data" in str(cause):  # a header, or [], and no row
            raise empty(spec) from error
        raise DataError(f"{spec.path} cannot be read (split {spec.split}): {cause}") from error
