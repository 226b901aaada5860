"""The measurements of a run and their paired changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hf_contmerge.models.survival import Survival
from hf_contmerge.run.folder import evenly_spread
from hf_contmerge.run.places import IN_CONTEXT, JOINT, ORACLE, ROUTED
from hf_contmerge.run.recipe.schema import Stage
from hf_contmerge.run.scores import BLOCKS, Block, Scores, TaskScore
from hf_contmerge.scoring.forgetting.lines import Line
from hf_contmerge.scoring.forgetting.paired import Change, Group, flips, mean_change

SHOWN = 16
"""Stages shown in detail; of more, a page would take minutes to write and to load."""


@dataclass(frozen=True)
class Results:
    """Measurements of a run to date.

    Lines differ in length during a stage.
    """

    stages: tuple[Stage, ...]
    general_tasks: tuple[str, ...]
    experts: tuple[Line, ...]
    merges: tuple[Line, ...]
    mean_of_experts: str | None = None
    """The merge entry with the plain mean of the experts, if any."""
    stored: Mapping[str, Survival] = field(default_factory=dict)
    """What the last model of each merge entry keeps of its update, where it was measured."""
    matters: Mapping[str, float] = field(default_factory=dict)
    """The smallest difference of each block that is one."""
    _values: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _changes: dict[Any, tuple[Sequence[Group], Change | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def shown(self) -> tuple[int, ...]:
        """The stages shown in detail; of a long run, evenly spread ones."""
        return evenly_spread(self.last, SHOWN)

    @property
    def shown_tasks(self) -> tuple[str, ...]:
        """The tasks shown in detail: of these stages, and general ones."""
        stages = self.stages if len(self.stages) <= SHOWN else [self.stages[t - 1] for t in self.shown]
        tasks = [task for stage in stages for task in stage.task_names()]
        return tuple(dict.fromkeys([*tasks, *self.general_tasks]))

    @property
    def base(self) -> Scores:
        return self.merges[0].rows[0]

    @property
    def last(self) -> int:
        """The number of stages with measurements."""
        return max(len(line.rows) for line in (*self.experts, *self.merges)) - 1

    @property
    def baseline(self) -> Line | None:
        """Plain sequential fine-tuning, if this run trains it."""
        return next((line for line in self.experts if line.name == "previous" and len(line.rows) > 1), None)

    @property
    def joint(self) -> Line | None:
        """The expert trained on all stages at once, if it was measured."""
        return self.expert(JOINT)

    def expert(self, name: str) -> Line | None:
        """Return the line of experts with this name, if it was measured."""
        return next((line for line in self.experts if line.name == name), None)

    def lossy(self, line: Line) -> Survival | None:
        """Return a merge's survival, if rounding lost more than a tenth."""
        survival = self.stored.get(line.name) if line in self.merges else None
        return survival if survival and survival.lossy else None

    def named_lines(self) -> list[tuple[str, Line]]:
        """Return all lines by their display names."""
        return [(line_label(x.name), x) for x in self.experts] + [(x.name, x) for x in self.merges]

    def blocks(self) -> list[Block]:
        """Return the measured blocks, perplexity first."""
        return self._blocks_of(lambda _: True)

    def _blocks_of(self, wanted: Callable[[str], bool]) -> list[Block]:
        rows = [row for line in (*self.experts, *self.merges) for row in line.rows]
        found = {score.block for row in rows for task, score in row.items() if wanted(task)}
        return [block for block in reversed(BLOCKS) if block in found]

    def stage_blocks(self) -> list[Block]:
        """Return the blocks with a measured stage."""
        tasks = {task for stage in self.stages for task in stage.task_names()}
        return self._once("stage blocks", lambda: self._blocks_of(tasks.__contains__))

    def learnt(self, line: Line, block: Block) -> Change | None:
        """Return a line's gain at learning time: LA minus the base's average."""
        own = [(line.rows[j], self.base, self.stages[j - 1].task_names()) for j in range(1, len(line.rows))]
        return self.mean_change(own, block)

    def kept(self, line: Line, block: Block) -> Change | None:
        """Return BWT, with its interval."""
        last = line.rows[-1]
        later = [(last, line.rows[j], self.stages[j - 1].task_names()) for j in range(1, len(line.rows) - 1)]
        return self.mean_change(later, block)

    def overall(self, line: Line, other: Line, t: int, block: Block) -> Change | None:
        """Return a line's difference from another after stage t."""
        return self.mean_change([(line.rows[t], other.rows[t], s.task_names()) for s in self.stages[:t]], block)

    def change(self, new: Scores, old: Scores, tasks: Sequence[str], block: Block) -> Change | None:
        """Return the paired change of tasks between two models."""
        return self.mean_change([(new, old, tasks)], block)

    def mean_change(self, groups: Sequence[Group], block: Block) -> Change | None:
        """Return the mean over groups, computed once."""
        measured = [(new, old, _of_block(new, old, tasks, block)) for new, old, tasks in groups]
        key = (block, *((id(new), id(old), tasks) for new, old, tasks in measured))
        if key not in self._changes:  # the entry keeps the scores alive, so that their ids stay theirs
            change = mean_change(measured, block)
            change = replace(change, matters=self.matters.get(block, 0.0)) if change else None
            self._changes[key] = measured, change
        return self._changes[key][1]

    def flips(self, line: Line, t: int, task: str, to: Literal["wrong", "right"]) -> Change | None:
        """Return the share of a task's documents lost or regained."""
        then = line.since(t, task, self.stages)
        change = flips([(line.rows[t], then, [task])], to) if then and task in line.rows[t] else None
        return replace(change, matters=self.matters.get("accuracy", 0.0)) if change else None

    def best(self, block: Block) -> Line | None:
        """Return the merge with the highest final average."""
        return self._once(block, lambda: self._best(block))

    def _once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return a value, computed once."""
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]

    def _best(self, block: Block) -> Line | None:
        far = max(len(line.rows) for line in self.merges)
        scored = [
            (acc, line) for line in self.merges
            if len(line.rows) == far > 1 and (acc := line.matrix(self.stages, block).average(far - 1)) is not None
        ]  # fmt: skip
        return max(scored, key=lambda pair: pair[0])[1] if scored else None


SCOPES = ("all stages", "earlier stages", "last stage", "general")


def scopes(stages: Sequence[Stage], general_tasks: Sequence[str], new: Scores, old: Scores) -> dict[str, list[Group]]:
    """Return the groups to compare two models on, by scope."""
    names: list[Sequence[str]] = [stage.task_names() for stage in stages]
    tasks = (names, names[:-1], names[-1:], [general_tasks])
    return {scope: [(new, old, group) for group in groups] for scope, groups in zip(SCOPES, tasks, strict=True)}


def _of_block(new: Scores, old: Scores, tasks: Sequence[str], block: Block) -> tuple[str, ...]:
    return tuple(t for t in tasks if any(t in scores and scores[t].block == block for scores in (new, old)))


def line_label(kind: str) -> str:
    """Return the name of an expert kind."""
    names = {
        "previous": "fine-tuning alone", "base": "independent experts", JOINT: "joint training",
        ROUTED: "routed experts", ORACLE: "experts with an oracle", IN_CONTEXT: "base with examples in its prompt",
    }  # fmt: skip
    return names.get(kind, f"experts from {kind.removeprefix('merged-')}")


def task_facts(results: Results) -> dict[str, Any]:
    """Return each task's stage, block, metric, documents and base score."""
    of_stage = {task: stage.name for stage in results.stages for task in stage.task_names()}
    facts = {}
    for task in (*of_stage, *results.general_tasks):
        score = any_score(results, task)
        facts[task] = {
            "stage": of_stage.get(task),
            "block": score.block if score else None,
            "metric": score.metric if score else None,
            "documents": len(score.gains) if score else None,
            "base": results.base[task].value if task in results.base else None,
        }
    return facts


def any_score(results: Results, task: str) -> TaskScore | None:
    """Return any score of a task, for its common properties."""
    return next((row[task] for x in (*results.merges, *results.experts) for row in x.rows if task in row), None)
