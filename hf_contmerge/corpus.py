"""A dataset entry of the recipe -> what SFTTrainer trains on, and the held-out documents that measure forgetting.

Three forms, recognised by their columns: text (pretraining), messages (conversations), prompt + completion.
"""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hf_contmerge.errors import DataError, ModelError, ResourceError, unknown
from hf_contmerge.recipe import Dataset, Task

LOG = logging.getLogger(__name__)

Form = Literal["text", "messages", "prompt_completion"]
Row = dict[str, Any]

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_COLUMNS: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}


@dataclass(frozen=True)
class StageData:
    """A stage's examples, in a fixed order; `heldout` shares no document with `train`."""

    form: Form
    train: datasets.Dataset
    heldout: datasets.Dataset


def load_stage_data(spec: Dataset, *, seed: int) -> StageData:
    """Load a stage's dataset, shuffle it, and set its held-out examples aside.

    Raises:
        DataError: the dataset is missing or too small, or lacks the columns.
        ResourceError: the Hub cannot be reached.
    """
    rows = load_rows(spec)
    form, rows = _in_form(rows, spec)
    rows = rows.shuffle(seed=seed, keep_in_memory=True)  # or the order is written beside the user's files
    if spec.heldout_split:
        held = _in_form(load_rows(spec.model_copy(update={"split": spec.heldout_split})), spec)[1]
        heldout = held.shuffle(seed=seed, keep_in_memory=True).select(range(min(spec.heldout or len(held), len(held))))
        train = rows
    else:
        if len(rows) <= spec.heldout:
            raise DataError(
                f"{spec.path} has {len(rows)} examples, but {spec.heldout} are to be held out and none would be "
                "left to train on. Give more examples, or set `heldout` to a smaller number."
            )
        heldout = rows.select(range(spec.heldout))
        train = rows.select(range(spec.heldout, len(rows)))
    train = _without(train, heldout, form)
    if spec.max_examples:
        train = train.select(range(min(spec.max_examples, len(train))))
    if len(train) == 0:
        raise DataError(f"{spec.path} has no example to train on once the held-out ones are removed.")
    return StageData(form, train, heldout)


def load_rows(spec: Dataset) -> datasets.Dataset:
    """Load all rows of a dataset entry. Raises as `load_stage_data`."""
    if spec.path.startswith("quickstart:"):
        from hf_contmerge.quickstart_texts import load_quickstart, quickstart_names

        name = spec.path.removeprefix("quickstart:")
        if name not in quickstart_names():
            raise DataError(unknown("quickstart text", name, quickstart_names()))
        rows = datasets.Dataset.from_list(load_quickstart(name))
    else:
        rows = _load(spec)
    if len(rows) == 0:
        raise _empty(spec)
    return rows


def documents(data: datasets.Dataset, form: Form, *, chars: int, render: Callable[[list[Row]], str]) -> list[str]:
    """Return held-out examples as plain documents of at most `chars` characters.

    Args:
        data: the examples.
        form: their form.
        chars: where longer documents are cut.
        render: makes text of a conversation (the tokenizer's chat template).
    """
    return [_as_text(row, form, render)[:chars] for row in _rows(data)]


def require_chat_template(tokenizer: Any) -> None:
    """Raise ModelError if a tokenizer cannot make text of conversations."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, which a stage with `messages` needs. "
            "Give the base model one, or give the stage `prompt` and `completion`, or `text`."
        )


def task_rows(task: Task) -> list[Row]:
    """Return the rows of a task that is made from a dataset, in the columns that our task files use."""
    assert task.dataset is not None
    rows = load_rows(task.dataset)
    limit = min(task.dataset.heldout or len(rows), len(rows)) if task.kind == "perplexity" else len(rows)
    if task.kind == "perplexity":
        form, rows = _in_form(rows, task.dataset)
        if form != "text":
            raise DataError(f"{task.dataset.path}: a perplexity task needs text; name its column with `text`.")
        chosen = rows.shuffle(seed=0, keep_in_memory=True).select(range(limit))
        return [{"text": r["text"][: task.dataset.heldout_chars]} for r in _rows(chosen)]
    _require(rows, (task.question, task.choices, task.answer), task.dataset.path)
    if not isinstance(rows[0][task.choices], list):
        raise DataError(
            f"{task.dataset.path}: {task.choices} must be a list of continuations; got {rows[0][task.choices]!r:.60}."
        )
    found = [{"query": r[task.question], "choices": list(r[task.choices]), "gold": r[task.answer]} for r in _rows(rows)]
    bad = next((r for r in found if not isinstance(r["gold"], int) or not 0 <= r["gold"] < len(r["choices"])), None)
    if bad:
        raise DataError(
            f"{task.dataset.path}: {task.answer} must be the index of the right choice; got {bad['gold']!r} for "
            f"{len(bad['choices'])} choices."
        )
    return found


def _rows(data: datasets.Dataset) -> Iterator[Row]:
    return cast(Iterator[Row], iter(data))


def _load(spec: Dataset) -> datasets.Dataset:
    path = Path(spec.path).expanduser()
    kind = _READERS.get(path.suffix.lower())
    if kind and not path.is_file():
        raise DataError(f"There is no file {path}. Give a path from {Path.cwd()}, or an absolute one.")
    if kind and path.stat().st_size == 0:
        raise _empty(spec)
    if path.is_file() and not kind:
        raise DataError(f"{path} is of no kind that can be read. Give one of {', '.join(_READERS)}.")
    if (path / "dataset_info.json").is_file():
        return _saved(path, spec)
    try:
        if kind:
            return datasets.load_dataset(kind, data_files=str(path), split=spec.split)
        return datasets.load_dataset(spec.path, spec.config, split=spec.split, revision=spec.revision)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise DataError(f"There is no dataset {spec.path}, here or on the Hub: {error}") from error
    except ConnectionError as error:
        raise ResourceError(
            f"Cannot fetch the dataset {spec.path}: no file of that name is here, and the Hub cannot be reached. "
            "Check the network and HF_HUB_OFFLINE, or name a local file."
        ) from error
    except (DatasetGenerationError, ValueError, json.JSONDecodeError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # a header, or [], and no row
            raise _empty(spec) from error
        raise DataError(f"{spec.path} cannot be read (split {spec.split}): {cause}") from error


def _saved(path: Path, spec: Dataset) -> datasets.Dataset:
    """Load what `Dataset.save_to_disk` wrote, which is one split without a name."""
    if spec.split != "train":
        raise DataError(
            f"{spec.path} holds one dataset without splits, and so no {spec.split!r}. Remove `split` and "
            "`heldout_split`, or save a DatasetDict there."
        )
    return datasets.Dataset.load_from_disk(str(path))


def _empty(spec: Dataset) -> DataError:
    return DataError(f"{spec.path} (split {spec.split}) is empty.")


def _in_form(rows: datasets.Dataset, spec: Dataset) -> tuple[Form, datasets.Dataset]:
    """Return the form of a dataset and only the columns that it needs."""
    if spec.text is not None:
        return "text", _text_column(rows, spec.text, spec)
    for form in ("messages", "prompt_completion", "text"):
        if set(_COLUMNS[form]) <= set(rows.column_names):
            rows = _filled(rows.select_columns(list(_COLUMNS[form])), spec)
            return form, _strings(rows, "text", spec) if form == "text" else rows
    raise DataError(
        f"{spec.path} has the columns {', '.join(rows.column_names)}; a stage needs `messages`, or `prompt` and "
        "`completion`, or `text`. Name the text's column, or a format such as '{question}\\n{answer}', with `text`."
    )


def _text_column(rows: datasets.Dataset, text: str, spec: Dataset) -> datasets.Dataset:
    try:
        columns = [field for _, field, _, _ in string.Formatter().parse(text) if field] or [text]
    except ValueError as error:
        raise DataError(f"`text` of {spec.path} is no format string: {text!r} ({error}).") from error
    _require(rows, columns, spec.path)
    rows = _filled(rows.select_columns(list(dict.fromkeys(columns))), spec)
    if columns == [text]:
        rows = _strings(rows, text, spec)
        return rows if text == "text" else rows.rename_column(text, "text")
    return rows.map(lambda row: {"text": text.format(**row)}, remove_columns=rows.column_names)


def _filled(rows: datasets.Dataset, spec: Dataset) -> datasets.Dataset:
    """Leave out the rows in which a column is null, or the only one is blank, and say how many."""
    columns = rows.column_names

    def lacks(value: Any) -> bool:
        return value is None or (len(columns) == 1 and isinstance(value, str) and not value.strip())

    keep = [i for i, row in enumerate(_rows(rows)) if not any(lacks(row[c]) for c in columns)]
    if len(keep) == len(rows):
        return rows
    LOG.warning(
        "%s: %d of %d rows are left out, for they lack %s", spec.path, len(rows) - len(keep), len(rows),
        " or ".join(columns),
    )  # fmt: skip
    if not keep:
        raise _empty(spec)
    return rows.select(keep)


def _strings(rows: datasets.Dataset, column: str, spec: Dataset) -> datasets.Dataset:
    kind = getattr(rows.features[column], "dtype", None) or "values of several kinds"
    if kind not in ("string", "large_string"):
        raise DataError(
            f"{spec.path}: the column {column} holds {kind}, not text. Make text of it with a format: "
            f"`text: '{{{column}}}'`."
        )
    return rows


def _require(rows: datasets.Dataset, columns: list[str] | tuple[str, ...], path: str) -> None:
    for column in columns:
        if column not in rows.column_names:
            raise DataError(unknown("column", column, rows.column_names, where=path))


def _without(train: datasets.Dataset, heldout: datasets.Dataset, form: Form) -> datasets.Dataset:
    """Drop training examples that also stand in the held-out ones: a memorised document measures nothing."""

    def key(row: Row) -> str:
        return json.dumps([row[c] for c in _COLUMNS[form]], sort_keys=True)

    held = {key(row) for row in _rows(heldout)}
    keep = [i for i, row in enumerate(_rows(train)) if key(row) not in held]
    return train if len(keep) == len(train) else train.select(keep)


def _as_text(row: Row, form: Form, render: Callable[[list[Row]], str]) -> str:
    if form == "messages":
        return render(row["messages"])
    if form == "prompt_completion":
        prompt, completion = row["prompt"], row["completion"]
        return prompt + completion if isinstance(prompt, str) else render([*prompt, *completion])
    return row["text"]
