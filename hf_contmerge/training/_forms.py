"""The forms of examples, recognised by columns; usable rows.

    preference            prompt, chosen, rejected        answers compared (DPO); the prompt may also stand in both
    messages              messages                        conversations
    prompt_completion     prompt, completion              text, or turns of a conversation
    text                  text                            pretraining

`text` and `messages` of a dataset entry name columns that are called otherwise, and so choose the form too. Examples of
conversations keep the columns `tools` and `chat_template_kwargs` (_extras.py).
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import datasets

from hf_contmerge.errors import DataError, unknown
from hf_contmerge.run.recipe.parts import DataSource
from hf_contmerge.training._extras import EXTRAS, extras_of, with_extras

Form = Literal["text", "messages", "prompt_completion", "preference"]
Row = dict[str, Any]

COLUMNS: dict[Form, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Fit:
    """Usable rows in their form's columns, and counts of the others."""

    form: Form
    rows: datasets.Dataset
    left_out: Counter[str] = field(default_factory=Counter)
    unused: tuple[str, ...] = ()
    """Columns without a use."""


def fit_rows(rows: datasets.Dataset, spec: DataSource) -> Fit:
    """Find the form of rows; drop incomplete, short and long ones.

    Raises DataError for columns that make no form, or that hold something else.
    """
    known = rows.column_names
    form, rows, words = _in_form(_worded(rows, spec), spec)
    left_out: Counter[str] = Counter()
    whole = _where(rows, lambda row: not any(_lacks(row[name], alone=len(words) == 1) for name in _own(row)))
    left_out[f"lack {' or '.join(words)}"] = len(rows) - len(whole)
    unused = tuple(name for name in known if name not in words and name not in rows.column_names)
    fit = Fit(form, _finished(form, with_extras(whole, spec.path), spec), left_out, unused)
    low, high = spec.min_chars or 0, spec.max_chars
    if not low and high is None:
        return fit
    right = _where(fit.rows, lambda row: low <= _length(row, form) and (high is None or _length(row, form) <= high))
    left_out[f"have not {_span(spec)} characters"] = len(fit.rows) - len(right)
    return Fit(form, right, left_out, unused)


def rows_of(data: datasets.Dataset) -> Iterator[Row]:
    """Iterate over rows as dictionaries."""
    return cast(Iterator[Row], iter(data))


def require_columns(rows: datasets.Dataset, columns: list[str] | tuple[str, ...], path: str) -> None:
    """Raise DataError unless all columns are there."""
    for column in columns:
        if column not in rows.column_names:
            raise DataError(unknown("column", column, rows.column_names, where=path))


def _in_form(rows: datasets.Dataset, spec: DataSource) -> tuple[Form, datasets.Dataset, tuple[str, ...]]:
    """Return the form, its columns and their names."""
    if spec.text is not None:
        columns = format_columns(spec.text, f"`text` of {spec.path}")
        require_columns(rows, columns, spec.path)
        return "text", rows.select_columns(list(columns)), columns
    if spec.messages is not None:
        require_columns(rows, (spec.messages,), spec.path)
        rows = rows.select_columns([spec.messages, *extras_of(rows.column_names, talk=True)])
        rows = rows if spec.messages == "messages" else rows.rename_column(spec.messages, "messages")
        return "messages", rows, (spec.messages,)
    there = set(rows.column_names)
    for form, columns in COLUMNS.items():
        if form == "preference" and {"chosen", "rejected"} <= there:
            columns = tuple(c for c in columns if c in there)
        if set(columns) <= there:
            talk = len(rows) > 0 and isinstance(rows[0][columns[-1]], list)
            return form, rows.select_columns([*columns, *extras_of(rows.column_names, talk=talk)]), columns
    raise DataError(
        f"{spec.path} has the columns {', '.join(rows.column_names)}; a stage needs `messages`, or `prompt` and "
        "`completion`, or `prompt`, `chosen` and `rejected`, or `text`. Name the text's column, or a format such as "
        "'{question}\\n{answer}', with `text`; that of conversations with `messages`."
    )


def _finished(form: Form, rows: datasets.Dataset, spec: DataSource) -> datasets.Dataset:
    """Return rows in exactly their form's columns, with checked values."""
    if len(rows) == 0:
        return rows
    if form == "messages" and not _is_talk(rows[0]["messages"]):
        raise DataError(
            f"{spec.path}: the column {spec.messages or 'messages'} must hold conversations, lists of turns with "
            f"`role` and `content`; got {rows[0]['messages']!r:.60}."
        )
    if form == "preference":
        return _with_prompt(rows)
    if form != "text" or spec.text is None:
        return _strings(rows, "text", spec) if form == "text" else rows
    text = spec.text
    if rows.column_names == [text]:
        rows = _strings(rows, text, spec)
        return rows if text == "text" else rows.rename_column(text, "text")
    return rows.map(lambda row: {"text": text.format(**row)}, remove_columns=rows.column_names)


def _with_prompt(rows: datasets.Dataset) -> datasets.Dataset:
    """Return pairs with a separate prompt, split from the answers if needed."""
    from trl.data_utils import extract_prompt

    first = rows[0]
    if isinstance(first["chosen"], list) == isinstance(first.get("prompt", 0), list) and "prompt" in first:
        return rows
    answers: Any = extract_prompt  # takes the turns that both have in common
    rest = [name for name in rows.column_names if name != "prompt"]
    extras = extras_of(rows.column_names, talk=True)
    return rows.select_columns(rest).map(answers).select_columns([*COLUMNS["preference"], *extras])


def _worded(rows: datasets.Dataset, spec: DataSource) -> datasets.Dataset:
    """Replace class numbers by words. Raises DataError for an unknown number."""
    require_columns(rows, tuple(spec.labels), spec.path)
    for column, words in spec.labels.items():
        numbers = rows[column]
        bad = next((n for n in numbers if not isinstance(n, int) or not 0 <= n < len(words)), None)
        if bad is not None:
            raise DataError(
                f"{spec.path}: the column {column} holds {bad!r}, and `labels` has words for the classes 0 to "
                f"{len(words) - 1}. Give each class a word, in the order of their numbers."
            )
        rows = rows.remove_columns([column]).add_column(column, [words[n] for n in numbers])  # pyright: ignore
    return rows


def format_columns(text: str, where: str) -> tuple[str, ...]:
    """Return the columns of a format string, or the one column."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name]
    except ValueError as error:
        raise DataError(f"{where} is no format string: {text!r} ({error}).") from error
    return tuple(dict.fromkeys(fields)) or (text,)


def _strings(rows: datasets.Dataset, column: str, spec: DataSource) -> datasets.Dataset:
    kind = getattr(rows.features[column], "dtype", None) or "values of several kinds"
    if kind not in ("string", "large_string"):
        raise DataError(
            f"{spec.path}: the column {column} holds {kind}, not text. Make text of it with a format: "
            f"`text: '{{{column}}}'`."
        )
    return rows


def _where(rows: datasets.Dataset, accept: Any) -> datasets.Dataset:
    keep = [i for i, row in enumerate(rows_of(rows)) if accept(row)]
    return rows if len(keep) == len(rows) else rows.select(keep)


def _lacks(value: Any, *, alone: bool) -> bool:
    """Say if a value is null, or a row's only and blank."""
    return value is None or (alone and isinstance(value, str) and not value.strip())


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def _length(row: Row, form: Form) -> int:
    """Count an example's characters; a pair counts its longer answer."""
    if form == "preference":
        return _chars(row["prompt"]) + max(_chars(row["chosen"]), _chars(row["rejected"]))
    return sum(_chars(row[name]) for name in _own(row))


def _own(row: Row) -> Iterator[str]:
    """Yield a row's columns without those for the chat template."""
    yield from (name for name in row if name not in EXTRAS)


def _chars(value: Any) -> int:
    if isinstance(value, list):
        return sum(_chars(turn.get("content") if isinstance(turn, dict) else turn) for turn in value)
    return len(value) if isinstance(value, str) else 0


def _span(spec: DataSource) -> str:
    low = f"at least {spec.min_chars}" if spec.min_chars else ""
    high = f"at most {spec.max_chars}" if spec.max_chars else ""
    return " and ".join(part for part in (low, high) if part)
