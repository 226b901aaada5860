"""Searches one merge parameter in few attempts: a scale or a coefficient.

Every attempt costs one pass over the state and one scoring of the validation documents; nothing is trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hf_contmerge.run.scores import BLOCKS, Scores
from hf_contmerge.scoring.forgetting.budget import GENERAL, shifts
from hf_contmerge.scoring.forgetting.paired import exceeds, mean_change

T = TypeVar("T")

_HALVINGS = 3  # 1/2, 1/4, 1/8; smaller shares keep hardly anything of the merge
_BISECTIONS = 2
_COARSE, _REFINED = 4, 2  # attempts: four over the range, then twice two next to the best


def largest_that_holds(attempt: Callable[[float], tuple[bool, float]]) -> float | None:
    """Return the largest factor below 1 within the budget, or None.

    Halve from 1 until a factor holds, then bisect the gap to the last failure. The search ends if a smaller factor
    loses more than the previous one: the loss is then knowledge held by the merge, and shrinking loses more of it.

    Args:
        attempt: tries a factor; returns (within budget, largest drop).
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
    """Return the allowed coefficient with the highest objective.

    If none is allowed, all count. Four attempts over (0, max(1, 2 * default)], then two next to the best at half the
    distance, and two at a quarter.

    Args:
        attempt: tries a coefficient; returns (allowed, objective).
        default: the rule's own coefficient.
    """
    top = max(1.0, 2 * default)
    step = top / _COARSE
    tried: dict[float, tuple[bool, float]] = {}

    def look_at(values: Sequence[float]) -> float:
        for value in (_rounded(v) for v in values):
            if value > 0 and value not in tried:
                tried[value] = attempt(value)
        return max(tried, key=lambda v: (*tried[v], -v))  # ties: the smallest change to the model

    best = look_at([step * i for i in range(1, _COARSE + 1)])
    for _ in range(_REFINED):
        step /= 2
        best = look_at([best - step, best + step])
    return best


def objective(now: Scores, base: Scores, alone: Mapping[str, Scores], tasks: Mapping[str, Sequence[str]]) -> float:
    """Return the mean share of each stage's gain kept by a merge.

    (R - base) / (expert - base) per block: 0 is the base, 1 the expert. Accuracies and perplexities can thus be
    averaged. The denominator is at least the noise of the gain, to keep a stage from dominating.

    Args:
        now: scores of the merged model, all on validation documents.
        base: scores of the base model.
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
    """Check the general tasks for a significant drop below the base."""
    return not exceeds([s.change for s in shifts(GENERAL, now, base, general)], 0.0, confidence)


def _rounded(value: float) -> float:
    """Round to six digits, for display in recipes."""
    return float(f"{value:.6g}")
