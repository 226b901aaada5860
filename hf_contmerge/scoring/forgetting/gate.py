"""A gate before a model is replaced, by its losses.

Each task has one paired difference on the same documents, and one interval of which each end holds for all tasks
together. A loss is proven if the whole interval lies below what is allowed, and ruled out if the whole interval lies
above it. Between the two, the documents do not tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hf_contmerge.run.scores import Scores, TaskScore
from hf_contmerge.scoring.forgetting.paired import CONFIDENCE, Change, one_sided, score_change

Verdict = Literal["passes", "proven loss", "undecided"]
_MOST = 1_000_000
"""More documents than this are no advice."""


@dataclass(frozen=True)
class GatedTask:
    """A task's scores of both models, and their paired difference."""

    task: str
    old: TaskScore
    new: TaskScore
    change: Change
    max_loss: float

    @property
    def verdict(self) -> Verdict:
        if self.change.high is not None and self.change.high < -self.max_loss:
            return "proven loss"
        if self.change.low is not None and self.change.low >= -self.max_loss:
            return "passes"
        return "undecided"

    @property
    def documents(self) -> int:
        return len(self.new.gains)

    @property
    def enough(self) -> int | None:
        """The number of documents that would decide, if the mean difference stays.

        None if the task is decided, or no number is in reach. Intervals shrink with the root of the number.
        """
        change = self.change
        if self.verdict != "undecided" or change.low is None or change.high is None:
            return None
        margin = change.mean + self.max_loss
        reach = change.mean - change.low if margin > 0 else change.high - change.mean
        if abs(margin) * math.sqrt(_MOST) <= reach * math.sqrt(self.documents):
            return None
        return math.ceil(self.documents * (reach / margin) ** 2)


@dataclass(frozen=True)
class Gate:
    """The verdict on a candidate, task by task."""

    base: str
    candidate: str
    tasks: tuple[GatedTask, ...]
    max_loss: float
    confidence: float
    same_model: bool = False
    """Both are one model, byte for byte: nothing can be lost."""

    @property
    def verdict(self) -> Verdict:
        if self.same_model:
            return "passes"
        if self.having("proven loss"):
            return "proven loss"
        return "undecided" if self.having("undecided") else "passes"

    def having(self, verdict: Verdict) -> list[GatedTask]:
        """Return the tasks with a verdict."""
        return [task for task in self.tasks if task.verdict == verdict]


def judge_tasks(old: Scores, new: Scores, max_loss: float, confidence: float = CONFIDENCE) -> tuple[GatedTask, ...]:
    """Judge each task of both models.

    Args:
        old: the scores of the base.
        new: the candidate's, on the same documents.
        max_loss: the drop that is allowed on each task: a share of accuracy, or nats.
        confidence: of all verdicts together.

    Raises:
        RunError: a task was measured on different documents.
    """
    names: Iterable[str] = [task for task in old if task in new]
    changes = one_sided([score_change(task, new[task], old[task]) for task in names], confidence)
    return tuple(GatedTask(t, old[t], new[t], change, max_loss) for t, change in zip(names, changes, strict=True))
