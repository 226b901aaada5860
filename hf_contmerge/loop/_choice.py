"""Choice of a merge by scores: `auto`, the guard's ladder.

Only validation documents are used, and the record lists every attempt. A killed run repeats its attempts with the same
outcome: scores come from the cache, and retrained experts are stored in the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_contmerge.errors import BudgetError
from hf_contmerge.loop._earlier import drop_earlier, earlier_steps, expert_at
from hf_contmerge.loop._job import MergeJob
from hf_contmerge.loop._replay import can_replay, replay
from hf_contmerge.loop.inputs import check_model_of
from hf_contmerge.loop.stages import measure_at
from hf_contmerge.merge_rules import yaml_word
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge
from hf_contmerge.merging.rules import make_rule
from hf_contmerge.models.survival import Survival
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.parts import Guard, Rung, Task
from hf_contmerge.run.scores import Scores, load_scores
from hf_contmerge.runtime.files import remove
from hf_contmerge.runtime.records import write_record
from hf_contmerge.scoring.forgetting.budget import GENERAL, Judgement, judge
from hf_contmerge.scoring.forgetting.paired import CONFIDENCE
from hf_contmerge.scoring.forgetting.search import (
    Kept,
    Point,
    allowed,
    best_point,
    largest_that_holds,
    objective,
    what_is_kept,
)

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """A merge and its evaluation.

    All fields are equal on all ranks, except `scores`, which only rank 0 has.
    """

    what: str
    """`fold` (the recipe's merge), `auto`, or a rung of the ladder."""
    merge: RunningMerge
    stages: tuple[int, ...]
    """Numbers of the merged stages."""
    judgement: Judgement | None
    objective: float | None
    kept: Kept
    """Of the general tasks."""
    utilities: dict[str, float]
    seconds: float
    scores: Scores = field(repr=False)
    at_most: float = math.inf
    """Largest drop allowed in the measured mean. Without it, the search for the largest factor would stop where noise
    barely hides a broken budget."""

    @property
    def held(self) -> bool:
        return self.judgement is None or (self.judgement.held and self.drop <= self.at_most)

    @property
    def drop(self) -> float:
        return self.judgement.drop if self.judgement else 0.0

    def to_json(self, keeps_general: bool) -> dict[str, Any]:
        merge = self.merge
        return {
            "what": self.what, "rule": merge.rule_name, "parameters": merge.rule.parameters(),
            "factor": merge.factor, "scale": merge.scale, "stages": list(self.stages),
            **({"step": step} if (step := merge.experts[-1].earlier if merge.experts else 0) else {}),
            "utilities": self.utilities, "objective": self.objective, "keeps_general": keeps_general,
            **(self.judgement.to_json() if self.judgement else {}),
            "held": self.held if self.judgement else None, "seconds": self.seconds,
        }  # fmt: skip


def _as_json(tries: Sequence[Attempt]) -> list[dict[str, Any]]:
    return [t.to_json(keeps) for t, keeps in zip(tries, allowed(t.kept for t in tries), strict=True)]


@dataclass(frozen=True)
class Choice:
    """The chosen merge and all attempts."""

    taken: Attempt
    tripped: bool
    """Whether the first attempt broke the budget."""
    tries: tuple[Attempt, ...]
    survival: Survival | None = None
    """What the chosen model's file keeps of the update; None in runs of older versions."""

    def to_json(self, guard: Guard | None) -> dict[str, Any]:
        """Return the fields for the merge record."""
        tries = zip(_as_json(self.tries), self.tries, strict=True)
        record: dict[str, Any] = {"tries": [{**row, "taken": t is self.taken} for row, t in tries]}
        if guard and self.taken.judgement:
            record["guard"] = {
                "settings": guard.model_dump(mode="json"), "tripped": self.tripped, "taken": self.taken.what,
                "drop": self.taken.drop, **self.taken.judgement.to_json(),
            }  # fmt: skip
        return record


def choose(job: MergeJob, guard: Guard | None) -> Choice:
    """Fold the stage's expert within the budget.

    The chosen state and model are left in the scratch folders.

    Raises:
        BudgetError: no merge of the ladder holds the guard's budget. guard.json lists the attempts.
    """
    chooser = Chooser(job, guard)
    first = chooser.first()
    taken = first if first.held else chooser.climb()
    if taken is None:
        chooser.give_up()
    assert taken is not None
    survival = chooser.write(taken.merge)
    newest = taken.merge.experts[-1:]
    job.crew.ranks.first(drop_earlier, job, but=newest[0].earlier if newest else 0)
    return Choice(taken, not first.held, tuple(chooser.tries), survival)


class Chooser:
    """Tries merges of one entry at one stage.

    Rank 0 evaluates and broadcasts, so that all ranks take the same steps.
    """

    def __init__(self, job: MergeJob, guard: Guard | None) -> None:
        self._job, self._guard = job, guard
        self.tries: list[Attempt] = []
        self._written: RunningMerge | None = None
        self._survival: Survival | None = None
        self._elsewhere = False
        """Whether the scratch folder holds another state than that of `_merge`."""
        run = job.run
        numbers = range(1, job.t + 1)
        self._stages = [run.stage(i).name for i in numbers]
        self._tasks = list(run.recipe.measured(numbers))
        self._base = self._measured(run.base, job.prepared.base, self._tasks)
        self._references: dict[str, Scores] = {}
        for i in numbers[:-1] if guard and "stages" in guard.on else ():
            place = run.merged(i, job.place.entry)
            self._references[run.stage(i).name] = self._measured(place, place.model, self._tasks_of(i))
        self._alone: dict[str, Scores] = {}

    def first(self) -> Attempt:
        """Fold by the recipe; search an `auto` coefficient."""
        job, entry = self._job, self._job.place.entry
        self._merge = self._first = start = self._fold(job.start(), [job.newest()])
        if not entry.auto or start.rule_name != entry.rule:
            return self._look_at("fold", start)
        for i in range(1, job.t + 1):
            place = job.run.expert(i, job.kind)
            self._alone[job.run.stage(i).name] = self._measured(place, place.model, self._tasks_of(i))
        rule = start.rule
        asked = [f for f in rule.searchable() if yaml_word(f) in entry.auto]
        names = [f for f in asked if rule.of_newest.get(f, 1) <= job.t]
        tops = [max(1.0, 2 * getattr(rule, f)) if f in rule.tunable else 1.0 for f in names]

        def evaluate(point: Point) -> tuple[Kept, float]:
            attempt = self._look_at("auto", self._at(start, dict(zip(names, point, strict=True))))
            assert attempt.objective is not None
            return attempt.kept, attempt.objective

        best = dict(zip(names, best_point(evaluate, tops), strict=True))
        self._merge = self._first = self._at(start, best)
        return next(t for t in self.tries if t.merge == self._merge)

    def _at(self, start: RunningMerge, values: Mapping[str, float]) -> RunningMerge:
        """Return the stage's merge with other values of `searchable` fields.

        It is folded again if `update` reads one of them.
        """
        job, chosen = self._job, {f: v for f, v in values.items() if f in start.rule.of_newest}
        rule = replace(start.rule, **values)
        if not chosen:
            return replace(start, rule=rule)
        if self._written and self._written.rule == rule:  # the scratch folders hold it
            return self._written
        newest = replace(job.newest(), chosen={yaml_word(f): v for f, v in chosen.items()})
        folded = replace(job.start(), rule=rule).fold(
            [newest], job.scratch("running"), merged=job.output(), crew=job.crew
        )
        self._written, self._survival = folded, folded.survival
        return folded

    def climb(self) -> Attempt | None:
        """Return the first rung within the budget, or None."""
        assert self._guard
        for rung in self._guard.ladder:
            climb = {"shrink": self._shrink, "rule": self._other_rule, "replay": self._replay, "earlier": self._earlier,
                     "keep_previous": self._keep_previous}[rung.do]  # fmt: skip
            attempt = climb(rung)
            if attempt and attempt.held:
                return attempt
        return None

    def write(self, merge: RunningMerge) -> Survival | None:
        """Write a merge into the scratch folder, once; return the update kept."""
        if self._written != merge:
            self._survival = merge.export(self._job.output(), crew=self._job.crew)
            self._written = merge
        return self._survival

    def give_up(self) -> None:
        """Write guard.json, remove the scratch folders and raise BudgetError."""
        self._job.crew.ranks.first(self._raise)

    # Rungs

    def _shrink(self, rung: Rung) -> Attempt | None:
        if self._elsewhere:  # the scratch folder holds another state
            self._merge = self._with(self._job.newest())
        whole = self._merge

        def evaluate(factor: float) -> tuple[bool, float]:
            attempt = self._look_at(rung.do, whole.scaled(factor))
            return attempt.held, attempt.drop

        factor = largest_that_holds(evaluate)
        return next(t for t in self.tries if t.merge == whole.scaled(factor)) if factor else None

    def _other_rule(self, rung: Rung) -> Attempt:
        assert rung.rule
        job, rule = self._job, make_rule(rung.rule, rung.parameters, where="guard.ladder")
        empty = RunningMerge(job.prepared.base, rung.rule, rule)
        experts = [replace(e, chosen={}) for e in (*job.previous().experts, job.newest())]
        self._merge = self._fold(empty, experts)
        return self._look_at(rung.do, self._merge)

    def _replay(self, rung: Rung) -> Attempt | None:
        if not can_replay(self._job):
            return None
        self._merge = self._with(replay(self._job, rung))
        return self._look_at(rung.do, self._merge)

    def _earlier(self, rung: Rung) -> Attempt | None:
        """Try the stage's earlier steps, the latest first.

        If none holds, the rungs after this one go on from the last step.
        """
        attempt = None
        for step in earlier_steps(self._job):
            attempt = self._look_at(rung.do, self._with(expert_at(self._job, step)))
            self._elsewhere = True
            self._job.crew.ranks.first(drop_earlier, self._job, but=step)
            if attempt.held:
                break
        return attempt

    def _keep_previous(self, rung: Rung) -> Attempt:
        job, start = self._job, time.monotonic()
        self._written = self._merge = kept = job.keep_previous()
        self._survival, before = kept.survival, job.place_before
        place, model = (before, before.model) if before else (job.run.base, job.prepared.base)
        return self._judged(rung.do, self._merge, self._measured(place, model, self._tasks), start)

    def _with(self, expert: FoldedExpert) -> RunningMerge:
        """Fold another expert of the stage, with the values found before."""
        found = self._first
        start = replace(self._job.start(), rule_name=found.rule_name, rule=found.rule)
        return self._fold(start, [replace(expert, chosen=found.experts[-1].chosen)])

    def _fold(self, merge: RunningMerge, new: Sequence[FoldedExpert]) -> RunningMerge:
        self._written, self._elsewhere = None, False  # the written model is of another state
        return merge.fold(new, self._job.scratch("running"), crew=self._job.crew)

    # Evaluation

    def _look_at(self, what: str, merge: RunningMerge) -> Attempt:
        start = time.monotonic()
        self.write(merge)
        scores = self._job.measuring.measure(self._job.place.folder / ".merged", self._tasks)[1]
        return self._judged(what, merge, scores, start)

    def _measured(self, place: Place, model: Path, tasks: Sequence[Task]) -> Scores:
        """Return a model's validation scores on rank 0."""
        check = partial(check_model_of, self._job.run, place, model)
        measure_at(place.validation, model, tasks, self._job.measuring, check=check)
        return load_scores(place.validation) if self._job.recorder.is_main else {}

    def _judged(self, what: str, merge: RunningMerge, scores: Scores, start: float) -> Attempt:
        recipe = self._job.run.recipe
        general = recipe.evaluate.general_names
        base, confidence = self._base, self._guard.confidence if self._guard else CONFIDENCE

        def find() -> tuple[Judgement | None, float | None, Kept, dict[str, float]]:
            judgement, share = None, None
            if self._guard:
                judgement = judge(scores, base, self._references, recipe, self._guard, self._stages)
            if self._alone:
                names = {s.name: s.task_names() for s in recipe.stages if s.name in self._alone}
                share = objective(scores, base, self._alone, names)
            utilities = {t.name: scores[t.name].utility for t in self._tasks}
            return judgement, share, what_is_kept(scores, base, {GENERAL: general}, confidence), utilities

        judgement, share, kept, utilities = self._job.crew.ranks.first(find)
        seconds = round(time.monotonic() - start, 2)
        at_most = self._guard.max_forgetting if self._guard and what == "shrink" else math.inf
        numbers = tuple(part["stage"] for part in self._job.parts(merge))
        attempt = Attempt(what, merge, numbers, judgement, share, kept, utilities, seconds, scores, at_most)
        self.tries.append(attempt)
        if self._job.recorder.is_main:
            self._log(attempt)
        return attempt

    def _tasks_of(self, t: int) -> list[Task]:
        return list(self._job.run.recipe.measured([t], general=False))

    # Messages

    def _log(self, attempt: Attempt) -> None:
        where = f"merge {self._job.place.folder.relative_to(self._job.run.folder / 'stages')}"
        parts = [f"{where}: {attempt.what}, scale {attempt.merge.scale:.4g}"]
        if attempt.objective is not None:
            parts.append(f"{attempt.objective:.3f} of the experts' gain")
        if attempt.judgement and self._guard:
            words = attempt.judgement.in_words(self._guard) if attempt.judgement.losses else "no earlier tasks"
            parts.append(f"{'within' if attempt.held else 'over'} the budget: {words}")
        LOG.info("%s", "; ".join(parts))

    def _raise(self) -> None:
        guard, place = self._guard, self._job.place
        assert guard
        tries = _as_json(self.tries)
        best = min(self.tries, key=lambda t: t.drop)
        report = {"settings": guard.model_dump(mode="json"), "tries": tries, "best": self.tries.index(best)}
        write_record(place.guard_file, report)
        for name in (".running", ".merged", "earlier"):
            remove(place.folder / name)
        raise BudgetError(self._failure(guard, best, place.guard_file))

    def _failure(self, guard: Guard, best: Attempt, file: Path) -> str:
        first = next(t for t in self.tries if not t.held)
        assert first.judgement
        assert best.judgement
        tried = ", ".join(dict.fromkeys(t.what for t in self.tries if t.what not in ("fold", "auto"))) or "no rung"
        entry, stage = self._job.place.entry.name, self._stages[-1]
        return (
            f"The merge {entry} of stage {stage} forgets more than guard.max_forgetting allows "
            f"({guard.max_forgetting:g}): {first.judgement.in_words(guard)}. Tried: {tried}. Best: {best.what} with "
            f"scale {best.merge.scale:.4g}, {best.judgement.in_words(guard)}. Details: {file}. Earlier phases are "
            "kept. Extend guard.ladder (keep_previous leaves this expert out) or raise guard.max_forgetting, then "
            "rerun the command."
        )
