"""Confidence intervals over orders and seeds.

Runs of a study form a grid: each order of the stages with each seed. A difference d between two lines in the run of
order o and seed s is modelled as d = mean + order + seed + rest, with random effects (Searle, Casella & McCulloch,
Variance Components, 1992, 4.5). The interval is Student's, with Satterthwaite's degrees of freedom; the documents' own
variation is added where all runs are scored on the same documents, since it is then the same in each run. Measured
coverage, also of the bootstrap over orders, seeds and documents: tests/benchmarks/study_coverage.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

import numpy as np

from hf_contmerge.scoring.forgetting.paired import CONFIDENCE, Change

Grid = Mapping[tuple[int, int], float]
"""(order, seed) -> the value of one run."""


def crossed_change(
    grid: Grid, documents: Change | None, *, same_documents: bool, confidence: float = CONFIDENCE
) -> Change:
    """Return a grid's mean difference, with its interval over orders, seeds, documents.

    Args:
        grid: the difference in each run; incomplete grids count as unrelated runs.
        documents: the mean difference over all runs, paired by document.
        same_documents: whether all runs have the same documents.
        confidence: 0 to 1.
    """
    mean = fmean(grid.values())
    parts = [_of_runs(grid)]
    if documents and documents.stderr is not None and (same_documents or len(grid) == 1):
        parts.append((documents.stderr**2, _documents(documents)))
    known = [(variance, freedom) for variance, freedom in parts if freedom > 0]
    if not known:
        return Change(mean, None, confidence=confidence)
    variance = math.fsum(v for v, _ in known)
    if variance == 0:
        return Change(mean, 0.0, mean, mean, confidence)
    from scipy.special import stdtrit

    freedom = variance**2 / math.fsum(v**2 / f for v, f in known)
    reach = float(stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(variance)
    return Change(mean, math.sqrt(variance), mean - reach, mean + reach, confidence)


def _documents(change: Change) -> float:
    """Return the degrees of freedom of the documents' variation."""
    return max(1.0, sum(len(part.gains) - 1 for part in change.parts))


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
