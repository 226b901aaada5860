"""The picture's panels: stages, general ability, the learning plane, searches.

All show changes against the base model, paired by document, with intervals. Up is better everywhere. A hollow marker is
a change inside the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hf_contmerge.report._axes import COLOURS, GREY, INK, MARKERS, change_axis, stage_axis, unit_label
from hf_contmerge.report._findings import amount, fate, gained, interval, natural, relative
from hf_contmerge.report._labels import Dot, Label, fitted
from hf_contmerge.report._results import Results, any_score, line_label
from hf_contmerge.report._svg import Spot, line_group
from hf_contmerge.run.places import JOINT
from hf_contmerge.run.scores import Block, Scores
from hf_contmerge.scoring.forgetting.lines import Line
from hf_contmerge.scoring.forgetting.paired import Change

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED = 4  # stages; with more, a panel has no room for a word between its lines


@dataclass(frozen=True)
class Panel:
    """A panel. `of`: the stage's number for the kind `stage`, else None."""

    kind: str
    block: Block
    of: int | None = None
    limits: tuple[float, float] | None = None
    """The range of all panels of stages in this block."""

    def alt_text(self, results: Results) -> str:
        """Describe the panel in words, as alternative text."""
        if self.of:
            return f"Stage {results.stages[self.of - 1].name}: {_stage_finding(results, self.of, self.block)}"
        return f"General ability ({self.block})" if self.kind == "general" else "Learning against forgetting"


@dataclass(frozen=True)
class StyledLine:
    """A line with its looks."""

    line: Line
    label: str
    colour: str
    marker: str
    dash: str
    number: int = 0
    """Of the line in the page's choice; 0 for none."""

    @property
    def group(self) -> str:
        return line_group(self.number)


@dataclass(frozen=True)
class Drawing:
    """Texts of a panel, placed once its size is known."""

    title: str
    finding: str
    stages: tuple[str, ...]
    labels: Sequence[Label] = ()
    dots: Sequence[Dot] = ()
    """Dots of the plane, which also gets lines of equal final average."""
    worse: str = ""
    """Text of the shaded region."""
    spots: Sequence[Spot] = ()
    """Points with a hint, on a page."""


def panels(results: Results) -> list[Panel]:
    """Return the panels with data: stages, general abilities, the plane."""
    blocks: dict[int, Block] = {j: block for j in results.shown if (block := stage_block(results, j))}
    limits = {block: _common_limits(results, block) for block in set(blocks.values())}
    stages = [Panel("stage", block, j, limits[block]) for j, block in blocks.items()]
    measured = [results.base[t].block for t in results.general_tasks if t in results.base]
    general = [Panel("general", b) for b in results.blocks() if results.last and b in measured]
    planes = [Panel("plane", b) for b in results.stage_blocks()[:1] if _dots(results, b)]
    return [*stages, *general, *planes]


def draw_panel(axes: Axes, results: Results, panel: Panel) -> Drawing:
    """Draw a panel; return its texts."""
    if panel.kind == "stage":
        return _stage_panel(axes, results, panel)
    return (_general_panel if panel.kind == "general" else _plane_panel)(axes, results, panel.block)


def stage_block(results: Results, j: int) -> Block | None:
    """Return a stage's block: perplexity if measured, as for held-out texts."""
    names = results.stages[j - 1].task_names()
    return next((b for b in results.blocks() if any(_is(results, t, b) for t in names)), None)


def _is(results: Results, task: str, block: Block) -> bool:
    score = any_score(results, task)
    return score is not None and score.block == block


def drawn_lines(results: Results) -> list[StyledLine]:
    """Return the lines in drawing order: plain fine-tuning, then merges."""
    plain = [StyledLine(results.baseline, line_label("previous"), INK, "X", "--", 1)] if results.baseline else []
    return plain + [
        StyledLine(line, line.name, COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)], "-", i + 2)
        for i, line in enumerate(results.merges)
    ]


@dataclass(frozen=True)
class _Point:
    """A change after a stage, and its mark for noise."""

    stage: int
    change: Change
    hollow: bool


def _stage_points(results: Results, line: Line, j: int, block: Block) -> list[_Point]:
    names, points = results.stages[j - 1].task_names(), []
    for t, row in _shown_rows(results, line):
        change = results.change(row, results.base, names, block)
        if change is None:
            continue
        since = results.change(row, line.rows[j], names, block) if t > j else change
        points.append(_Point(t, change, hollow=since is None or since.sign == 0))
    return points


def _shown_rows(results: Results, line: Line) -> list[tuple[int, Scores]]:
    """Return (stage, scores) of the stages shown."""
    return [(t, line.rows[t]) for t in results.shown if t < len(line.rows)]


def _stage_panel(axes: Axes, results: Results, panel: Panel) -> Drawing:
    j, block = panel.of, panel.block
    assert j
    tasks = [t for t in results.stages[j - 1].task_names() if _is(results, t, block)]
    labels = [Label(0.0, _at_end("base", results.base, tasks, 0.0, block), GREY)]
    axes.plot([0, results.last], [0, 0], color=GREY, lw=1.1, ls=":", zorder=1)
    independent = next((x for x in results.experts if x.name == "base" and j < len(x.rows)), None)
    alone = results.change(independent.rows[j], results.base, tasks, block) if independent and j > 1 else None
    if alone and independent:
        axes.plot([j], [alone.mean], "*", ms=12, color="#F0E442", mec=INK, mew=0.8, zorder=6)
        axes.plot([j, results.last], [alone.mean] * 2, color=GREY, lw=0.7, zorder=1)
        labels.append(Label(alone.mean, _at_end("★ trained alone", independent.rows[j], tasks, alone.mean, block), INK))
    labels += _joint_line(axes, results, tasks, block)
    spots = list[Spot]()
    for i, d in enumerate(drawn := drawn_lines(results)):
        points = _stage_points(results, d.line, j, block)
        spots += _spots(results, d, points, tasks, block, 0.05 * (i - (len(drawn) - 1) / 2))
        _trace(axes, d, points, 0.05 * (i - (len(drawn) - 1) / 2))
        if points and points[-1].stage == len(d.line.rows) - 1:
            end = points[-1].change.mean
            labels.append(Label(end, _at_end(d.label, d.line.rows[-1], tasks, end, block), d.colour, d.group))
        if d.line is results.baseline and results.last <= _NAMED:
            _name_drop(axes, [p for p in points if p.stage >= j])
    stage_axis(axes, results, learnt=j)
    change_axis(axes, block, panel.limits)
    title, finding = f"{j} · {results.stages[j - 1].name}", _stage_finding(results, j, block)
    return Drawing(title, finding, _stage_names(results), labels, worse="worse than the base", spots=spots)


def _spots(
    results: Results, d: StyledLine, points: Sequence[_Point], tasks: Sequence[str], block: Block, shift: float
) -> list[Spot]:
    """Return a hint for each point: line, stage, score, change."""
    spots = []
    for point in points:
        row, change = d.line.rows[point.stage], point.change
        value = f"{natural(row[tasks[0]].value, block)}, " if len(tasks) == 1 and tasks[0] in row else ""
        limits = f" ({interval(change, block)})" if change.low is not None else ""
        name = f"{fitted(d.label, 110, 8)} after {fitted(_stage_names(results)[point.stage], 90, 8)}"
        facts = f"{value}{amount(change.mean, block)}{limits}"
        spots.append(Spot(point.stage + shift, change.mean, name, facts, d.number))
    return spots


def _joint_line(axes: Axes, results: Results, tasks: Sequence[str], block: Block) -> list[Label]:
    """Draw joint training's level, if measured; return the label."""
    row = results.joint.rows[-1] if results.joint else {}
    change = results.change(row, results.base, tasks, block)
    if not change:
        return []
    axes.plot([0, results.last], [change.mean] * 2, color=INK, lw=1.1, ls=(0, (6, 3)), zorder=1)
    return [Label(change.mean, _at_end(line_label(JOINT), row, tasks, change.mean, block), INK)]


def _at_end(name: str, row: Any, tasks: Sequence[str], change: float, block: Block) -> str:
    """Return a label: the score, or the change for several tasks."""
    if len(tasks) == 1 and tasks[0] in row:
        return f"{name} {natural(row[tasks[0]].value, block)}"
    return _with_change(name, change, block) if change else name


def _with_change(name: str, change: float, block: Block) -> str:
    return f"{name} {relative(change, block).removesuffix(' points')}"


def _name_drop(axes: Axes, points: Sequence[_Point]) -> None:
    """Name the steepest proven fall of plain fine-tuning."""
    if len(points) < 2 or points[-1].hollow or points[-1].change.mean > points[0].change.mean:
        return
    a, b = min(pairwise(points), key=lambda pair: pair[1].change.mean - pair[0].change.mean)
    at = ((a.stage + b.stage) / 2, (a.change.mean + b.change.mean) / 2)
    side, towards = ("left", 8) if b.stage < points[-1].stage else ("right", -8)  # off the labels on the right
    axes.annotate("forgotten", at, (towards, 0), textcoords="offset points", color=INK, fontsize=9.5, style="italic",
                  ha=side, va="center", zorder=7)  # fmt: skip


def _trace(axes: Axes, d: StyledLine, points: Sequence[_Point], shift: float) -> None:
    if not points:
        return
    x, y = [p.stage + shift for p in points], [p.change.mean for p in points]
    axes.plot([0, x[0]], [0, y[0]], color=d.colour, lw=0.9, ls=(0, (1, 2)), alpha=0.5, zorder=2, gid=d.group)
    axes.plot(x, y, color=d.colour, ls=d.dash, lw=2.0, alpha=0.95, zorder=4, gid=d.group)
    reach = _bars([p.change for p in points])
    bars = axes.errorbar(x, y, yerr=reach, color=d.colour, ls="none", elinewidth=1, zorder=4)
    for part in bars.get_children():
        part.set_gid(d.group)
    for fill, hollow in (("white", True), (d.colour, False)):
        marked = [(at, value) for at, value, point in zip(x, y, points, strict=True) if point.hollow == hollow]
        if marked:
            axes.plot(*zip(*marked, strict=True), d.marker, ms=5.8, mfc=fill, mec=d.colour, mew=1.3, zorder=5,
                      gid=d.group)  # fmt: skip


def _bars(changes: Sequence[Change]) -> list[list[float]]:
    """Return the intervals' reach below and above, where known."""
    below = [c.mean - c.low if c.low is not None else 0.0 for c in changes]
    above = [c.high - c.mean if c.high is not None else 0.0 for c in changes]
    return [[max(0.0, v) for v in below], [max(0.0, v) for v in above]]


def _stage_finding(results: Results, j: int, block: Block) -> str:
    """Describe a stage since it was learnt; the last one by learning."""
    names = results.stages[j - 1].task_names()
    ends = [(c.mean, x) for x in results.merges if len(x.rows) > j
            and (c := results.change(x.rows[-1], results.base, names, block))]  # fmt: skip
    best = max(ends, key=lambda pair: pair[0])[1] if ends else None
    clauses = []
    for line, name in ((results.baseline, line_label("previous")), (best, best.name if best else "")):
        if line is None or len(line.rows) <= j:
            continue
        if j < len(line.rows) - 1:
            clauses.append(f"{name} {fate(results.change(line.rows[-1], line.rows[j], names, block), block)}")
        else:
            clauses.append(f"{name} {gained(results.change(line.rows[j], results.base, names, block), block)}")
    return ("then " if j < results.last else "learnt last: ") + "; ".join(clauses) if clauses else ""


def _general_panel(axes: Axes, results: Results, block: Block) -> Drawing:
    labels, clauses, ends, spots = [Label(0.0, "base", GREY)], [], [], list[Spot]()
    axes.plot([0, results.last], [0, 0], color=GREY, lw=1.1, ls=":", zorder=1)
    tasks = [t for t in results.general_tasks if t in results.base and results.base[t].block == block]
    labels += _joint_line(axes, results, tasks, block)
    for i, d in enumerate(drawn := drawn_lines(results)):
        changes = [(t, results.change(row, results.base, tasks, block)) for t, row in _shown_rows(results, d.line)]
        points = [_Point(t, c, hollow=c.sign == 0) for t, c in changes if c]
        spots += _spots(results, d, points, tasks, block, 0.05 * (i - (len(drawn) - 1) / 2))
        _trace(axes, d, points, 0.05 * (i - (len(drawn) - 1) / 2))
        if points and points[-1].stage == len(d.line.rows) - 1:
            last = points[-1].change
            labels.append(Label(last.mean, _with_change(d.label, last.mean, block), d.colour, d.group))
            ends.append((last.mean, d, last))
    plain = [e for e in ends if e[1].line is results.baseline]
    merged = max((e for e in ends if e[1].line is not results.baseline), key=lambda e: e[0], default=None)
    for _, d, change in (*plain, *([merged] if merged else [])):
        clauses.append(f"{d.label} {fate(change, block).replace('forgot', 'lost')}")
    stage_axis(axes, results, learnt=None)
    change_axis(axes, block, None)
    title, finding = f"General ability ({block})", "; ".join(clauses) or ", ".join(tasks)
    return Drawing(title, finding, _stage_names(results), labels, worse="worse than the base", spots=spots)


def _dots(results: Results, block: Block) -> list[tuple[StyledLine, Change, Change]]:
    others = [x for x in results.experts if x.name.startswith("merged-")]
    lines = [*drawn_lines(results), *(StyledLine(x, line_label(x.name), GREY, "o", "-") for x in others)]
    changes = [(d, results.learnt(d.line, block), results.kept(d.line, block)) for d in lines]
    return [(d, learnt, kept) for d, learnt, kept in changes if learnt and kept]


def _plane_panel(axes: Axes, results: Results, block: Block) -> Drawing:
    """Draw BWT over learning, with lines of equal final average."""
    dots, per_unit = _dots(results, block), 100 if block == "accuracy" else 1
    unit = "points" if block == "accuracy" else "nats"
    for d, learnt, kept in dots:
        x, y = [[[per_unit * v for v in side] for side in _bars([c])] for c in (learnt, kept)]
        axes.errorbar([per_unit * learnt.mean], [per_unit * kept.mean], xerr=x, yerr=y, color=d.colour,
                      marker=d.marker, ms=9, mec=d.colour, mew=1.3, mfc="white" if kept.sign == 0 else d.colour,
                      elinewidth=0.9, zorder=4)  # fmt: skip
    axes.axhline(0, color=GREY, lw=1.1, ls=":", zorder=1)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel(f"learnt: gain when learnt, {unit}, → better", loc="left")
    unit_label(axes, f"kept: backward transfer, {unit}, ↑ better")
    best = results.best(block)
    finding = f"highest final average of the merges: {best.name}" if best else "up and right is better"
    return Drawing(
        "Learning against forgetting",
        f"{finding}; slanted lines: equal final average",
        _stage_names(results),
        dots=[Dot(per_unit * learnt.mean, per_unit * kept.mean, d.label, d.colour) for d, learnt, kept in dots],
    )


def _stage_names(results: Results) -> tuple[str, ...]:
    return ("base", *(stage.name for stage in results.stages[: results.last]))


def _common_limits(results: Results, block: Block) -> tuple[float, float] | None:
    """Return the range of a block's panels, for one scale."""
    values = [
        value
        for j in results.shown if stage_block(results, j) == block
        for d in drawn_lines(results)
        for point in _stage_points(results, d.line, j, block)
        for value in (point.change.mean, point.change.low, point.change.high) if value is not None
    ]  # fmt: skip
    joint = results.joint.rows[-1] if results.joint else {}
    stages = [results.stages[j - 1].task_names() for j in results.shown if stage_block(results, j) == block]
    values += [c.mean for names in stages if (c := results.change(joint, results.base, names, block))]
    return (min(0.0, *values), max(0.0, *values)) if values else None
