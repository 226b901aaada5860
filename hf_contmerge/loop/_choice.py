"""Choosing a merge by scores: the coefficient that is `auto`, and the ladder that a broken forgetting budget climbs.

Only validation documents are looked at, and all that was tried is told in the record. A run that was killed in the
middle tries again from the start, with the same outcome: the scores are in the cache, and an expert that was trained
again is in the run.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_contmerge.errors import BudgetError
from hf_contmerge.loop.stages import Bench
from hf_contmerge.merge_rules import yaml_word
from hf_contmerge.merging.state import Folded
from hf_contmerge.run.recipe.parts import Guard, Rung, Task
from hf_contmerge.run.scores import Scores
from hf_contmerge.runtime.files import remove, write_atomically
from hf_contmerge.scoring.forgetting.budget import Judgement, judge
from hf_contmerge.scoring.forgetting.paired import CONFIDENCE
from hf_contmerge.scoring.forgetting.search import best_coefficient, keeps_general, largest_that_holds, objective

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Try:
    """A merge that was looked at. What was found of it is the same on all ranks; `scores` are the main process's."""

    what: str
    """`fold` (as the recipe says), `auto`, or a rung of the ladder."""
    folded: Folded
    judgement: Judgement | None
    objective: float | None
    allowed: bool
    """Whether the general tasks are where the base has them, within the noise."""
    utilities: dict[str, float]
    seconds: float
    scores: Scores = field(repr=False)
    at_most: float = math.inf
    """The largest drop that may be measured, noise or not. The search for the largest factor would else end where the
    noise just hides that the budget is broken."""

    @property
    def held(self) -> bool:
        return self.judgement is None or (self.judgement.held and self.drop <= self.at_most)

    @property
    def drop(self) -> float:
        return self.judgement.drop if self.judgement else 0.0

    def to_json(self) -> dict[str, Any]:
        folded = self.folded
        return {
            "what": self.what, "rule": folded.rule_name, "parameters": folded.rule.parameters(),
            "factor": folded.factor, "scale": folded.scale, "stages": [s.stage for s in folded.sources],
            "utilities": self.utilities, "objective": self.objective, "keeps_general": self.allowed,
            **(self.judgement.to_json() if self.judgement else {}),
            "held": self.held if self.judgement else None, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The merge that is taken, whether the first one broke the budget, and all that were looked at."""

    taken: Try
    tripped: bool
    tries: tuple[Try, ...]

    def to_json(self, guard: Guard | None) -> dict[str, Any]:
        """Return what the merge record says of it."""
        record: dict[str, Any] = {"tries": [{**t.to_json(), "taken": t is self.taken} for t in self.tries]}
        if guard and self.taken.judgement:
            record["guard"] = {
                "settings": guard.model_dump(mode="json"), "tripped": self.tripped, "taken": self.taken.what,
                "drop": self.taken.drop, **self.taken.judgement.to_json(),
            }  # fmt: skip
        return record


def choose(bench: Bench, guard: Guard | None) -> Choice:
    """Fold the stage's expert, and choose how the merge is read out; its state and model are in the scratch folders.

    Raises BudgetError if no merge of the ladder holds the guard's budget: what was tried is in guard.json then.
    """
    chooser = Chooser(bench, guard)
    first = chooser.first()
    taken = first if first.held else chooser.climb()
    if taken is None:
        chooser.give_up()
    assert taken is not None
    chooser.write(taken.folded)
    return Choice(taken, not first.held, tuple(chooser.tries))


class Chooser:
    """Tries merges of one entry at one stage. All ranks take the same steps, on what the main process has found."""

    def __init__(self, bench: Bench, guard: Guard | None) -> None:
        self._bench, self._guard = bench, guard
        self.tries: list[Try] = []
        self._written: Folded | None = None
        run = bench.run
        numbers = range(1, bench.t + 1)
        self._stages = [run.stage(i).name for i in numbers]
        self._tasks = list(run.recipe.measured(numbers))
        self._base = bench.measured(run.base, bench.prepared.base, self._tasks)
        self._references: dict[str, Scores] = {}
        for i in numbers[:-1] if guard and "stages" in guard.on else ():
            place = run.merged(i, bench.place.entry)
            self._references[run.stage(i).name] = bench.measured(place, place.model, self._tasks_of(i))
        self._alone: dict[str, Scores] = {}

    def first(self) -> Try:
        """Fold as the recipe says, find the coefficient if it is `auto`, and return what that gives."""
        bench, entry = self._bench, self._bench.place.entry
        self._folded = bench.fold([*bench.sources_before(), bench.source(bench.t)], newest_only=True)
        self._written = None
        if not entry.auto or self._folded.rule_name != entry.rule:
            return self._look_at("fold", self._folded)
        for i in range(1, bench.t + 1):
            place = bench.run.expert(i, bench.kind)
            self._alone[bench.run.stage(i).name] = bench.measured(place, place.model, self._tasks_of(i))
        rule, start = self._folded.rule, self._folded
        name = next(f for f in rule.tunable if yaml_word(f) == entry.auto)

        def attempt(value: float) -> tuple[bool, float]:
            found = self._look_at("auto", start.tuned(name, value))
            assert found.objective is not None
            return found.allowed, found.objective

        self._folded = start.tuned(name, best_coefficient(attempt, getattr(rule, name)))
        return next(t for t in self.tries if t.folded == self._folded)

    def climb(self) -> Try | None:
        """Return the first merge of the ladder that holds; None if none does."""
        assert self._guard
        for rung in self._guard.ladder:
            climbed = {"shrink": self._shrink, "rule": self._other_rule, "replay": self._replay,
                       "keep_previous": self._keep_previous}[rung.do]  # fmt: skip
            found = climbed(rung)
            if found and found.held:
                return found
        return None

    def write(self, folded: Folded) -> None:
        """Write a merge into the scratch folder, unless it is there."""
        if self._written != folded:
            self._bench.write(folded)
            self._written = folded

    def give_up(self) -> None:
        """Raise BudgetError on all ranks, with all scratch removed and what was tried in guard.json."""
        self._bench.crew.ranks.first(self._raise)

    # Rungs

    def _shrink(self, rung: Rung) -> Try | None:
        whole = self._folded

        def attempt(factor: float) -> tuple[bool, float]:
            found = self._look_at(rung.do, whole.scaled(factor))
            return found.held, found.drop

        factor = largest_that_holds(attempt)
        return next(t for t in self.tries if t.folded == whole.scaled(factor)) if factor else None

    def _other_rule(self, rung: Rung) -> Try | None:
        assert rung.rule
        sources = [*self._bench.sources_before(), self._bench.source(self._bench.t)]
        return self._refolded(rung, lambda: self._bench.fold_by(str(rung.rule), rung.parameters, sources))

    def _replay(self, rung: Rung) -> Try | None:
        if not self._bench.can_replay():
            return None
        again = self._bench.replay(rung)
        sources = [*self._bench.sources_before(), again]
        return self._refolded(rung, lambda: self._bench.fold(sources, newest_only=True))

    def _refolded(self, rung: Rung, fold: Callable[[], Folded]) -> Try:
        self._folded = fold()
        self._written = None  # of another state
        return self._look_at(rung.do, self._folded)

    def _keep_previous(self, rung: Rung) -> Try:
        bench, start = self._bench, time.monotonic()
        self._written = self._folded = bench.keep_previous()
        before = bench.before
        place, model = (before, before.model) if before else (bench.run.base, bench.prepared.base)
        return self._judged(rung.do, self._folded, bench.measured(place, model, self._tasks), start)

    # Looking

    def _look_at(self, what: str, folded: Folded) -> Try:
        start = time.monotonic()
        self.write(folded)
        scores = self._bench.measure(self._bench.place.folder / ".merged", self._tasks)
        return self._judged(what, folded, scores, start)

    def _judged(self, what: str, folded: Folded, scores: Scores, start: float) -> Try:
        recipe, general = self._bench.run.recipe, [t.name for t in self._bench.run.recipe.evaluate.general_tasks]
        base, confidence = self._base, self._guard.confidence if self._guard else CONFIDENCE

        def find() -> tuple[Judgement | None, float | None, bool, dict[str, float]]:
            judgement, share = None, None
            if self._guard:
                judgement = judge(scores, base, self._references, recipe, self._guard, self._stages)
            if self._alone:
                names = {s.name: s.task_names() for s in recipe.stages if s.name in self._alone}
                share = objective(scores, base, self._alone, names)
            utilities = {t.name: scores[t.name].utility for t in self._tasks}
            return judgement, share, keeps_general(scores, base, general, confidence), utilities

        judgement, share, allowed, utilities = self._bench.crew.ranks.first(find)
        seconds = round(time.monotonic() - start, 2)
        at_most = self._guard.max_forgetting if self._guard and what == "shrink" else math.inf
        found = Try(what, folded, judgement, share, allowed, utilities, seconds, scores, at_most)
        self.tries.append(found)
        if self._bench.main:
            self._tell(found)
        return found

    def _tasks_of(self, t: int) -> list[Task]:
        return list(self._bench.run.recipe.measured([t], general=False))

    # Telling

    def _tell(self, found: Try) -> None:
        where = f"merge {self._bench.place.folder.relative_to(self._bench.run.folder / 'stages')}"
        parts = [f"{where}: {found.what}, scale {found.folded.scale:.4g}"]
        if found.objective is not None:
            parts.append(f"{found.objective:.3f} of what the experts gained")
        if found.judgement and self._guard:
            words = found.judgement.in_words(self._guard) if found.judgement.losses else "nothing to forget yet"
            parts.append(f"{'holds' if found.held else 'does not hold'}: {words}")
        LOG.info("%s", "; ".join(parts))

    def _raise(self) -> None:
        guard, place = self._guard, self._bench.place
        assert guard
        tries = [t.to_json() for t in self.tries]
        best = min(self.tries, key=lambda t: t.drop)
        report = {"settings": guard.model_dump(mode="json"), "tries": tries, "best": self.tries.index(best)}
        write_atomically(place.guard_file, json.dumps(report, indent=1) + "\n")
        for name in (".running", ".merged"):
            remove(place.folder / name)
        raise BudgetError(self._in_vain(guard, best, place.guard_file))

    def _in_vain(self, guard: Guard, best: Try, file: Path) -> str:
        first = next(t for t in self.tries if not t.held)
        assert first.judgement
        assert best.judgement
        tried = ", ".join(dict.fromkeys(t.what for t in self.tries if t.what not in ("fold", "auto"))) or "nothing else"
        entry, stage = self._bench.place.entry.name, self._stages[-1]
        return (
            f"The merge {entry} of stage {stage} forgets more than guard.max_forgetting allows "
            f"({guard.max_forgetting:g}): {first.judgement.in_words(guard)}. Tried: {tried}; the best, {best.what} "
            f"with scale {best.folded.scale:.4g}: {best.judgement.in_words(guard)}. All of it is in {file}, and what "
            "was done before is as it was. Give the guard a longer ladder (keep_previous leaves this expert out), or a "
            "larger max_forgetting, and the same command again."
        )
