"""Whether a difference between two models is more than the noise of the documents it was measured on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_contmerge.errors import RunError
from hf_contmerge.task_scores import Block, Sample, Scores, ratio_stderr


@dataclass(frozen=True)
class Change:
    """A paired difference, in the block's utility."""

    mean: float
    stderr: float | None

    @property
    def sign(self) -> int:
        """Return 1 for better, -1 for worse, 0 for no change seen: within two standard errors, or none known."""
        return 0 if self.stderr is None or abs(self.mean) <= 2 * self.stderr else int(math.copysign(1, self.mean))


Group = tuple[Scores, Scores, Sequence[str]]
"""New scores, old scores, and the tasks that are averaged first."""


def mean_change(groups: Iterable[Group], block: Block) -> Change | None:
    """Return the mean change over groups, as ScoreMatrix averages stages; None if a part was not measured.

    Raises:
        RunError: a task was measured on other documents in the two scores.
    """
    found = []
    for new, old, names in groups:
        tasks = [t for t in names if any(t in scores and scores[t].block == block for scores in (new, old))]
        if any(t not in new or t not in old for t in tasks):
            return None
        if tasks:
            found.append([_paired(t, new, old) for t in tasks])
    parts = [(d, e, 1 / len(tasks) / len(found)) for tasks in found for d, e in tasks]
    if not parts:
        return None
    errors = [w * e for _, e, w in parts if e is not None]  # the tasks' documents are independent of each other
    return Change(sum(w * d for d, _, w in parts), math.hypot(*errors) if len(errors) == len(parts) else None)


def _paired(task: str, new: Scores, old: Scores) -> tuple[float, float | None]:
    try:
        return paired_difference(new[task].sample, old[task].sample)
    except ValueError as error:
        raise RunError(
            f"The task {task} was measured on {len(old[task].gains)} documents once and on {len(new[task].gains)} "
            "others later, so the scores cannot be compared. Measure again with `contmerge redo RUN score`."
        ) from error


def paired_difference(new: Sample, old: Sample) -> tuple[float, float | None]:
    """Return utility(new) - utility(old) and its standard error, both measured on the same documents.

    Pairing removes what the documents have in common, so that far smaller changes can be told from noise than by
    comparing two separate standard errors.
    """
    if new.weights != old.weights:
        raise ValueError("the two samples were not measured on the same documents")
    gains = [a - b for a, b in zip(new.gains, old.gains, strict=True)]
    return sum(gains) / sum(new.weights), ratio_stderr(gains, new.weights)
