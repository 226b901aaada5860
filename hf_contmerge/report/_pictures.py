"""The picture of a run: whole, or in parts for phones.

One panel per stage (up is better, one line per way of learning), one for general ability, and the plane of learning
against forgetting. All panels of one kind of score share their scale.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from hf_contmerge.report._axes import COLOURS, FAINT, GREY, INK, MARKERS
from hf_contmerge.report._choices import Curve
from hf_contmerge.report._findings import caption, headline
from hf_contmerge.report._labels import LETTER, fitted, label_dots, label_ends, name_region
from hf_contmerge.report._panels import Drawing, Panel, draw_panel, panels
from hf_contmerge.report._results import Results
from hf_contmerge.report._svg import hints, inlined
from hf_contmerge.run.scores import Block
from hf_contmerge.scoring.forgetting.paired import Change

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#b0b0b0", "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.labelsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "text.parse_math": False,
    "svg.fonttype": "none", "svg.hashsalt": "hf_contmerge",
}  # fmt: skip
_BOLD = 0.64
Form = Literal["png", "svg"]


@dataclass(frozen=True)
class LossCurve:
    """The losses of one kind of expert, a part per stage."""

    name: str
    parts: Sequence[Sequence[tuple[float, float]]]


def draw_forgetting(results: Results, path: Path | BinaryIO) -> None:
    """Write the whole picture as a PNG file."""
    shown = panels(results)
    columns, rows, spots = _layout(sum(p.kind == "stage" for p in shown), len(shown))
    width = max(7.5, (4.4 if columns <= 3 else 3.5) * columns)
    with _figure(width, 1.3 + 3.3 * rows) as figure:
        grid = figure.add_gridspec(*spots[0]) if shown else None
        drawn = []
        for panel, (r, c) in zip(shown, spots[1], strict=True):
            axes = figure.add_subplot(grid[r, c])  # pyright: ignore[reportOptionalSubscript]
            drawn.append((axes, draw_panel(axes, results, panel)))
        wrapped = textwrap.fill(headline(results), int(width * 72 / (15 * _BOLD)))
        foot = textwrap.fill(caption(results), int(width * 72 / (8.5 * LETTER)))
        figure.supxlabel(foot, x=0.012, ha="left", fontsize=8.5, color=GREY)
        figure.suptitle(wrapped, x=0.012, ha="left", fontsize=15, fontweight="bold", color=INK)
        _finish(figure, drawn)
        figure.savefig(path, facecolor="white", format="png")


def draw_alone(results: Results, panel: Panel) -> str:
    """Return one panel as SVG for a page."""
    with _figure(3.8, 3.2, layout=None) as figure:  # fixed margins: a page has many, and a layout takes longer to find
        figure.subplots_adjust(left=0.165, right=0.975, bottom=0.165)
        axes = figure.add_subplot()
        drawn = [(axes, draw_panel(axes, results, panel))]
        room = _write_titles(figure, drawn)
        figure.subplots_adjust(top=1 - (room + 43) / (72 * figure.get_figheight()))
        _write_labels(drawn)
        return inlined(_saved(figure, "svg").decode(), hints(axes, drawn[0][1].spots))


def draw_losses(curves: Sequence[LossCurve], stages: Mapping[str, float]) -> str:
    """Return the training losses as SVG, a line per kind of expert.

    `stages`: names with their first steps.
    """
    with _figure(7.6, 3.2) as figure:
        axes = figure.add_subplot()
        axes.set_title("Loss in training", loc="left", fontsize=11.5, fontweight="bold", color=INK)
        axes.set_xlabel("step, over all stages", loc="left")
        for i, curve in enumerate(curves):
            colour, label = COLOURS[i % len(COLOURS)], curve.name
            for part in curve.parts:
                axes.plot(*zip(*part, strict=True), color=colour, lw=1.6, marker="o", ms=3, label=label)
                label = None
        for name, first in stages.items():
            axes.axvline(first, color=FAINT, lw=1.2, zorder=0)
            axes.annotate(fitted(name, 400 / len(stages), 8.5), (first, 1), (3, -2), textcoords="offset points",
                          xycoords=("data", "axes fraction"), fontsize=8.5, color=GREY, va="top")  # fmt: skip
        axes.margins(y=0.15)
        figure.legend(frameon=False, fontsize=8.5, loc="outside lower left", ncols=4)
        return inlined(_saved(figure, "svg").decode())


def draw_curve(curve: Curve) -> str:
    """Return a coefficient's search as SVG, a line per stage."""
    with _figure(4.4, 3.2) as figure:
        axes = figure.add_subplot()
        title = fitted(f"{curve.entry}: search of {curve.word}", 240, 12)
        axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
        axes.set_xlabel(curve.word)
        axes.set_ylabel("% of the experts' gain, ↑ better")
        for i, (stage, points) in enumerate(curve.stages.items()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
            x, y = [p.value for p in points], [100 * p.objective for p in points]
            axes.plot(x, y, color=colour, lw=1.6, label=f"after {fitted(stage, 110, 8.5)}")
            for p in points:
                fill = colour if p.allowed else "white"
                axes.plot([p.value], [100 * p.objective], marker, ms=6, mfc=fill, mec=colour, mew=1.3, zorder=4)
                if p.taken:
                    axes.plot([p.value], [100 * p.objective], "o", ms=13, mfc="none", mec=INK, mew=1.3, zorder=5)
        axes.legend(frameon=False, fontsize=8.5)
        return inlined(_saved(figure, "svg").decode())


@dataclass(frozen=True)
class Dot:
    """A difference from a reference, with its interval."""

    line: str
    panel: str
    change: Change


def draw_dots(dots: Sequence[Dot], block: Block, *, title: str, form: Form = "svg") -> bytes:
    """Return differences as a picture: panels per scope, rows per line."""
    panels, lines = list(dict.fromkeys(d.panel for d in dots)), list(dict.fromkeys(d.line for d in dots))
    factor, unit = (1, "nats") if block == "perplexity" else (100, "points")
    width = 2.6 + 2.1 * max(len(panels), 1)
    with _figure(width, 1.3 + 0.3 * max(len(lines), 1)) as figure:
        all_axes = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=False):
            axes.axvline(0, color=FAINT, lw=1.4, zorder=0)
            axes.set_title(fitted(panel, 130, 10), loc="left", fontsize=10)
            axes.set_xlabel(f"{unit}, → better")
            for dot in (d for d in dots if d.panel == panel):
                change, y = dot.change, len(lines) - 1 - lines.index(dot.line)
                colour = COLOURS[0] if change.sign > 0 else COLOURS[1] if change.sign < 0 else GREY
                if change.low is not None and change.high is not None:
                    axes.plot([factor * change.low, factor * change.high], [y, y], color=colour, lw=1.8)
                fill = colour if change.sign else "white"
                axes.plot([factor * change.mean], [y], "o", ms=6, mfc=fill, mec=colour, mew=1.4, zorder=4)
            axes.set_yticks(range(len(lines)), [fitted(line, 150, 8.5) for line in lines[::-1]], fontsize=8.5)
            axes.set_ylim(-0.6, len(lines) - 0.4)
        heading = fitted(f"{title}, {block}", 72 * width - 20, 13.5)
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11.5, fontweight="bold", color=INK)
        return _saved(figure, form)


Estimate = tuple[float, float | None, float | None]
"""A mean and its interval, if known."""


@dataclass(frozen=True)
class FrontDot:
    """A candidate of a remix: change kept, share of gain learnt."""

    keeping: Estimate
    learning: Estimate
    front: bool
    taken: bool
    allowed: bool


def draw_front(dots: Sequence[FrontDot], *, keeping: str, form: Form = "png") -> bytes:
    """Return candidates as a picture: the front with intervals, the others pale."""
    with _figure(5.2, 4.0) as figure:
        axes = figure.add_subplot()
        axes.set_title("Learning against keeping", loc="left", fontsize=11.5, fontweight="bold", color=INK)
        axes.set_xlabel(textwrap.fill(f"{keeping}, → better", 58))
        axes.set_ylabel("learning, % of the experts' gain, ↑ better")
        axes.axvline(0, color=FAINT, lw=1.4, zorder=0)
        axes.plot([0], [0], "+", color=INK, ms=8)
        axes.annotate("base", (0, 0), (4, 4), textcoords="offset points", fontsize=8.5, color=GREY)
        for dot in dots:
            (x, left, right), (y, low, high) = dot.keeping, dot.learning
            colour = COLOURS[0] if dot.front else "#c4c4c4"
            if dot.front and left is not None and right is not None:
                axes.plot([left, right], [100 * y, 100 * y], color=colour, lw=0.9, alpha=0.6)
            if dot.front and low is not None and high is not None:
                axes.plot([x, x], [100 * low, 100 * high], color=colour, lw=0.9, alpha=0.6)
            fill = colour if dot.allowed else "white"
            axes.plot([x], [100 * y], "o", ms=5, mfc=fill, mec=colour, mew=1.2, zorder=3 + dot.front)
            if dot.taken:
                axes.plot([x], [100 * y], "o", ms=12, mfc="none", mec=INK, mew=1.4, zorder=6)
        return _saved(figure, form)


@contextmanager
def _figure(width: float, height: float, *, layout: Literal["constrained"] | None = "constrained") -> Any:
    """Return a figure in the report's style. Sizes are inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        if layout:
            figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.06)  # pyright: ignore
        yield figure


def _saved(figure: Figure, form: Form) -> bytes:
    """Return a figure's file; SVG keeps texts and equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, facecolor="white", format=form, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def _layout(stages: int, panels: int) -> tuple[int, int, tuple[tuple[int, int], list[tuple[Any, Any]]]]:
    """Return columns, rows and places of the panels; two rows at most."""
    others = panels - stages
    if panels <= 3:
        return max(panels, 1), 1, ((1, max(panels, 1)), [(0, i) for i in range(panels)])
    if stages <= 4 and others:  # stages above, the rest below, each row filled
        cells = math.lcm(max(stages, 1), others)
        spans = [(0, i, cells // stages) for i in range(stages)] + [(1, i, cells // others) for i in range(others)]
        return max(stages, others), 2, ((2, cells), [(r, slice(i * w, (i + 1) * w)) for r, i, w in spans])
    columns = math.ceil(panels / 2)
    spots: list[tuple[Any, Any]] = [(i // columns, i % columns) for i in range(panels)]
    spots[-1] = (1, slice(panels - 1 - columns, columns))  # the last one fills the row
    return columns, 2, ((2, columns), spots)


def _slants(axes: Axes, share: float) -> None:
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    low, high = x0 + share * y0, x1 + share * y1
    for k in range(1, 8):
        total = low + (high - low) * k / 8
        axes.plot([x0, x1], [(total - x0) / share, (total - x1) / share], color=FAINT, lw=1.2, zorder=0)
    axes.set(xlim=(x0, x1), ylim=(y0, y1))


def _finish(figure: Figure, drawn: Sequence[tuple[Axes, Drawing]]) -> None:
    """Lay out titles and labels once panels have their sizes."""
    figure.draw_without_rendering()
    _write_titles(figure, drawn)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _write_labels(drawn)


def _write_titles(figure: Figure, drawn: Sequence[tuple[Axes, Drawing]]) -> float:
    """Write titles and findings; return the findings' height in points."""
    wrapped = []
    for axes, drawing in drawn:
        width = axes.get_window_extent().width * 72 / figure.dpi
        wrapped.append(textwrap.wrap(drawing.finding, max(20, int(width / (8.5 * LETTER)))))
    room = 11.5 * max(map(len, wrapped), default=0)
    for (axes, drawing), lines in zip(drawn, wrapped, strict=True):
        width = axes.get_window_extent().width * 72 / figure.dpi
        title = fitted(drawing.title, width, 11.5 * _BOLD / LETTER)
        axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=25 + room)
        axes.annotate("\n".join(lines), (0, 1), (0, 20 + room), xycoords="axes fraction", textcoords="offset points",
                      fontsize=8.5, color=GREY, va="top", linespacing=1.15)  # fmt: skip
    return room


def _write_labels(drawn: Sequence[tuple[Axes, Drawing]]) -> None:
    for axes, drawing in drawn:
        label_ends(axes, drawing.labels, drawing.stages)
        if drawing.worse:
            name_region(axes, drawing.worse)
        if drawing.dots:
            label_dots(axes, drawing.dots)
            stages = max(len(drawing.stages) - 1, 2)
            _slants(axes, (stages - 1) / stages)
