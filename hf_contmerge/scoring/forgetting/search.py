"""Searching one number with few tries: how far a merge must shrink to hold a budget, and which coefficient is best.

Every try costs one pass over the state and one scoring of the validation documents; nothing is trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hf_contmerge.run.scores import BLOCKS, Scores
from hf_contmerge.scoring.forgetting.budget import GENERAL, shifts
from hf_contmerge.scoring.forgetting.paired import exceeds, mean_change

T = TypeVar("T")

_HALVINGS = 3  # 1/2, 1/4, 1/8: a smaller share of a merge is hardly one
_BISECTIONS = 2
_COARSE, _REFINED = 4, 2  # tries: four over the range, then twice two beside the best


def largest_that_holds(attempt: Callable[[float], tuple[bool, float]]) -> float | None:
    """Return the largest factor below 1 that holds, as far as a few tries can tell; None if none was found.

    It halves from 1 until one holds, and then halves the gap to the last that did not. Where a smaller factor loses
    more than the one before it, the search ends: what is lost is what the merge had learnt, and shrinking loses more.

    Args:
        attempt: tries a factor; returns whether it holds, and its largest drop.
    """
    below, above, last = None, 1.0, float("inf")
    for halving in range(1, _HALVINGS + 1):
        factor = 0.5**halving
        held, drop = attempt(factor)
        if held:
            below = factor
            break
        if drop >= last:
            return None
        above, last = factor, drop
    if below is None:
        return None
    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        below, above = (middle, above) if attempt(middle)[0] else (below, middle)
    return below


def best_coefficient(attempt: Callable[[float], tuple[bool, float]], default: float) -> float:
    """Return the coefficient with the highest objective of those that are allowed, or of all if none is.

    Four tries over (0, max(1, 2 * default)], then two beside the best at half the distance, and two at a quarter.

    Args:
        attempt: tries a coefficient; returns whether it is allowed, and its objective.
        default: the rule's own coefficient.
    """
    top = max(1.0, 2 * default)
    step = top / _COARSE
    tried: dict[float, tuple[bool, float]] = {}

    def look_at(values: Sequence[float]) -> float:
        for value in (_rounded(v) for v in values):
            if value > 0 and value not in tried:
                tried[value] = attempt(value)
        return max(tried, key=lambda v: (*tried[v], -v))  # of equals, the one that changes the model least

    best = look_at([step * i for i in range(1, _COARSE + 1)])
    for _ in range(_REFINED):
        step /= 2
        best = look_at([best - step, best + step])
    return best


def objective(now: Scores, base: Scores, alone: Mapping[str, Scores], tasks: Mapping[str, Sequence[str]]) -> float:
    """Return the mean over stages of what the merge has of each stage's own gain: 0 is the base, 1 the expert alone.

    (R - base) / (expert - base), block by block, so that accuracies and perplexities can be averaged. A stage whose
    expert has hardly gained anything is divided by the noise of that gain instead, so that it cannot outweigh the rest.

    Args:
        now: scores of the merged model, all on validation documents.
        base: of the base model.
        alone: stage -> scores of its expert.
        tasks: stage -> its tasks.
    """
    shares = []
    for stage, names in tasks.items():
        for block in BLOCKS:
            whole = mean_change([(alone[stage], base, names)], block)
            here = mean_change([(now, base, names)], block)
            if whole is None or here is None:
                continue
            unit = max(whole.mean, whole.stderr or 0.0)
            shares.append(here.mean / unit if unit > 0 else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


def keeps_general(now: Scores, base: Scores, general: Sequence[str], confidence: float) -> bool:
    """Say whether the general tasks are where the base has them, as far as their noise lets one see."""
    return not exceeds([s.change for s in shifts(GENERAL, now, base, general)], 0.0, confidence)


def _rounded(value: float) -> float:
    """Return a number that a recipe can show: six digits."""
    return float(f"{value:.6g}")
