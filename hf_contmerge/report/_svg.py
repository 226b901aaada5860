"""Interactive SVG pictures without JavaScript: lines to hide, points with hints.

Matplotlib names the groups of a line `line-3`; here they become classes, since a page has many pictures. Points with a
text get a circle to hover over. The page's style sheet shows and hides both.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LETTER = 4.6
"""Mean width of a letter of a hint, in points."""


@dataclass(frozen=True)
class Spot:
    """A point with a hint of two lines, in data units."""

    x: float
    y: float
    name: str
    facts: str
    line: int


def line_group(number: int) -> str:
    """Return the group of a line's artists."""
    return f"line-{number}"


def inlined(svg: str, spots: str = "") -> str:
    """Return Matplotlib's SVG for use inside a page, with hints."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)  # HTML knows SVG
    body = re.sub(r'id="(line-\d+)"', r'class="\1"', body)
    body = re.sub(r' id="[a-z]+[a-zA-Z.]*_[\d.]+"', "", body)  # figures, axes, texts
    own = f"{zlib.crc32(svg.encode()):08x}-"
    body = re.sub(r'((?<=\sid=")|(?<=href="#)|(?<=url\(#))', own, body)
    return body.replace("</svg>", f"{spots}</svg>").rstrip()


def hints(axes: Axes, spots: Sequence[Spot]) -> str:
    """Return a circle and a hint for each point of axes."""
    figure = axes.get_figure(root=True)
    assert figure
    width, height = (72 * inches for inches in figure.get_size_inches())
    placed = []
    for spot in spots:
        x, y = axes.transData.transform((spot.x, spot.y)) * 72 / figure.dpi
        placed.append(_hint(spot, float(x), float(height - y), float(width)))
    return "".join(placed)


def _hint(spot: Spot, x: float, y: float, width: float) -> str:
    half = _LETTER * max(len(spot.name), len(spot.facts)) / 2 + 4
    middle = min(max(x, half), max(width - half, half))
    top = y - 30 if y > 40 else y + 10
    lines = "".join(
        f'<text x="{middle:.1f}" y="{top + 11 * (i + 1):.1f}">{escape(text)}</text>'
        for i, text in enumerate((spot.name, spot.facts))
    )
    return (
        f'<g class="spot {line_group(spot.line)}"><circle cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
        f'<g class="hint"><rect x="{middle - half:.1f}" y="{top:.1f}" width="{2 * half:.1f}" height="27" rx="3"/>'
        f"{lines}</g></g>"
    )
