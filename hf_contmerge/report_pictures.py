"""The picture of a run: what each stage left of the earlier ones.

One panel per stage (up is better, one line per way of learning), one for general ability, and the plane of what was
learnt against what was kept. Panels speak of a change only where it exceeds two standard errors.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_contmerge.forgetting import Line
from hf_contmerge.report_findings import Results, amount, caption, fate, gained, headline, line_label, natural
from hf_contmerge.report_labels import LETTER, Label, label_dots, label_ends
from hf_contmerge.task_scores import Block
from hf_contmerge.uncertainty import Change, mean_change

# Okabe & Ito's colours, told apart by all kinds of colour vision; their yellow is too pale for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_INK, _GREY, _FAINT = "#1a1a1a", "#6b6b6b", "#e9e9e6"
_STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#b0b0b0", "axes.labelcolor": _GREY, "xtick.color": _GREY, "ytick.color": _GREY,
    "axes.labelsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "text.parse_math": False,
}  # fmt: skip
_BOLD = 0.68
_FINE = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3, 3.3, 3.6, 4, 4.5, 5, 5.5, 6, 7, 8, 9)


@dataclass(frozen=True)
class _Drawn:
    """A line with its looks."""

    line: Line
    label: str
    colour: str
    marker: str
    dash: str


def draw_forgetting(results: Results, path: Path) -> None:
    """Write the picture as a PNG file; the panels are as many as there is something to show."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(results)
    columns, rows, spots = _layout(sum(p[0] == "stage" for p in panels), len(panels))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(
            figsize=(max(7.5, (4.4 if columns <= 3 else 3.5) * columns), 1.2 + 3.6 * rows),
            dpi=150,
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.06)  # pyright: ignore
        grid = figure.add_gridspec(*spots[0]) if panels else None
        ends = []
        for (kind, what), (r, c) in zip(panels, spots[1], strict=True):
            axes = figure.add_subplot(grid[r, c])  # pyright: ignore[reportOptionalSubscript]
            draw = {"stage": _stage_panel, "general": _general_panel, "plane": _plane_panel}[kind]
            ends.append((axes, draw(axes, results, what)))
        wrapped = textwrap.fill(headline(results), int(figure.get_figwidth() * 72 / (14 * _BOLD)))
        foot = textwrap.fill(caption(results), int(figure.get_figwidth() * 72 / (8.5 * LETTER)))
        figure.supxlabel(foot, x=0.012, ha="left", fontsize=8.5, color=_GREY)
        figure.suptitle(wrapped, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
        _finish(figure, ends)
        figure.savefig(path, facecolor="white")


def _panels(results: Results) -> list[tuple[str, Any]]:
    stages = [("stage", j) for j in range(1, results.last + 1) if _shown_task(results, j)]
    seen = [t for t in results.general_tasks if t in results.base]
    general = [
        ("general", b) for b in results.blocks() if results.last and any(results.base[t].block == b for t in seen)
    ]
    planes = [("plane", b) for b in results.stage_blocks()[:1] if _dots(results, b)]
    return [*stages, *general, *planes]


def _layout(stages: int, panels: int) -> tuple[int, int, tuple[tuple[int, int], list[tuple[Any, Any]]]]:
    """Return columns, rows, and ((grid rows, grid columns), a place in the grid for each panel); two rows at most."""
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


def _drawn(results: Results) -> list[_Drawn]:
    plain = [_Drawn(results.baseline, line_label("previous"), _INK, "X", "--")] if results.baseline else []
    return plain + [
        _Drawn(line, line.name, _COLOURS[i % len(_COLOURS)], _MARKERS[i // len(_COLOURS) % len(_MARKERS)], "-")
        for i, line in enumerate(results.merges)
    ]


def _shown_task(results: Results, j: int) -> str | None:
    """Return the first task of a stage that has been measured: its held-out text, mostly."""
    lines = (*results.experts, *results.merges)
    return next((t for t in results.stages[j - 1].task_names() if any(t in row for x in lines for row in x.rows)), None)


def _stage_panel(axes: Any, results: Results, j: int) -> list[Label]:
    task = _shown_task(results, j)
    assert task
    every = [row[task] for x in (*results.experts, *results.merges) for row in x.rows if task in row]
    block, labels = every[0].block, []
    if task in results.base:
        score = results.base[task]
        axes.plot([0, results.last], [score.utility] * 2, color=_GREY, lw=1.1, ls=":", zorder=1)
        labels.append(Label(score.utility, f"base {natural(score.value, block)}", _GREY))
    alone = next((x.rows[j][task] for x in results.experts if x.name == "base" and j < len(x.rows)), None)
    if alone and j > 1:
        axes.plot([j], [alone.utility], "*", ms=13, color="#F0E442", mec=_INK, mew=0.8, zorder=6)
        axes.plot([j, results.last], [alone.utility] * 2, color=_GREY, lw=0.7, zorder=1)
        labels.append(Label(alone.utility, f"★ trained alone {natural(alone.value, block)}", _INK))
    for i, d in enumerate(drawn := _drawn(results)):
        shift = 0.05 * (i - (len(drawn) - 1) / 2)
        points = [(t + shift, s.utility, 2 * (s.stderr or 0))
                  for t, row in enumerate(d.line.rows) if t and (s := row.get(task))]  # fmt: skip
        if points:
            _trace(axes, d, points, (0, results.base[task].utility) if task in results.base else None)
            end = d.line.rows[-1].get(task)
            labels += [Label(end.utility, f"{d.label} {natural(end.value, block)}", d.colour)] if end else []
    name = {"perplexity": "perplexity", "accuracy": "accuracy"}[block]
    _stage_axis(axes, results, learnt=j)
    _value_axis(axes, block, f"{name} of {task}, up is better")
    _title(axes, f"{j} · {results.stages[j - 1].name}", _stage_finding(results, j, task, block))
    return labels


def _trace(
    axes: Any, d: _Drawn, points: Sequence[tuple[float, float, float]], start: tuple[float, float] | None
) -> None:
    x, y, error = zip(*points, strict=True)
    if start:
        axes.plot([start[0], x[0]], [start[1], y[0]], color=d.colour, lw=0.9, ls=(0, (1, 2)), alpha=0.5, zorder=2)
    axes.errorbar(x, y, yerr=error, color=d.colour, ls=d.dash, lw=1.9, elinewidth=1, alpha=0.95, marker=d.marker,
                  ms=5.5, mec="white", mew=0.7, zorder=4)  # fmt: skip


def _stage_finding(results: Results, j: int, task: str, block: Block) -> str:
    """Say what became of a stage: since it was learnt or, for the last one, in learning it."""
    ends = [(x.rows[-1][task].utility, x) for x in results.merges if len(x.rows) > j and task in x.rows[-1]]
    best = max(ends, key=lambda pair: pair[0])[1] if ends else None
    told = []
    for line, name in ((results.baseline, line_label("previous")), (best, best.name if best else "")):
        if line is None or len(line.rows) <= j:
            continue
        if j < len(line.rows) - 1:
            told.append(f"{name} {fate(mean_change([(line.rows[-1], line.rows[j], [task])], block), block)}")
        else:
            told.append(f"{name} {gained(mean_change([(line.rows[j], results.base, [task])], block), block)}")
    return ("then " if j < results.last else "learnt last: ") + "; ".join(told) if told else ""


def _general_panel(axes: Any, results: Results, block: Block) -> list[Label]:
    labels, told, ends = [Label(0.0, "base", _GREY)], [], []
    axes.plot([0, results.last], [0, 0], color=_GREY, lw=1.1, ls=":", zorder=1)
    tasks = [t for t in results.general_tasks if t in results.base and results.base[t].block == block]
    for i, d in enumerate(drawn := _drawn(results)):
        found = [(t, mean_change([(row, results.base, tasks)], block)) for t, row in enumerate(d.line.rows) if t]
        shift = 0.05 * (i - (len(drawn) - 1) / 2)
        points = [(t + shift, c.mean, 2 * (c.stderr or 0)) for t, c in found if c]
        if points and (last := found[-1][1]):
            _trace(axes, d, points, (0, 0.0))
            labels.append(Label(last.mean, f"{d.label} {amount(last.mean, block).split()[0]}", d.colour))
            ends.append((last.mean, d, last))
    plain = [e for e in ends if e[1].line is results.baseline]
    merged = max((e for e in ends if e[1].line is not results.baseline), key=lambda e: e[0], default=None)
    for _, d, change in (*plain, *([merged] if merged else [])):
        told.append(f"{d.label} {fate(change, block).replace('forgot', 'lost')}")
    _stage_axis(axes, results, learnt=None)
    unit = "nats" if block == "perplexity" else "points"
    axes.set_ylabel(f"change against the base, {unit}, up is better")
    axes.yaxis.set_major_formatter(lambda y, _: amount(y, block).split()[0])
    _room(axes, block)
    _title(axes, f"General ability ({block})", "; ".join(told) or ", ".join(tasks))
    return labels


def _dots(results: Results, block: Block) -> list[tuple[_Drawn, Change, Change]]:
    others = [_Drawn(x, line_label(x.name), _GREY, "o", "-") for x in results.experts if x.name.startswith("merged-")]
    found = [(d, results.learnt(d.line, block), results.kept(d.line, block)) for d in (*_drawn(results), *others)]
    return [(d, learnt, kept) for d, learnt, kept in found if learnt and kept]


def _plane_panel(axes: Any, results: Results, block: Block) -> list[Label]:
    """Draw BWT over what was learnt. Where all is measured, final average = learnt + BWT (T-1)/T: the slanted lines."""
    dots, per_unit = _dots(results, block), 100 if block == "accuracy" else 1
    unit = "points" if block == "accuracy" else "nats"
    for d, learnt, kept in dots:
        axes.errorbar([per_unit * learnt.mean], [per_unit * kept.mean], xerr=2 * per_unit * (learnt.stderr or 0),
                      yerr=2 * per_unit * (kept.stderr or 0), color=d.colour, marker=d.marker, ms=9, mec="white",
                      mew=0.8, elinewidth=0.9, zorder=4)  # fmt: skip
    axes.axhline(0, color=_GREY, lw=1.1, ls=":", zorder=1)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel(f"learnt: gain when learnt, {unit}  →")
    axes.set_ylabel(f"kept: backward transfer, {unit}  →")
    best = results.best(block)
    finding = f"highest final average of the merges: {best.name}" if best else "up and right is better"
    _title(axes, "Learning against forgetting", f"{finding}; slanted lines join equal final averages")
    axes.contmerge_stages = ["base", *(stage.name for stage in results.stages[: results.last])]
    axes.contmerge_dots = [(per_unit * a.mean, per_unit * b.mean, d.label, d.colour) for d, a, b in dots]
    return []


def _slants(axes: Any, share: float) -> None:
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    low, high = x0 + share * y0, x1 + share * y1
    for k in range(1, 8):
        total = low + (high - low) * k / 8
        axes.plot([x0, x1], [(total - x0) / share, (total - x1) / share], color=_FAINT, lw=1.2, zorder=0)
    axes.set(xlim=(x0, x1), ylim=(y0, y1))


def _stage_axis(axes: Any, results: Results, *, learnt: int | None) -> None:
    if learnt:
        axes.axvspan(learnt - 0.22, learnt + 0.22, color=_FAINT, lw=0, zorder=0)
    axes.contmerge_stages = ["base", *(s.name for s in results.stages[: results.last])]
    axes.set_xticks(range(results.last + 1))
    axes.set_xlim(-0.25, results.last + 0.25)
    axes.set_xlabel("after stage", loc="left")
    axes.spines["bottom"].set_bounds(-0.25, results.last + 0.25)


def _value_axis(axes: Any, block: Block, text: str) -> None:
    """Mark utilities by what users know: perplexities on a log scale, or percent."""
    _room(axes, block)
    axes.set_ylabel(text)
    if block == "accuracy":
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f}%")
        return
    low, high = (math.exp(-u) for u in reversed(axes.get_ylim()))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), _FINE):
        ticks = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    ticks = ticks[:: math.ceil(len(ticks) / 7)]
    axes.set_yticks([-math.log(p) for p in ticks], [f"{p:,.4g}" for p in ticks])


def _room(axes: Any, block: Block) -> None:
    """Leave some air, and do not blow up differences that mean nothing to fill a panel."""
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    short = max(0.0, {"perplexity": 0.05, "accuracy": 0.04}[block] - (high - low))
    axes.set_ylim(low - short / 2, high + short / 2)


def _title(axes: Any, title: str, finding: str) -> None:
    axes.contmerge_title = (title, finding)


def _finish(figure: Any, ends: Sequence[tuple[Any, list[Label]]]) -> None:
    """Set what needs the panels' final sizes: wrapped titles, room for the labels, their heights."""
    figure.draw_without_rendering()
    wrapped = []
    for axes, _ in ends:
        width = axes.get_window_extent().width * 72 / figure.dpi
        wrapped.append(textwrap.wrap(axes.contmerge_title[1], max(20, int(width / (8.5 * LETTER)))))
    room = 11.5 * max(map(len, wrapped), default=0)
    for (axes, _), lines in zip(ends, wrapped, strict=True):
        title = axes.contmerge_title[0]
        axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=_INK, pad=12 + room)
        axes.annotate("\n".join(lines), (0, 1), (0, 7 + room), xycoords="axes fraction", textcoords="offset points",
                      fontsize=8.5, color=_GREY, va="top", linespacing=1.15)  # fmt: skip
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, labels in ends:
        label_ends(axes, labels)
        if dots := getattr(axes, "contmerge_dots", None):
            label_dots(axes, dots)
            stages = max(len(axes.contmerge_stages) - 1, 2)
            _slants(axes, (stages - 1) / stages)
