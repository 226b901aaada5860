"""The forms of examples, recognised by columns; usable rows.

    preference            prompt, chosen, rejected        answers compared (DPO); the prompt may also stand in both
    unpaired              prompt, completion, label       good and bad answers, where `learn: kto` asks for it
    prompts               prompt, and rewards' columns    prompts of sampled answers, where `learn: grpo` asks for it
    demonstrations        prompt, completion              answers that a teacher sees, where `learn: sdft` asks for it
    messages              messages                        conversations
    prompt_completion     prompt, completion              text, or turns of a conversation
    text                  text                            pretraining

`text` and `messages` of a dataset entry name columns that are called otherwise, and so choose the form too. Examples of
conversations keep the columns `tools` and `chat_template_kwargs` (_extras.py).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, cast

import datasets
from datasets.fingerprint import Hasher

from hf_contmerge.errors import DataError, unknown
from hf_contmerge.run.recipe.parts import DataSource
from hf_contmerge.training._extras import (
    ARGUMENTS,
    TOOLS,
    argument_keys,
    checked_arguments,
    extras_of,
    read_tools,
)
from hf_contmerge.training._format import Format, read_format
from hf_contmerge.training._rows import Row, Rows

LOG = logging.getLogger(__name__)

Form = Literal["text", "messages", "prompt_completion", "preference", "unpaired", "prompts", "demonstrations"]

COLUMNS: dict[Form, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompts": ("prompt",),
    "demonstrations": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
PREFERENCES: dict[Form, str] = {"preference": "preference pairs", "unpaired": "labelled answers"}
"""Forms for the trainers with a reference model, in words."""
SAMPLED: dict[Form, str] = {"prompts": "prompts (`learn: grpo`)", "demonstrations": "demonstrations (`learn: sdft`)"}
"""Forms for the trainers that sample answers, in words."""
_ASKED: dict[Form, str] = {
    "unpaired": "`learn: kto` needs `prompt`, `completion` and `label` (true for a good answer, false for a bad one)",
    "prompts": "`learn: grpo` needs `prompt`, and the columns that its rewards read",
    "demonstrations": "`learn: sdft` needs `prompt` and `completion`, the demonstration",
}
"""Forms that `learn` asks for, and their columns in words."""
LABEL = "label"
_LABELS: dict[Any, bool] = {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}
"""Of text files; others have true and false, or 1 and 0."""
_TEXT = datasets.Value("string")
_TURNS = datasets.List({"role": _TEXT, "content": _TEXT})
_ANY_TURNS = datasets.List(datasets.Json())
_MANY = 20_000
"""Rows whose check takes some seconds."""
_VERSION = 3
"""Of the examples in the cache; raise it when the same rows give others."""


class Limits(Protocol):
    """The limits of a stage's trainer (limits.py)."""

    @property
    def form(self) -> Form | None:
        """The form required of the stage, whatever other columns exist."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Further columns that it needs, which hold text or numbers."""
        ...

    def check(self, example: Row, form: Form) -> str | None:
        """Return the reason to leave an example out, or None."""
        ...

    def learnable(self, data: datasets.Dataset, form: Form, *, at_most: int | None) -> list[int]:
        """Return the places of the first examples with a target token."""
        ...

    def too_long(self, form: Form) -> str:
        """Return why the others are left out."""
        ...


@dataclass(frozen=True)
class Fit:
    """Usable rows in their form's columns, and counts of the others."""

    form: Form
    rows: datasets.Dataset
    left_out: Counter[str] = field(default_factory=Counter)
    unused: tuple[str, ...] = ()
    """Columns without a use."""


class Layout(NamedTuple):
    """A dataset's form and its columns."""

    form: Form
    columns: tuple[str, ...]
    """Of the dataset."""
    names: tuple[str, ...]
    """Of the examples; `text` may be made of several columns."""
    format: Format | None = None
    extras: tuple[str, ...] = ()
    """Columns that go along with conversations."""
    argument_keys: frozenset[str] = frozenset()
    """Of the template arguments in every row."""
    unused: tuple[str, ...] = ()
    """Columns without a use."""


class LeftOutError(Exception):
    """A row without an example; the message is the reason."""


@dataclass(frozen=True)
class Examples:
    """Makes examples of a dataset's rows, one by one."""

    rows: Rows
    spec: DataSource
    layout: Layout
    limits: Limits | None = None
    are_turns: dict[str, bool] = field(default_factory=dict)
    """Column of the examples -> if the first one has turns there, as all others must. Shared by a stream's parts."""

    def made(self) -> Iterator[Row | str]:
        """Yield each row's example, or why it is left out.

        Raises DataError for a row that is malformed; the message has its place.
        """
        for number, row in enumerate(self.rows):
            try:
                example = self._example(row)
                self._require_one_kind(example)
                yield example
            except LeftOutError as reason:
                yield str(reason)
            except DataError as error:
                raise DataError(f"{self.rows.place(number)}: {error}") from error

    def _require_one_kind(self, example: Row) -> None:
        """Raise DataError for text where other rows have turns, and the reverse."""
        for name, value in example.items():
            turns = isinstance(value, list)
            if self.are_turns.setdefault(name, turns) != turns:
                kinds = ("turns", "text") if turns else ("text", "turns")
                raise DataError(
                    f"{name} is {kinds[0]} here and {kinds[1]} in earlier rows. Write all rows in one form."
                )

    def _example(self, row: Row) -> Row:
        _put_words(row, self.spec)
        values = {name: row.get(name) for name in self.layout.columns}
        if any(_lacks(value, alone=len(values) == 1) for value in values.values()):
            raise LeftOutError(f"lack {' or '.join(values)}")
        example = self._in_form(values)
        low, high = self.spec.min_chars or 0, self.spec.max_chars
        if (low or high is not None) and not low <= _length(example, self.layout.form) <= (high or 2**62):
            raise LeftOutError(f"have not {_span(self.spec)} characters")
        example |= {name: self._extra(name, row.get(name)) for name in self.layout.extras}
        reason = self.limits.check(example, self.layout.form) if self.limits else None
        if reason:
            raise LeftOutError(reason)
        if self.rows.are_records:
            _check_kept(example)
        return example

    def _in_form(self, values: Row) -> Row:
        """Return the example of a row's columns. Raises DataError for other values."""
        if self.layout.format:
            return {"text": checked_text(self._text(self.layout.format, values), "text")}
        named = dict(zip(self.layout.names, values.items(), strict=True))
        if self.layout.form == "preference":
            return _pair({name: _answer(value, column) for name, (column, value) in named.items()})
        if self.layout.form == "messages":
            return {"messages": _talk(*named["messages"])}
        if self.layout.form == "prompts":
            texts = {name: _written(value, column) for name, (column, value) in named.items() if name != "prompt"}
            return {"prompt": _answer(values["prompt"], "prompt"), **texts}
        label = {name: _label(value) for name, (_, value) in named.items() if name == LABEL}
        example = {name: _answer(value, column) for name, (column, value) in named.items() if name != LABEL}
        if len({type(value) for value in example.values()}) > 1:
            raise DataError("prompt and completion must both be text, or both lists of turns.")
        if not example["completion"]:
            raise LeftOutError("have an empty completion")
        return example | label

    def _extra(self, name: str, value: Any) -> Any:
        if name == TOOLS:
            return read_tools(value, exact=self.rows.are_records or "Json(" in str(self.rows.data.features[name]))
        return checked_arguments(value, self.layout.argument_keys)

    def _text(self, format: Format, values: Row) -> str:
        if format.is_column and not isinstance(values[format.text], str):
            raise DataError(
                f"the column {format.text} holds {values[format.text]!r:.60}, not text. Make text of it with a "
                f"format: `text: '{{{format.text}}}'`."
            )
        try:
            return format.fill(values, exact=self.rows.are_records)
        except (ValueError, TypeError) as error:
            raise DataError(f"`text` does not fit it: {error}.") from error


def fit_rows(rows: Rows, spec: DataSource, limits: Limits | None = None) -> Fit:
    """Find the form of rows; drop incomplete, short and long ones.

    Raises DataError for columns that make no form, and for malformed rows.
    """
    if len(rows) > _MANY:
        LOG.info("Checking %d rows of %s", len(rows), spec.path)
    examples = Examples(rows, spec, layout_of(rows, spec, limits), limits)
    keep: list[int] = []
    left_out: Counter[str] = Counter()
    plain = True
    for number, example in enumerate(examples.made()):
        if isinstance(example, str):
            left_out[example] += 1
        else:
            keep.append(number)
            plain = plain and _is_plain(example)
    layout = examples.layout
    return Fit(layout.form, _as_dataset(examples, keep, plain=plain), left_out, layout.unused)


def fit_part(examples: Examples) -> tuple[list[Row], Counter[str]]:
    """Return the examples of a stream's part, and counts of other rows."""
    made = list(examples.made())
    return [row for row in made if not isinstance(row, str)], Counter(why for why in made if isinstance(why, str))


def next_part(examples: Examples, rows: Rows) -> Examples:
    """Return the reader of a stream's next part; columns may be new.

    Raises DataError for one that makes another form of the rows, or that all rows need.
    """
    layout = examples.layout
    fresh = [name for name in rows.columns if name not in rows.before]
    if fresh:
        now = layout_of(rows, examples.spec, examples.limits)
        extras = [name for name in now.extras if name in fresh]
        needed = [name for name in fresh if name in now.columns or (name in extras and name == ARGUMENTS)]
        if needed:
            number = next(i for i, row in enumerate(rows) if needed[0] in row)
            raise DataError(
                f"{rows.place(number)} has {' and '.join(needed)}, which earlier rows of the stream lack. Give all "
                "rows the same columns."
            )
        unused = [name for name in fresh if name not in extras]
        layout = layout._replace(extras=(*layout.extras, *extras), unused=(*layout.unused, *unused))
    return replace(examples, rows=rows, layout=layout)


def dataset_of(examples: list[Row]) -> datasets.Dataset:
    """Return examples in memory as a dataset."""
    plain = all(map(_is_plain, examples))
    return datasets.Dataset.from_list(examples, features=_features(examples[0], plain=plain) if examples else None)


def rows_of(data: datasets.Dataset) -> Iterator[Row]:
    """Iterate over rows as dictionaries."""
    return cast(Iterator[Row], iter(data))


def require_columns(known: list[str], columns: list[str] | tuple[str, ...], path: str) -> None:
    """Raise DataError unless all columns are known."""
    for column in columns:
        if column not in known:
            raise DataError(unknown("column", column, known, where=path))


def layout_of(rows: Rows, spec: DataSource, limits: Limits | None = None) -> Layout:
    """Return the form of a dataset. Raises DataError for unknown columns."""
    layout = _wanted_form(rows, spec, limits) if limits and limits.form else _form_of(rows, spec)
    answer = layout.columns[-2 if layout.form == "unpaired" else -1]
    first = next((row for row in rows if row.get(answer) is not None), {})
    talk = layout.form not in ("text", *SAMPLED) and isinstance(first.get(answer), list)
    extras = extras_of(rows.columns, talk=talk)
    unused = tuple(name for name in rows.columns if name not in (*layout.columns, *extras))
    return layout._replace(extras=extras, argument_keys=argument_keys(first), unused=unused)


def _wanted_form(rows: Rows, spec: DataSource, limits: Limits) -> Layout:
    form = limits.form
    assert form
    columns = COLUMNS[form]
    require_columns(rows.columns, tuple(spec.labels), spec.path)
    if spec.text is not None or spec.messages is not None or not {*columns} <= {*rows.columns}:
        raise DataError(
            f"{spec.path} has the columns {', '.join(rows.columns)}; {_ASKED[form]}, and neither `text` nor "
            "`messages`. Rename the columns, or remove `learn`."
        )
    require_columns(rows.columns, limits.columns, f"{spec.path}, for `rewards`")
    columns = tuple(dict.fromkeys([*columns, *limits.columns]))
    return Layout(form, columns, columns)


def _form_of(rows: Rows, spec: DataSource) -> Layout:
    known = rows.columns
    require_columns(known, tuple(spec.labels), spec.path)
    if spec.text is not None:
        format = read_format(spec.text, known, f"`text` of {spec.path}")
        require_columns(known, format.columns, spec.path)
        return Layout("text", format.columns, ("text",), format)
    if spec.messages is not None:
        require_columns(known, (spec.messages,), spec.path)
        return Layout("messages", (spec.messages,), ("messages",))
    for form, columns in COLUMNS.items():
        if form in _ASKED:
            continue
        if form == "preference" and {"chosen", "rejected"} <= {*known}:
            columns = tuple(c for c in columns if c in known)
        if {*columns} <= {*known}:
            return Layout(form, columns, columns, Format("text", columns, True) if form == "text" else None)
    raise DataError(
        f"{spec.path} has the columns {', '.join(known)}; a stage needs `messages`, or `prompt` and "
        "`completion`, or `prompt`, `chosen` and `rejected`, or `text`. Name the text's column, or a format such as "
        "'{question}\\n{answer}', with `text`; that of conversations with `messages`."
    )


# Datasets of examples


def _as_dataset(examples: Examples, keep: list[int], *, plain: bool) -> datasets.Dataset:
    """Return some rows' examples: the columns, or a copy in the cache."""
    rows, layout = examples.rows, examples.layout
    formatted = layout.format and not layout.format.is_column
    split = layout.form == "preference" and _is_split(rows.data.features)
    split = split or (layout.form == "unpaired" and rows.data.features.get(LABEL) != datasets.Value("bool"))
    split = split or any(rows.data.features.get(c) != _TEXT for c in layout.columns[1:] if layout.form == "prompts")
    if not (rows.are_records or examples.spec.labels or formatted or split or layout.extras):
        data = rows.data.select_columns(list(layout.columns))
        data = data if len(keep) == len(data) else data.select(keep)
        return data.rename_columns({a: b for a, b in zip(layout.columns, layout.names, strict=True) if a != b})
    if not keep:
        return datasets.Dataset.from_list([])
    chosen, again = set(keep), replace(examples, limits=None)  # the limits were checked

    def kept() -> Iterator[Row | str]:
        return (example for i, example in enumerate(again.made()) if i in chosen)

    features = _features(cast(Row, next(kept())), plain=plain)
    # One file has other examples where another stage learns from it: what made them is in the cache's key.
    shape = [layout.form, layout.columns, layout.names, layout.extras, sorted(layout.argument_keys)]
    facts = [_VERSION, rows.data._fingerprint, examples.spec.model_dump(mode="json"), keep, features.to_dict(), shape]
    made = datasets.Dataset.from_generator(kept, features=features, fingerprint=Hasher.hash(facts))
    return cast(datasets.Dataset, made)


def _is_split(features: datasets.Features) -> bool:
    """Say if the prompts of pairs are made of the answers."""
    kinds = {isinstance(features[name], datasets.Value) for name in COLUMNS["preference"] if name in features}
    return "prompt" not in features or len(kinds) > 1


def _features(example: Row, *, plain: bool) -> datasets.Features:
    turns = _TURNS if plain else _ANY_TURNS
    extras = {TOOLS: _TEXT, ARGUMENTS: datasets.Json(), LABEL: datasets.Value("bool")}
    return datasets.Features(
        {name: extras.get(name, _TEXT if isinstance(value, str) else turns) for name, value in example.items()}
    )


def _is_plain(example: Row) -> bool:
    """Say if all turns have a role and text alone."""
    return all(turn.keys() == {"role", "content"} and isinstance(turn["content"], str) for turn in _turns(example))


def _turns(example: Row) -> Iterator[Row]:
    return (turn for value in example.values() if isinstance(value, list) for turn in value)


# Values


def _put_words(row: Row, spec: DataSource) -> None:
    """Replace class numbers by words. Raises DataError for an unknown number."""
    for column, words in spec.labels.items():
        value = row.get(column)
        number = place_in(value, words)
        if number is None:
            raise DataError(
                f"the column {column} holds {value!r}, and `labels` has words for the classes 0 to "
                f"{len(words) - 1}. Give each class a word, in the order of their numbers."
            )
        row[column] = words[number]


def place_in(value: Any, listed: Sequence[Any]) -> int | None:
    """Return a value as a place in a list, or None."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return int(number) if isinstance(number, int) and 0 <= number < len(listed) else None


def _lacks(value: Any, *, alone: bool) -> bool:
    """Say if a value is null, or a row's only and blank."""
    return value is None or (alone and isinstance(value, str) and not value.strip())


def checked_text(text: str, column: str) -> str:
    """Return text. Raises DataError for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise DataError(f"{column} has half of a surrogate pair ({half}), which is no character. Remove it.") from error
    return text


def _answer(value: Any, column: str) -> str | list[Row]:
    """Return text, or turns of a conversation. Raises DataError for others."""
    if isinstance(value, str):
        return checked_text(value, column)
    if isinstance(value, list):
        return _talk(column, value)
    raise DataError(
        f"the column {column} holds {value!r:.60}; text, or turns with `role` and `content`, were expected. Write it "
        "as a string."
    )


def _written(value: Any, column: str) -> str:
    """Return text, or a number as text. Raises DataError for others."""
    if isinstance(value, str):
        return checked_text(value, column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"the column {column} holds {value!r:.60}; text or a number was expected, which a reward compares.")


def _label(value: Any) -> bool:
    """Return a label. Raises DataError for other values."""
    label = _LABELS.get(value) if isinstance(value, str) else bool(value) if value in (0, 1) else None
    if label is None:
        raise DataError(f"the column {LABEL} holds {value!r:.60}; true for a good answer or false was expected.")
    return label


def _talk(column: str, turns: Any) -> list[Row]:
    """Return a conversation. Raises DataError for others, LeftOutError for incomplete ones."""
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("role"), str) for t in turns):
        raise DataError(
            f"the column {column} must hold conversations, lists of turns with `role` and `content`; got {turns!r:.60}."
        )
    if not turns:
        raise LeftOutError("have no turn")
    for turn in turns:
        if turn.get("content") is None and not turn.get("tool_calls"):
            raise LeftOutError("have a turn without content")
        if not isinstance(turn.get("content"), str | list | None):
            raise DataError(f"a turn in {column} has the content {turn['content']!r:.60}; text was expected.")
    checked_text(json.dumps(turns, ensure_ascii=False, default=str), column)
    return turns


def _check_kept(example: Row) -> None:
    """Raise DataError for a number beyond the precision of `datasets`."""
    keeper = datasets.Json()
    turns = () if _is_plain(example) else _turns(example)
    for value in (*turns, example.get(ARGUMENTS)):
        if value and keeper.decode_example(keeper.encode_example(value)) != value:
            raise DataError(f"a number in {value!r:.60} has too many digits to be kept. Write it as a string.")


def _pair(example: Row) -> Row:
    """Return a pair with its prompt, split from the answers if needed."""
    from trl.data_utils import extract_prompt

    both = {name: example[name] for name in ("chosen", "rejected")}
    if "prompt" not in example or isinstance(example["chosen"], list) != isinstance(example["prompt"], list):
        example = {**both, **extract_prompt(both)}  # takes the turns that both have in common
    return {name: example[name] for name in COLUMNS["preference"]}


def _length(row: Row, form: Form) -> int:
    """Count an example's characters; a pair counts its longer answer."""
    if form == "preference":
        return _chars(row["prompt"]) + max(_chars(row["chosen"]), _chars(row["rejected"]))
    return sum(_chars(row[name]) for name in COLUMNS[form])


def _chars(value: Any) -> int:
    if isinstance(value, list):
        return sum(_chars(turn.get("content") if isinstance(turn, dict) else turn) for turn in value)
    return len(value) if isinstance(value, str) else 0


def _span(spec: DataSource) -> str:
    low = f"at least {spec.min_chars}" if spec.min_chars else ""
    high = f"at most {spec.max_chars}" if spec.max_chars else ""
    return " and ".join(part for part in (low, high) if part)
