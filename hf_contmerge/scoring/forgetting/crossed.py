"""Confidence intervals over orders and seeds.

Runs of a study form a grid: each order of the stages with each seed. A difference d between two lines in the run of
order o and seed s is modelled as d = mean + order + seed + rest, with random effects (Searle, Casella & McCulloch,
Variance Components, 1992, 4.5). The interval is Student's, with Satterthwaite's degrees of freedom.

The documents' own variation depends on the task. Where all its runs have the same documents, it is the same in each run
and is added. Where documents are drawn anew, as with held-out examples of other seeds, the runs differ by it already;
the interval is then no shorter than that of all these documents. Its variance is recovered from the limits of the
interval over documents, for each side: (distance / z)^2 (Zou & Donner 2008). One run thus has the interval of its own
report, and answers of which few or none changed sides keep their score interval. Measured coverage, also of the
bootstrap over orders, seeds and documents: tests/benchmarks/study_coverage.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import NormalDist, fmean

import numpy as np

from hf_contmerge.scoring.forgetting.paired import CONFIDENCE, Change, possible, reach

Grid = Mapping[tuple[int, int], float]
"""(order, seed) -> the value of one run."""


def crossed_change(grid: Grid, documents: Change | None, confidence: float = CONFIDENCE) -> Change:
    """Return a grid's mean difference, with its interval over orders, seeds, documents.

    Args:
        grid: the difference in each run; incomplete grids count as unrelated runs.
        documents: the mean difference over all runs, paired by document; a task whose documents are not the same in all
            its runs has several parts.
        confidence: 0 to 1.
    """
    mean, runs = fmean(grid.values()), _of_runs(grid)
    parts = documents.parts if documents else ()
    tasks = Counter(part.source[0] for part in parts)
    same, drawn = ([p for p in parts if (tasks[p.source[0]] == 1) is once] for once in (True, False))
    fixed, varying = reach(same, confidence), reach(drawn, confidence)
    if fixed is None or (varying is None and not runs[0]) or (not parts and not runs[1]):
        return Change(mean, None, confidence=confidence)
    varying = varying or (0.0, 0.0, 0.0)
    below, above = (_distance(runs, fixed[side], varying[side], (1 + confidence) / 2) for side in (1, 2))
    stderr = math.hypot(max(math.sqrt(runs[0]), varying[0]), fixed[0])
    return Change(mean, stderr, *possible(mean - below, mean + above, parts), confidence)


def _distance(runs: tuple[float, float], fixed: float, varying: float, level: float) -> float:
    """Return the distance from the mean to one limit.

    Args:
        runs: the variance between runs, and its degrees of freedom.
        fixed: the distance by documents that are the same in all runs alone.
        varying: the distance by the other documents alone.
        level: one-sided, such as 0.975.
    """
    from scipy.special import stdtrit

    z = NormalDist().inv_cdf(level)
    variance, freedom = runs
    if not freedom or stdtrit(freedom, level) * math.sqrt(variance) <= varying:
        variance, freedom = (varying / z) ** 2, math.inf
    total = variance + (fixed / z) ** 2
    if not variance or freedom == math.inf:
        return z * math.sqrt(total)
    return float(stdtrit(freedom * (total / variance) ** 2, level)) * math.sqrt(total)


def _of_runs(grid: Grid) -> tuple[float, float]:
    """Return the variance of a grid's mean, and its degrees of freedom."""
    orders, seeds = sorted({o for o, _ in grid}), sorted({s for _, s in grid})
    if len(orders) > 1 and len(seeds) > 1 and len(grid) == len(orders) * len(seeds):
        return _two_way(np.array([[grid[o, s] for s in seeds] for o in orders]))
    values = np.array(list(grid.values()))
    n = len(values)
    return (float(values.var(ddof=1)) / n, n - 1) if n > 1 else (0.0, 0)


def _two_way(values: np.ndarray) -> tuple[float, float]:
    """Return a complete grid's variance of the mean, with its freedom."""
    rows, columns = values.shape
    mean, of_rows, of_columns = values.mean(), values.mean(axis=1), values.mean(axis=0)
    rest = values - of_rows[:, None] - of_columns[None, :] + mean
    squares = (
        (columns * float(((of_rows - mean) ** 2).sum()) / (rows - 1), rows - 1),
        (rows * float(((of_columns - mean) ** 2).sum()) / (columns - 1), columns - 1),
        (float((rest**2).sum()) / (rows - 1) / (columns - 1), (rows - 1) * (columns - 1)),
    )
    by_rows, by_columns, by_rest = (square for square, _ in squares)
    both = by_rows + by_columns - by_rest
    largest = max(squares)
    if both <= largest[0]:  # one of the effects is not seen
        return largest[0] / rows / columns, largest[1]
    freedom = both**2 / math.fsum(square**2 / f for square, f in squares)
    return both / rows / columns, freedom
