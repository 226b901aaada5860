"""Searches merge parameters in few attempts: scales, coefficients, stages' weights.

Every attempt costs one pass over the state (some coefficients: one fold of the newest expert) and one scoring of the
validation documents; nothing is trained again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from hf_contmerge.run.scores import BLOCKS, Scores
from hf_contmerge.scoring.forgetting.budget import Shift, shifts
from hf_contmerge.scoring.forgetting.paired import Change, combined, mean_change, proven_drops

T = TypeVar("T")

_HALVINGS = 3  # 1/2, 1/4, 1/8; smaller shares keep hardly anything of the merge
_BISECTIONS = 2
_COARSE, _REFINED = (4, 3), 2  # attempts on each axis, by the number of axes; refinements next to the best

MOST_SEARCHED = len(_COARSE)
"""Coefficients searched together."""

Point = tuple[float, ...]
"""A value for each coefficient."""


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


@dataclass(frozen=True)
class Kept:
    """What a candidate keeps of the base."""

    changes: Mapping[str, float]
    """Group and block -> mean change of utility."""
    lost: frozenset[str] = frozenset()
    """Where a drop is proven."""


def allowed(candidates: Iterable[Kept]) -> list[bool]:
    """Say which candidates lose nothing beyond noise.

    Nor may one lose as much as another of which the loss is proven: the documents of a ruined model differ so much that
    few of them prove nothing.
    """
    every, proven = list(candidates), dict[str, float]()
    for candidate in every:
        for name in candidate.lost:
            proven[name] = max(proven.get(name, -math.inf), candidate.changes[name])
    return [
        not c.lost and all(change > proven.get(name, -math.inf) for name, change in c.changes.items()) for c in every
    ]


def _best(tried: Mapping[Point, tuple[Kept, float]]) -> Point:
    """Return the allowed point with the highest objective; ties: the smallest."""
    may = dict(zip(tried, allowed(kept for kept, _ in tried.values()), strict=True))
    return max(tried, key=lambda p: (may[p], tried[p][1], *(-value for value in p)))


def best_point(attempt: Callable[[Point], tuple[Kept, float]], tops: Sequence[float]) -> Point:
    """Return the allowed coefficients with the highest objective.

    If none is allowed, all count. A coarse grid over (0, top] on each axis, of four attempts for one coefficient and
    nine for two; then the neighbours of the best on each axis, at half the distance and at a quarter.

    Args:
        attempt: tries coefficients; returns (kept, objective).
        tops: the largest value of each, at most MOST_SEARCHED of them.
    """
    coarse = _COARSE[len(tops) - 1]
    steps = [top / coarse for top in tops]
    tried: dict[Point, tuple[Kept, float]] = {}

    def look_at(points: Iterable[Sequence[float]]) -> Point:
        for point in (tuple(map(_rounded, p)) for p in points):
            if min(point) > 0 and point not in tried:
                tried[point] = attempt(point)
        return _best(tried)

    best = look_at(itertools.product(*([step * i for i in range(1, coarse + 1)] for step in steps)))
    for _ in range(_REFINED):
        steps = [step / 2 for step in steps]
        best = look_at(_neighbours(best, steps))
    return best


def _neighbours(point: Point, steps: Sequence[float]) -> Iterator[list[float]]:
    """Yield the points one step away on each axis."""
    for axis, step in enumerate(steps):
        for move in (-step, step):
            yield [value + move * (i == axis) for i, value in enumerate(point)]


def best_weights(
    attempt: Callable[[Point], tuple[Kept, float]], tops: Sequence[float], starts: Iterable[Point], tries: int
) -> Point:
    """Return the allowed weights with the highest objective.

    `best_point` for any number of coefficients, 0 included. If none is allowed, all count. A third of the attempts
    spreads over the box from 0 to the tops (after `starts`). The rest are neighbours of the best so far, at a quarter
    of each top, then at half of that where no neighbour is better.

    Args:
        attempt: tries weights; returns (kept, objective).
        tops: the largest value of each.
        starts: weights to try first.
        tries: the most attempts.
    """
    tops = [_rounded(top) for top in tops]  # else the top itself, rounded up, would lie outside
    tried: dict[Point, tuple[Kept, float]] = {}

    def look_at(points: Iterable[Sequence[float]]) -> None:
        for point in (tuple(map(_rounded, p)) for p in points):
            inside = all(0 <= value <= top for value, top in zip(point, tops, strict=True)) and any(point)
            if inside and point not in tried and len(tried) < tries:
                tried[point] = attempt(point)

    look_at(starts)
    look_at([x * top for x, top in zip(p, tops, strict=True)] for p in spread(len(tops), max(1, tries // 3)))
    step, smallest = 0.25, 2.0**-9
    while len(tried) < tries and step > smallest:
        before = _best(tried)
        look_at(_neighbours(before, [step * top for top in tops]))
        step = step if _best(tried) != before else step / 2
    return _best(tried)


def spread(axes: int, count: int) -> list[Point]:
    """Return evenly spread points of the unit cube.

    An additive recurrence with the generalised golden ratio.
    """
    root = 1.5
    for _ in range(40):  # x = (1 + x)^(1 / (axes + 1))
        root = (1 + root) ** (1 / (axes + 1))
    return [tuple((0.5 + number / root ** (axis + 1)) % 1 for axis in range(axes)) for number in range(count)]


def front(values: Sequence[tuple[float, float]]) -> list[int]:
    """Return the Pareto front's places, largest first number first."""
    places, highest = [], float("-inf")
    for place in sorted(range(len(values)), key=lambda i: values[i], reverse=True):
        if values[place][1] > highest:
            places.append(place)
            highest = values[place][1]
    return places


def gain_kept(
    now: Scores,
    base: Scores,
    alone: Mapping[str, Scores],
    tasks: Mapping[str, Sequence[str]],
    wanted: Mapping[str, float] = MappingProxyType({}),
) -> Change | None:
    """Return the mean share of the stages' gains kept by a merge.

    None if nothing was measured. A share is (R - base) / (expert - base) per block: 0 is the base, 1 the expert.
    Accuracies and perplexities can thus be averaged. The denominator is at least the noise of the gain, to keep a stage
    from dominating. The interval is that of the numerators.

    Args:
        now: scores of the merged model, all on validation documents.
        base: scores of the base model.
        alone: stage -> scores of its expert.
        tasks: stage -> its tasks.
        wanted: stage -> its weight in the mean; 1 by default.
    """
    shares: list[tuple[float, float, Change]] = []
    for stage, names in tasks.items():
        for block in BLOCKS:
            whole = mean_change([(alone[stage], base, names)], block)
            here = mean_change([(now, base, names)], block)
            if whole is None or here is None:
                continue
            unit = max(whole.mean, whole.stderr or 0.0)
            shares.append((wanted.get(stage, 1.0), unit, here))
    total = sum(weight for weight, _, _ in shares)
    if not total:
        return None
    return combined([(weight / total / unit if unit > 0 else 0.0, here) for weight, unit, here in shares])


def objective(now: Scores, base: Scores, alone: Mapping[str, Scores], tasks: Mapping[str, Sequence[str]]) -> float:
    """Return the mean of `gain_kept`; 0 if nothing was measured."""
    gain = gain_kept(now, base, alone, tasks)
    return gain.mean if gain else 0.0


def losses(now: Scores, base: Scores, groups: Mapping[str, Sequence[str]]) -> list[Shift]:
    """Return the changes of groups of tasks against the base, by block."""
    return [shift for group, names in groups.items() for shift in shifts(group, now, base, names)]


def what_is_kept(now: Scores, base: Scores, groups: Mapping[str, Sequence[str]], confidence: float) -> Kept:
    """Compare groups of tasks with the base."""
    found = {f"{shift.group} {shift.block}": shift.change for shift in losses(now, base, groups)}
    lost = frozenset(itertools.compress(found, proven_drops(list(found.values()), 0.0, confidence)))
    return Kept({name: change.mean for name, change in found.items()}, lost)


def _rounded(value: float) -> float:
    """Round to six digits, for display in recipes."""
    return float(f"{value:.6g}")
