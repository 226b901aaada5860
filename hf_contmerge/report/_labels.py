"""Names in a picture, next to their lines and dots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LETTER = 0.55
"""Mean width of a letter, as a share of the font size."""
_BOLD = 0.68


@dataclass(frozen=True)
class Label:
    """A text at the right edge of a panel, in data units."""

    at: float
    text: str
    colour: str
    group: str = ""
    """Of the line that it names."""


@dataclass(frozen=True)
class Dot:
    """A dot of a panel, in data units, with its name."""

    x: float
    y: float
    text: str
    colour: str


def fitted(text: str, points: float, size: float) -> str:
    """Cut a text in the middle to a width; keep its end."""
    most = max(8, int(points / (size * LETTER)))
    if len(text) <= most:
        return text
    tail = min(9, most // 2)
    return f"{text[: most - tail - 1].rstrip()}…{text[len(text) - tail :].lstrip()}"


def label_ends(axes: Axes, labels: Sequence[Label], stages: Sequence[str]) -> None:
    """Write labels right of the lines' ends, apart, with leaders."""
    if not labels:
        return
    axes.autoscale(False)
    size = 8.5
    points = axes.get_window_extent().width * 72 / axes.figure.dpi
    labels = [replace(x, text=fitted(x.text, 0.6 * points - 18, size)) for x in labels]
    room = max(len(x.text) for x in labels) * size * LETTER + 18
    (left, last), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left, left + (last - left) * points / max(points - room, 0.3 * points))
    scale = axes.get_window_extent().height * 72 / axes.figure.dpi / (high - low)
    _name_ticks(axes, stages)
    ordered = sorted(labels, key=lambda x: x.at)
    heights = spread([(x.at - low) * scale for x in ordered], 1.25 * size, (high - low) * scale)
    per_point = (axes.get_xlim()[1] - left) / points
    for label, height in zip(ordered, heights, strict=True):
        y = low + height / scale
        axes.plot([last, last + 12 * per_point], [label.at, y], color=label.colour, lw=0.6, alpha=0.6, clip_on=False,
                  gid=label.group or None)  # fmt: skip
        axes.text(last + 15 * per_point, y, label.text, color=label.colour, fontsize=size, va="center",
                  gid=label.group or None)  # fmt: skip


def name_region(axes: Axes, text: str) -> None:
    """Annotate the shaded region at the bottom right, if free."""
    size, (low, high) = 8.0, axes.get_ylim()
    scale = axes.get_window_extent().height * 72 / axes.figure.dpi / (high - low)
    if all((label.get_position()[1] - low) * scale > 2.2 * size for label in axes.texts if label.get_text() != text):
        axes.annotate(text, (1, 0), (-4, 4), xycoords="axes fraction", textcoords="offset points", fontsize=size,
                      color="#a3603a", ha="right", va="bottom")  # fmt: skip


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Write stage names under the ticks; numbers where names do not fit."""
    span = axes.get_xlim()[1] - axes.get_xlim()[0]
    step = axes.get_window_extent().width * 72 / axes.figure.dpi / span
    width = 8.5 * LETTER
    if all((len(a) + len(b)) / 2 * width + 3 <= step for a, b in pairwise(names)):
        axes.set_xticks(range(len(names)), names)
    else:
        every = math.ceil(2.5 * width / step)
        axes.set_xticks(range(0, len(names), every))


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Spread heights to a minimum `gap` between 0 and `top`."""
    up, down = list(heights), list(heights)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + gap)
    for i in reversed(range(len(down) - 1)):
        down[i] = min(down[i], down[i + 1] - gap)
    mid = [(a + b) / 2 for a, b in zip(up, down, strict=True)]
    for i in reversed(range(len(mid))):
        mid[i] = min(mid[i], top - gap * (len(mid) - 1 - i))
    for i in range(len(mid)):
        mid[i] = max(mid[i], gap * i)
    assert all(b - a > gap * 0.999 for a, b in pairwise(mid))
    return mid


def label_dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """Name the dots; of two close ones, the lower name goes lower."""
    from matplotlib.patheffects import withStroke

    axes.autoscale(False)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    size, (low, high) = 9.5, axes.get_ylim()
    box = axes.get_window_extent()
    scale = box.height * 72 / axes.figure.dpi / (high - low)
    dots = [replace(d, text=fitted(d.text, 0.6 * box.width * 72 / axes.figure.dpi, size)) for d in dots]
    ordered = sorted(dots, key=lambda d: d.y)
    heights = spread([(d.y - low) * scale for d in ordered], 1.3 * size, (high - low) * scale - 14)
    left, right = axes.get_xlim()
    points = box.width * 72 / axes.figure.dpi
    widths = [16 + len(d.text) * size * _BOLD for d in ordered]
    right = max(right, *(left + (d.x - left) * points / max(points - w, 0.3 * points)
                         for d, w in zip(ordered, widths, strict=True)))  # fmt: skip
    axes.set_xlim(left, right)
    per_point = (right - left) / points
    for dot, height in zip(ordered, heights, strict=True):
        at = low + (height + 7) / scale
        if abs(at - dot.y) * scale > 12:
            axes.plot([dot.x, dot.x + 8 * per_point], [dot.y, at], color=dot.colour, lw=0.6, alpha=0.7)
        axes.text(dot.x + 9 * per_point, at, dot.text, color=dot.colour, fontsize=size, va="center", fontweight="bold",
                  path_effects=halo, zorder=6)  # fmt: skip
