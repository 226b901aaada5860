"""A dataset entry -> examples for TRL and held-out documents."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import datasets

from hf_contmerge.errors import DataError, ModelError
from hf_contmerge.run.recipe.parts import Dataset, DataSource, Task
from hf_contmerge.training._extras import template_arguments
from hf_contmerge.training._forms import COLUMNS, Fit, Form, Row, fit_rows, format_columns, require_columns, rows_of
from hf_contmerge.training._mix import Portion, alike, in_proportion, joined, split_by_shares
from hf_contmerge.training._rows import empty, load_rows, stream_rows

LOG = logging.getLogger(__name__)

_MEASURED: dict[Form, tuple[str, ...]] = {**COLUMNS, "preference": ("prompt", "chosen")}
"""What of a held-out example is measured."""


@dataclass(frozen=True)
class SourceCounts:
    """Counts of a dataset's used rows, and of others by reason."""

    path: str
    config: str | None
    split: str
    share: float
    """In the mix; 1 for a dataset alone."""
    train: int
    heldout: int
    left_out: Mapping[str, int]
    """Reason ("lack text", ...) -> number of rows."""


@dataclass(frozen=True)
class StageData:
    """A stage's examples; `heldout` and `train` share no document."""

    form: Form
    train: datasets.Dataset
    heldout: datasets.Dataset
    sources: tuple[SourceCounts, ...] = ()
    """The dataset that the examples come from, or those of a mix."""
    train_sources: tuple[int, ...] = ()
    """For each example its place in `sources`. Training does not see it."""
    heldout_sources: tuple[int, ...] = ()


def load_stage_data(spec: Dataset, *, seed: int) -> StageData:
    """Load and shuffle a stage's dataset or mix; hold examples out.

    Raises:
        DataError: a dataset is missing or too small, lacks the columns, or does not fit the others of a mix.
        ResourceError: the Hub cannot be reached.
    """
    held = split_by_shares(spec.heldout, spec.shares())
    portions = [
        _set_aside(_heldout_like(source, count, spec), share, count, seed=seed)
        for source, share, count in zip(spec.sources(), spec.shares(), held, strict=True)
    ]
    portions = alike(portions)
    heldout, heldout_sources = joined([portion.heldout for portion in portions], seed=seed)
    portions = [_trained(portion, heldout) for portion in portions]
    if spec.mix:
        portions = in_proportion(portions, at_most=spec.max_examples)
    train, train_sources = joined([portion.train for portion in portions], seed=seed)
    sources = tuple(_counts(portion) for portion in portions)
    return StageData(portions[0].form, train, heldout, sources, train_sources, heldout_sources)


def stage_data_of(fit: Fit, path: str, *, seed: int) -> StageData:
    """Return rows in memory as a stage's, shuffled like a file's."""
    rows = fit.rows.shuffle(seed=seed, keep_in_memory=True)
    counts = SourceCounts(path, None, "train", 1.0, len(rows), 0, dict(+fit.left_out))
    return StageData(fit.form, rows, rows.select([]), (counts,), (0,) * len(rows))


def _heldout_like(source: DataSource, count: int, spec: Dataset) -> DataSource:
    """Drop a source's `heldout_split` if its share rounds to zero."""
    return source.model_copy(update={"heldout_split": None}) if spec.heldout and not count else source


def _set_aside(source: DataSource, share: float, count: int, *, seed: int) -> Portion:
    """Load a dataset; hold out `count` examples or its `heldout_split`."""
    own = 0 if source.heldout_split else count
    fit = _examples(source, seed=seed, at_most=(source.max_examples or 0) + own)
    if source.heldout_split:
        other = source.model_copy(update={"split": source.heldout_split})
        held = _examples(other, seed=seed, at_most=count).rows
        heldout, train = held.select(range(min(count or len(held), len(held)))), fit.rows
    else:
        if len(fit.rows) <= count:
            raise DataError(
                f"{source.path} has {len(fit.rows)} examples, but {count} are to be held out and none would be "
                "left to train on. Give more examples, or set `heldout` to a smaller number."
            )
        heldout, train = fit.rows.select(range(count)), fit.rows.select(range(count, len(fit.rows)))
    return Portion(source, share, fit.form, train, heldout, fit.left_out)


def _trained(portion: Portion, heldout: datasets.Dataset) -> Portion:
    """Return a portion without held-out twins, up to `max_examples`."""
    rest = portion.keeping(_without(portion.train, heldout, portion.form), "are copies of held-out ones")
    if portion.source.max_examples:
        rest = rest.first(portion.source.max_examples, "are more than `max_examples`")
    if len(rest.train) == 0:
        raise DataError(f"{portion.source.path} has no example to train on once the held-out ones are removed.")
    return rest


def _counts(portion: Portion) -> SourceCounts:
    source, used = portion.source, (len(portion.train), len(portion.heldout))
    return SourceCounts(source.path, source.config, source.split, portion.share, *used, dict(+portion.left_out))


def documents(data: datasets.Dataset, form: Form, *, chars: int, render: Callable[..., str]) -> list[str]:
    """Return held-out examples as plain documents of at most `chars` characters.

    Args:
        data: the examples.
        form: their form.
        chars: where longer documents are cut.
        render: makes text of a conversation by the tokenizer's chat template, with a row's `template_arguments`.
    """
    return [_as_text(row, form, render)[:chars] for row in rows_of(data)]


def require_chat_template(tokenizer: Any) -> None:
    """Raise ModelError if a tokenizer cannot make text of conversations."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, which a stage with `messages` needs. "
            "Set `train.chat_template_path`, or give the stage `prompt` and `completion`, or `text`."
        )


def task_rows(task: Task) -> list[Row]:
    """Return the rows of a task's dataset, in task file columns."""
    assert task.dataset is not None
    if task.kind == "perplexity":
        fit = _examples(task.dataset, seed=0, at_most=task.dataset.heldout)
        if fit.form != "text":
            raise DataError(f"{task.dataset.path}: a perplexity task needs text; name its column with `text`.")
        chosen = fit.rows.select(range(min(task.dataset.heldout or len(fit.rows), len(fit.rows))))
        return [{"text": r["text"][: task.dataset.heldout_chars]} for r in rows_of(chosen)]
    rows = _some(load_rows(task.dataset), task.dataset)
    asked = format_columns(task.question, f"`question` of {task.dataset.path}")
    if task.kind == "exact_match":
        require_columns(rows, (*asked, task.answer), task.dataset.path)
        return [{"query": _filled(task.question, r), "gold": str(r[task.answer]).strip()} for r in rows_of(rows)]
    return _choice_rows(task, rows, asked)


def _choice_rows(task: Task, rows: datasets.Dataset, asked: tuple[str, ...]) -> list[Row]:
    """Return the rows of a multiple_choice task. `asked`: the question's columns."""
    assert task.dataset is not None
    words = task.choices
    require_columns(rows, (*asked, *((words,) if isinstance(words, str) else ()), task.answer), task.dataset.path)
    if isinstance(words, str) and not isinstance(rows[0][words], list):
        raise DataError(f"{task.dataset.path}: {words} must be a list of continuations; got {rows[0][words]!r:.60}.")
    found = [
        {
            "query": _filled(task.question, r),
            "choices": list(r[words] if isinstance(words, str) else words),
            "gold": r[task.answer],
        }
        for r in rows_of(rows)
    ]
    bad = next((r for r in found if not isinstance(r["gold"], int) or not 0 <= r["gold"] < len(r["choices"])), None)
    if bad:
        raise DataError(
            f"{task.dataset.path}: {task.answer} must be the index of the right choice; got {bad['gold']!r} for "
            f"{len(bad['choices'])} choices."
        )
    return found


def _some(rows: datasets.Dataset, spec: DataSource) -> datasets.Dataset:
    """Return `max_examples` random rows, always the same; or all."""
    if not spec.max_examples or len(rows) <= spec.max_examples:
        return rows
    return rows.shuffle(seed=0, keep_in_memory=True).select(range(spec.max_examples))


def _filled(question: str, row: Row) -> str:
    """Return a prompt: a column's value, or a format over columns."""
    return row[question] if question in row else question.format(**row)


def _examples(spec: DataSource, *, seed: int, at_most: int) -> Fit:
    """Return a dataset's usable examples, shuffled; `at_most` of a stream (0: all)."""
    if not spec.streaming:
        whole = load_rows(spec)
        fit = fit_rows(whole, spec)
        _tell_unused(spec, fit)
        _tell_left_out(spec, fit.left_out, len(whole))
        # In memory, or the order is written beside the user's files.
        return replace(fit, rows=fit.rows.shuffle(seed=seed, keep_in_memory=True))
    found: list[Row] = []
    left_out, read, form = Counter[str](), 0, "text"
    for part in stream_rows(spec, seed=seed):
        fit = fit_rows(part, spec)
        if not read:
            _tell_unused(spec, fit)
        found += fit.rows.to_list()
        left_out, read, form = left_out + fit.left_out, read + len(part), fit.form
        if at_most and len(found) >= at_most:
            break
    _tell_left_out(spec, left_out, read)
    return Fit(form, datasets.Dataset.from_list(found[: at_most or None]), left_out)


def _tell_unused(spec: DataSource, fit: Fit) -> None:
    """Report columns without a use."""
    if fit.unused:
        LOG.info("%s: these columns are not used: %s", spec.path, ", ".join(fit.unused))


def _tell_left_out(spec: DataSource, left_out: Counter[str], read: int) -> None:
    """Report unusable rows. Raises DataError if no row is left."""
    for reason, count in left_out.items():
        if count:
            LOG.warning("%s: %d of %d rows are left out, for they %s", spec.path, count, read, reason)
    if left_out.total() < read:
        return
    lengths = [reason for reason, count in left_out.items() if count and reason.startswith("have not")]
    if lengths:
        raise DataError(f"{spec.path} (split {spec.split}) has no example that is left: {read} {lengths[0]}.")
    raise empty(spec)


def _without(train: datasets.Dataset, heldout: datasets.Dataset, form: Form) -> datasets.Dataset:
    """Drop training examples with a held-out twin: memorised documents measure nothing."""

    def key(row: Row) -> str:
        return json.dumps([row[c] for c in _MEASURED[form]] + [template_arguments(row)], sort_keys=True)

    held = {key(row) for row in rows_of(heldout)}
    keep = [i for i, row in enumerate(rows_of(train)) if key(row) not in held]
    return train if len(keep) == len(train) else train.select(keep)


def _as_text(row: Row, form: Form, render: Callable[..., str]) -> str:
    if form == "messages":
        return render(row["messages"], **template_arguments(row))
    if form in ("prompt_completion", "preference"):
        prompt, completion = (row[column] for column in _MEASURED[form])
        return (
            prompt + completion
            if isinstance(prompt, str)
            else render([*prompt, *completion], **template_arguments(row))
        )
    return row["text"]
