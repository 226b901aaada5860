"""The forgetting budget: losses of a merge against earlier scores.

Judged on validation documents alone: the test documents, used for reporting, decide nothing. Accuracies (shares) and
perplexities (nats) are never averaged: each group of tasks has one loss per block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_contmerge.run.recipe.parts import Guard
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.scores import BLOCKS, Block, Scores
from hf_contmerge.scoring.forgetting.paired import Change, exceeds, flips, mean_change, one_sided

GENERAL = "general"
_UNITS: dict[Block, str] = {"accuracy": "of accuracy", "perplexity": "nats"}


@dataclass(frozen=True)
class Shift:
    """Change of one block in a group of tasks."""

    group: str
    """`general`, or the stage's name."""
    block: Block
    change: Change
    """Utility now - then, paired on the same documents."""
    lost: bool = False
    """The change counts documents that went from right to wrong; else it is the mean's."""
    tasks: tuple[str, ...] = ()
    """The tasks of the group in this block."""

    @property
    def where(self) -> str:
        return "the general tasks" if self.group == GENERAL else f"stage {self.group}"

    def to_json(self) -> dict[str, Any]:
        """Return the change for records.

        `mean`, `low` and `high` are negative for a loss.
        """
        change = self.change
        return {
            "group": self.group, "block": self.block, "mean": change.mean, "low": change.low, "high": change.high,
            "confidence": change.confidence, "detectable": change.detectable, "lost": self.lost,
        }  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """A merged model's losses against references, and its newest stage's gains."""

    held: bool
    losses: tuple[Shift, ...]
    """One-sided intervals with the guard's confidence jointly."""
    gains: tuple[Shift, ...]
    """The newest stage against the base: exposes a merge that forgets nothing and learns nothing."""

    @property
    def worst(self) -> Shift | None:
        """The loss furthest outside the noise; None without comparisons."""
        return max(self.losses, key=_sure_drop, default=None)

    @property
    def drop(self) -> float:
        """The largest measured drop, significant or not; 0 without comparisons.

        It ranks merges.
        """
        return max((-s.change.mean for s in self.losses), default=0.0)

    @property
    def doubtful(self) -> Shift | None:
        """The loss whose confidence interval reaches furthest down.

        A loss without interval counts as furthest. None without comparisons.
        """
        return min(self.losses, key=lambda s: -math.inf if s.change.low is None else s.change.low, default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "held": self.held,
            "losses": [s.to_json() for s in self.losses],
            "gains": [s.to_json() for s in self.gains],
        }

    def in_words(self, guard: Guard) -> str:
        """Describe the worst loss, its size and its certainty."""
        worst, doubtful = self.worst, self.doubtful
        if worst is None or doubtful is None:
            return "no comparison possible"
        sure = _sure_drop(worst)
        words = f"{worst.where} {_moved(worst)}"
        if sure > 0:
            words += f", at least {sure:.4g} with {guard.confidence:.0%} confidence"
        elif worst.change.sign == 0 and not _explained(worst):
            words += ", within the noise"
        if doubtful.change.low is None:
            words += f"; too few documents to measure the loss on {doubtful.where}"
        elif sure <= 0 and doubtful.change.low < 0:
            lost = f"{-doubtful.change.low:.4g} {_UNITS[doubtful.block]} on {doubtful.where}"
            words += f"; a loss of {lost} cannot be ruled out"
        return words + self._uncounted(guard)

    def _uncounted(self, guard: Guard) -> str:
        """Name the accuracies that `measure: lost` cannot count."""
        means = [s for s in self.losses if guard.measure == "lost" and s.block == "accuracy" and not s.lost]
        tasks = ", ".join(dict.fromkeys(task for s in means for task in s.tasks))
        return (
            f"; by the mean, because answers are not simply right or wrong, or their chance is unknown: {tasks}"
            * bool(tasks)
        )


def judge(
    now: Scores, base: Scores, references: Mapping[str, Scores], recipe: Recipe, guard: Guard, stages: Sequence[str]
) -> Judgement:
    """Judge a merged model on validation documents.

    Args:
        now: its scores.
        base: scores of the base model, the reference of the general tasks.
        references: earlier stage -> scores of this merge right after learning the stage.
        recipe: assigns tasks to stages.
        guard: the budget.
        stages: names of all stages so far, newest last; the newest cannot be forgotten yet.

    Raises:
        RunError: two scores were measured on different documents.
    """
    tasks = {stage.name: stage.task_names() for stage in recipe.stages}
    watched: list[tuple[str, Scores, Sequence[str]]] = []
    if "general" in guard.on:
        watched.append((GENERAL, base, recipe.evaluate.general_names))
    if "stages" in guard.on:
        watched += [(name, references[name], tasks[name]) for name in stages[:-1]]
    changes = [shift for group, then, names in watched for shift in _losses(group, now, then, names, guard.measure)]
    shown = one_sided([s.change for s in changes], guard.confidence)
    losses = tuple(replace(s, change=change) for s, change in zip(changes, shown, strict=True))
    held = not exceeds([s.change for s in changes], guard.max_forgetting, guard.confidence)
    return Judgement(held, losses, tuple(shifts(stages[-1], now, base, tasks[stages[-1]])))


def shifts(group: str, now: Scores, then: Scores, tasks: Sequence[str]) -> list[Shift]:
    """Return the mean change over tasks, by block."""
    changes: list[Shift] = []
    for block in BLOCKS:
        change = mean_change([(now, then, tasks)], block)
        if change is not None:
            here = tuple(t for t in tasks if t in now and now[t].block == block)
            changes.append(Shift(group, block, change, tasks=here))
    return changes


def _losses(group: str, now: Scores, then: Scores, tasks: Sequence[str], measure: str) -> list[Shift]:
    """Return the guard's measure: changes of the mean, or lost documents.

    Tasks whose documents cannot be counted keep the mean.
    """
    counted = [t for t in tasks if flips([(now, then, [t])], "wrong")] if measure == "lost" else []
    lost = flips([(now, then, counted)], "wrong")
    changes = [Shift(group, "accuracy", lost, lost=True, tasks=tuple(counted))] if lost else []
    return changes + shifts(group, now, then, [t for t in tasks if t not in counted])


def _explained(shift: Shift) -> bool:
    """Say if guessing explains all documents that went wrong."""
    return shift.lost and shift.change.mean >= 0


def _moved(shift: Shift) -> str:
    """Return a change in words, without its certainty."""
    if _explained(shift):
        return "lost no more right answers than guessing explains"
    verb = "gained" if shift.change.mean > 0 else "lost"
    return f"{verb} {abs(shift.change.mean):.4g} {_UNITS[shift.block]}"


def _sure_drop(shift: Shift) -> float:
    """Return the drop at the interval's upper end; negative if uncertain."""
    return -shift.change.high if shift.change.high is not None else -math.inf
