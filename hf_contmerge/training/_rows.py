"""Rows of a dataset: files, folders, the Hub, the package; streamed too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hf_contmerge.errors import DataError, ResourceError, unknown
from hf_contmerge.run.recipe.parts import DataSource

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_BUFFER = 10_000
"""Rows among which a stream is shuffled."""
_CHUNK = 1000


def load_rows(spec: DataSource) -> datasets.Dataset:
    """Load all rows of a dataset entry.

    Raises:
        DataError: the dataset is missing, empty or cannot be read.
        ResourceError: the Hub cannot be reached.
    """
    with _clear(spec):
        saved = _saved(spec)
        rows = datasets.load_dataset(**_source(spec)) if saved is None else saved
    if len(rows) == 0:
        raise empty(spec)
    return rows


def stream_rows(spec: DataSource, *, seed: int) -> Iterator[datasets.Dataset]:
    """Yield a stream's rows in parts, shuffled through a buffer.

    Raises as `load_rows`, from the first part on.
    """
    with _clear(spec):
        saved = _saved(spec)
        stream: Any = (
            datasets.load_dataset(**_source(spec), streaming=True) if saved is None else saved.to_iterable_dataset()
        )
        stream = stream.shuffle(seed=seed, buffer_size=_BUFFER)
        rows = iter(stream)
        part = list(islice(rows, _CHUNK))
    if not part:
        raise empty(spec)
    while part:
        yield datasets.Dataset.from_list(part, features=stream.features)
        with _clear(spec):
            part = list(islice(rows, _CHUNK))


def empty(spec: DataSource) -> DataError:
    """Return the error for a dataset without rows."""
    return DataError(f"{spec.path} (split {spec.split}) is empty.")


def _saved(spec: DataSource) -> datasets.Dataset | None:
    """Return rows of the package, or of `Dataset.save_to_disk`."""
    folder = Path(spec.path).expanduser()
    if spec.path.startswith("quickstart:"):
        from hf_contmerge.run.quickstart import load_quickstart, quickstart_names

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


def _source(spec: DataSource) -> dict[str, Any]:
    """Return the arguments of `datasets.load_dataset`. Raises DataError for other files."""
    path = Path(spec.path).expanduser()
    kind = _READERS.get(path.suffix.lower())
    if kind and not path.is_file():
        raise DataError(f"There is no file {path}. Give a path from {Path.cwd()}, or an absolute one.")
    if kind and path.stat().st_size == 0:
        raise empty(spec)
    if path.is_file() and not kind:
        raise DataError(f"{path} is of no kind that can be read. Give one of {', '.join(_READERS)}.")
    if kind:
        return {"path": kind, "data_files": str(path), "split": spec.split}
    folder = str(path) if path.is_dir() else spec.path
    return {"path": folder, "name": spec.config, "split": spec.split, "revision": spec.revision}


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
    except (DatasetGenerationError, ValueError, json.JSONDecodeError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # a header, or [], and no row
            raise empty(spec) from error
        raise DataError(f"{spec.path} cannot be read (split {spec.split}): {cause}") from error
