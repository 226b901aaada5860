"""A dataset entry -> examples for TRL and held-out documents."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets

from hf_contmerge.errors import DataError, ModelError
from hf_contmerge.run.recipe.parts import Dataset, DataSource, Task
from hf_contmerge.runtime.foreign import repeated
from hf_contmerge.runtime.shares import split_by_shares
from hf_contmerge.training._asked import asked_of
from hf_contmerge.training._extras import template_arguments
from hf_contmerge.training._forms import (
    COLUMNS,
    LABEL,
    PREFERENCES,
    SAMPLED,
    Examples,
    Fit,
    Form,
    Limits,
    dataset_of,
    fit_part,
    fit_rows,
    layout_of,
    next_part,
    rows_of,
)
from hf_contmerge.training._mix import Portion, alike, in_proportion, joined
from hf_contmerge.training._rows import Row, dataset_license, empty, load_rows, stream_rows

LOG = logging.getLogger(__name__)

TWINS = "are copies of held-out ones"
"""Why `not_held_out` leaves examples out."""
_MEASURED: dict[Form, tuple[str, ...]] = {
    **COLUMNS, "preference": ("prompt", "chosen"), "unpaired": ("prompt", "completion"),
}  # fmt: skip
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
    license: str | None = None
    """As the recipe or the dataset's README names it."""

    def sentences(self) -> list[str]:
        """Return how many rows are left out, a sentence per reason."""
        count = self.train + self.heldout + sum(self.left_out.values())
        return [f"{n} of {count} rows of {self.path} are left out, for they {why}." for why, n in self.left_out.items()]


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
    general: StageData | None = None
    """General data that a strategy mixes in."""

    def source_records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the sources for the record, by name."""
        return [{"name": name, **asdict(source)} for name, source in zip(names, self.sources, strict=True)]


def name_sources(*parts: StageData | None, taken: str) -> list[list[str]]:
    """Return a name for each source of some data, all different.

    The last parts of its path that no other has, and a number where paths are equal. `taken`: another's name.
    """
    paths = [source.path for part in parts if part for source in part.sources]
    names = [_tail(path, 1) for path in paths]
    for depth in range(2, max((path.count("/") for path in paths), default=0) + 2):
        several = repeated([*names, taken])
        names = [_tail(path, depth) if name in several else name for path, name in zip(paths, names, strict=True)]
    several = repeated([*names, taken])
    numbered = iter([f"{name} ({i})" if name in several else name for i, name in enumerate(names, 1)])
    return [list(itertools.islice(numbered, len(part.sources) if part else 0)) for part in parts]


def _tail(path: str, depth: int) -> str:
    return "/".join(path.rstrip("/").split("/")[-depth:]) or path


def load_stage_data(spec: Dataset, *, seed: int, limits: Limits | None = None) -> StageData:
    """Load and shuffle a stage's dataset or mix; hold examples out.

    Args:
        spec: the dataset, or the mix.
        seed: of the order.
        limits: what the stage's trainer can learn from; other examples are left out.

    Raises:
        DataError: a dataset is missing or too small, lacks the columns, or does not fit the others of a mix; a row is
            malformed.
        ResourceError: the Hub cannot be reached.
    """
    held = split_by_shares(spec.heldout, spec.shares())
    portions = [
        _set_aside(_heldout_like(source, count, spec), share, count, seed=seed, limits=limits)
        for source, share, count in zip(spec.sources(), spec.shares(), held, strict=True)
    ]
    portions = alike(portions)
    heldout, heldout_sources = joined([portion.heldout for portion in portions], seed=seed)
    portions = [_trained(portion, heldout, limits) for portion in portions]
    if spec.mix:
        portions = in_proportion(portions, at_most=spec.max_examples)
    train, train_sources = joined([portion.train for portion in portions], seed=seed)
    sources = tuple(_counts(portion) for portion in portions)
    _tell_chosen(sources)
    return StageData(portions[0].form, train, heldout, sources, train_sources, heldout_sources)


def stage_data_of(fit: Fit, spec: DataSource, *, seed: int, limits: Limits) -> StageData:
    """Return rows in memory as a stage's, shuffled like a file's."""
    rows = fit.rows.shuffle(seed=seed, keep_in_memory=True)
    portion = _learnt(Portion(spec, 1.0, fit.form, rows, rows.select([]), fit.left_out), limits)
    return StageData(fit.form, portion.train, portion.heldout, (_counts(portion),), (0,) * len(portion.train))


def _heldout_like(source: DataSource, count: int, spec: Dataset) -> DataSource:
    """Drop a source's `heldout_split` if its share rounds to zero."""
    return source.model_copy(update={"heldout_split": None}) if spec.heldout and not count else source


def _set_aside(source: DataSource, share: float, count: int, *, seed: int, limits: Limits | None) -> Portion:
    """Load a dataset; hold out `count` examples or its `heldout_split`."""
    own = 0 if source.heldout_split else count
    fit = _examples(source, seed=seed, at_most=(source.max_examples or 0) + own, limits=limits)
    left_out = fit.left_out
    if source.heldout_split:
        other = source.model_copy(update={"split": source.heldout_split})
        test = _examples(other, seed=seed, at_most=count, limits=limits)
        held, others = test.rows.select(_measurable(test)), test.left_out
        left_out = left_out + Counter({f"{why} (split {other.split})": n for why, n in others.items()})
        heldout, train = held.select(range(min(count or len(held), len(held)))), fit.rows
    else:
        if len(fit.rows) <= count:
            raise DataError(
                f"{source.path} has {len(fit.rows)} examples, but {count} are to be held out and none would be "
                "left to train on. Give more examples, or set `heldout` to a smaller number."
            )
        held = _measurable(fit)[:count]
        if len(held) < count:
            raise DataError(
                f"{source.path} has {len(held)} good answers, but {count} are to be held out. Lower `heldout`."
            )
        heldout, train = fit.rows.select(held), fit.rows.select(sorted({*range(len(fit.rows))} - {*held}))
    return Portion(source, share, fit.form, train, heldout, left_out)


def _measurable(fit: Fit) -> list[int]:
    """Return the places of examples for measuring: no bad answers."""
    return (
        [i for i, good in enumerate(fit.rows[LABEL]) if good] if fit.form == "unpaired" else list(range(len(fit.rows)))
    )


def _trained(portion: Portion, heldout: datasets.Dataset, limits: Limits | None) -> Portion:
    """Return a portion without held-out twins, up to `max_examples`."""
    keep = not_held_out(portion.train, portion.form, heldout, portion.form)
    rest = portion.keeping(portion.train.select(keep), TWINS)
    if len(rest.train) == 0:
        raise DataError(f"{portion.source.path} has no example to train on once the held-out ones are removed.")
    rest = _learnt(rest, limits) if limits else rest
    return rest.first(portion.source.max_examples or len(rest.train), "are more than `max_examples`")


def _learnt(portion: Portion, limits: Limits) -> Portion:
    """Return a portion without the examples dropped by a trainer."""
    path, most = portion.source.path, portion.source.max_examples
    keep, why = limits.learnable(portion.train, portion.form, at_most=most), limits.too_long(portion.form)
    if not keep:
        raise DataError(f"{path}: all {len(portion.train)} examples to train on {why}. Set a larger `max_length`.")
    end = keep[-1] + 1 if len(keep) == most else len(portion.train)  # later ones are more than enough
    _warn_left_out(path, end - len(keep), end, why)
    rest = [*keep, *range(end, len(portion.train))]
    return portion.keeping(portion.train.select(rest), why) if len(rest) < len(portion.train) else portion


def _counts(portion: Portion) -> SourceCounts:
    source, used = portion.source, (len(portion.train), len(portion.heldout))
    left_out = dict(+portion.left_out)
    license = source.license or dataset_license(source)
    return SourceCounts(source.path, source.config, source.split, portion.share, *used, left_out, license)


def require_answers(data: Mapping[str, StageData], baseline: str) -> None:
    """Raise DataError for stages without texts for a baseline."""
    for name in sorted(data):
        if what := (PREFERENCES | SAMPLED).get(data[name].form):
            raise DataError(
                f"baselines: {baseline} needs texts, conversations or prompts, and stage {name} has {what}. Remove "
                f"{baseline} from `baselines`, or leave the stage out."
            )


def documents(data: datasets.Dataset, form: Form, *, chars: int, render: Callable[..., str]) -> list[str]:
    """Return held-out examples as plain documents of at most `chars` characters.

    Args:
        data: the examples.
        form: their form.
        chars: where longer documents are cut.
        render: makes text of a conversation by the tokenizer's chat template, with a row's `template_arguments`.
    """
    return [_as_text(row, form, render)[:chars] for row in rows_of(data)]


def prompts(data: datasets.Dataset, form: Form, *, count: int | None = None) -> list[str]:
    """Return the prompts of examples; of plain texts, the texts."""
    rows = data.select(range(min(count or len(data), len(data))))
    return [_prompt(row, form) for row in rows_of(rows)]


def _prompt(row: Row, form: Form) -> str:
    if form == "text":
        return row["text"]
    turns = row["messages"] if form == "messages" else row["prompt"]
    if isinstance(turns, str):
        return turns
    asked = itertools.takewhile(lambda turn: turn["role"] != "assistant", turns)
    return "\n".join(str(turn["content"]) for turn in asked)


def require_chat_template(tokenizer: Any) -> None:
    """Raise ModelError if a tokenizer cannot make text of conversations."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, which a stage with `messages` needs. "
            "Set `train.chat_template_path`, or give the stage `prompt` and `completion`, or `text`."
        )


def task_rows(task: Task) -> list[Row]:
    """Return the rows of a task's dataset, in task file columns.

    Raises as `load_stage_data`.
    """
    assert task.dataset is not None
    if task.kind == "perplexity":
        fit = _examples(task.dataset, seed=0, at_most=task.dataset.heldout)
        if fit.form != "text":
            raise DataError(f"{task.dataset.path}: a perplexity task needs text; name its column with `text`.")
        chosen = fit.rows.select(range(min(task.dataset.heldout or len(fit.rows), len(fit.rows))))
        return [{"text": r["text"][: task.dataset.heldout_chars]} for r in rows_of(chosen)]
    rows = load_rows(task.dataset)
    questions = asked_of(task, rows)
    _tell_unused(task.dataset, questions.unused)
    made = list(questions.made())
    asked = [row for row in made if row]
    _tell_left_out(task.dataset, Counter({"lack the question or the answer": len(made) - len(asked)}), len(made))
    return asked


def _examples(spec: DataSource, *, seed: int, at_most: int, limits: Limits | None = None) -> Fit:
    """Return a dataset's usable examples, shuffled; `at_most` of a stream (0: all)."""
    if not spec.streaming:
        whole = load_rows(spec)
        fit = fit_rows(whole, spec, limits)
        _tell_unused(spec, fit.unused)
        _tell_left_out(spec, fit.left_out, len(whole))
        # In memory, or the order is written beside the user's files.
        return replace(fit, rows=fit.rows.shuffle(seed=seed, keep_in_memory=True))
    examples: list[Row] = []
    left_out, read, reader = Counter[str](), 0, None
    for part in stream_rows(spec, seed=seed):
        told = reader.layout.unused if reader else ()
        reader = next_part(reader, part) if reader else Examples(part, spec, layout_of(part, spec, limits), limits)
        _tell_unused(spec, reader.layout.unused[len(told) :])
        usable, others = fit_part(reader)
        examples += usable
        left_out, read = left_out + others, read + len(part)
        if at_most and len(examples) >= at_most:
            break
    _tell_left_out(spec, left_out, read)
    assert reader
    extras = reader.layout.extras  # earlier parts may lack some of them
    whole = [row | {name: row.get(name) for name in extras} for row in examples[: at_most or None]]
    return Fit(reader.layout.form, dataset_of(whole), left_out, reader.layout.unused)


def _tell_unused(spec: DataSource, columns: Sequence[str]) -> None:
    """Report columns without a use."""
    if columns:
        LOG.info("%s: these columns are not used: %s", spec.path, ", ".join(columns))


def _tell_left_out(spec: DataSource, left_out: Counter[str], read: int) -> None:
    """Report unusable rows. Raises DataError if no row is left."""
    for reason, count in left_out.items():
        _warn_left_out(spec.path, count, read, reason)
    if left_out.total() < read:
        return
    lengths = [reason for reason, count in left_out.items() if count and reason.startswith("have not")]
    if lengths:
        raise DataError(f"{spec.path} (split {spec.split}) has no example that is left: {read} {lengths[0]}.")
    raise empty(spec)


def _tell_chosen(sources: Sequence[SourceCounts]) -> None:
    """Report usable rows left untrained."""
    for source in sources:
        for sentence in source.sentences():
            if " for they are " in sentence:  # others are warnings
                LOG.info("%s", sentence)


def _warn_left_out(path: str, count: int, read: int, why: str) -> None:
    if count:
        LOG.warning("%s: %d of %d rows are left out, for they %s", path, count, read, why)


def not_held_out(train: datasets.Dataset, form: Form, heldout: datasets.Dataset, heldout_form: Form) -> list[int]:
    """Return the places of examples without a held-out twin.

    Memorised documents measure nothing. A twin has the same words or turns, in other columns or with other spaces too.
    """
    held = {_words(row, heldout_form) for row in rows_of(heldout)}
    return [i for i, row in enumerate(rows_of(train)) if _words(row, form) not in held]


def _words(row: Row, form: Form) -> str:
    """Return what two examples of one document have in common."""
    parts = [_bare(row[column]) for column in _MEASURED[form]]
    turns = [part for part in parts if not isinstance(part, str)]
    document = list(itertools.chain.from_iterable(turns)) if turns else "".join(parts)
    return json.dumps([document, template_arguments(row)], sort_keys=True)


def _bare(value: Any) -> Any:
    """Return a value without spaces and empty fields.

    A column has empty fields where another row has a value.
    """
    if isinstance(value, str):
        return "".join(value.split())
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def _as_text(row: Row, form: Form, render: Callable[..., str]) -> str:
    if form == "messages":
        return render(row["messages"], **template_arguments(row))
    if form == "prompts":
        return _with_answer(row, render)
    if form == "prompt_completion" or form in (*PREFERENCES, *SAMPLED):
        prompt, completion = (row[column] for column in _MEASURED[form])
        return (
            prompt + completion
            if isinstance(prompt, str)
            else render([*prompt, *completion], **template_arguments(row))
        )
    return row["text"]


def _with_answer(row: Row, render: Callable[..., str]) -> str:
    """Return a prompt with the first column that rewards read, the answer."""
    prompt, *answers = row.values()
    if isinstance(prompt, str):
        return prompt + "".join(answers[:1])
    return render([*prompt, *({"role": "assistant", "content": answer} for answer in answers[:1])])
