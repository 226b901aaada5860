"""The panels' axes and colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_contmerge.report._findings import amount
from hf_contmerge.report._results import Results
from hf_contmerge.run.scores import Block

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinct in all kinds of colour vision; their yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
INK, GREY, FAINT, WORSE = "#1a1a1a", "#6b6b6b", "#e9e9e6", "#fbeee6"
_RATIOS = (
    (0.125, 0.25, 0.5, 1, 2, 4, 8, 16),
    (0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4),
    (0.5, 0.6, 0.8, 1, 1.25, 1.6, 2, 2.5),
    (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3),
    (0.9, 0.95, 1, 1.05, 1.1),
)
"""Multiples of the base's perplexity to mark, from coarse to fine."""


def stage_axis(axes: Axes, results: Results, *, learnt: int | None) -> None:
    if learnt:
        axes.axvspan(learnt - 0.2, learnt + 0.2, color=FAINT, lw=0, zorder=0.5)
    axes.set_xticks([0, *results.shown])
    axes.set_xlim(-0.25, results.last + 0.25)
    axes.set_xlabel("after stage", loc="left")
    axes.spines["bottom"].set_bounds(-0.25, results.last + 0.25)


def unit_label(axes: Axes, text: str) -> None:
    """Write the vertical axis's unit above it."""
    axes.annotate(text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8.5,
                  color=GREY, va="bottom")  # fmt: skip


def change_axis(axes: Axes, block: Block, limits: tuple[float, float] | None) -> None:
    """Label an axis in points or in multiples of the base's perplexity."""
    if limits:
        axes.set_ylim(*limits)
    low, high = axes.get_ylim()
    room = 0.08 * (high - low)
    short = max(0.0, {"perplexity": 0.1, "accuracy": 0.04}[block] - (high - low))  # do not magnify noise
    low, high = low - room - short / 2, high + room + short / 2
    axes.set_ylim(low, high)
    axes.axhspan(low, 0, color=WORSE, lw=0, zorder=0)
    if block == "accuracy":
        unit_label(axes, "points against the base, ↑ better")
        axes.yaxis.set_major_formatter(lambda y, _: amount(y, block).split()[0])
        return
    unit_label(axes, "perplexity / the base's, ↑ better")
    shown = [r for r in _ratios(low, high) if low <= -math.log(r) <= high]
    axes.set_yticks([-math.log(r) for r in shown], [f"× {r:g}" for r in shown])


def _ratios(low: float, high: float) -> Sequence[float]:
    """Return the multiples to mark: a coarse series, or powers of ten."""
    if high - low > 5:
        return [10.0**k for k in range(math.floor(-high / math.log(10)), math.ceil(-low / math.log(10)) + 1)]
    for series in _RATIOS:
        if sum(low <= -math.log(r) <= high for r in series) >= 4:
            return series
    return _RATIOS[-1]
