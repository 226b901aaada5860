"""The report of a study: lines by setting, over orders and seeds.

    report/  index.html   one file; the picture is inside
             study.md     the same as Markdown
             study.tex    the main tables for a paper (booktabs)
             study.csv    a row per cell, line and block: all metrics, seconds, bytes of peak memory
             study.json   the same, with the comparison and its intervals
             study.png    the picture, if anything was measured

A line (a merge entry, plain fine-tuning) is compared with the reference line in equal cells: same order, same seed,
same documents. Intervals: scoring/forgetting/crossed.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_contmerge.errors import RunError, size, unknown
from hf_contmerge.report._findings import METRICS, amount, interval, known_metrics
from hf_contmerge.report._pictures import Dot, Form, draw_dots
from hf_contmerge.report._results import SCOPES, Results, line_label, scopes
from hf_contmerge.report._svg import inlined
from hf_contmerge.report._tables import (
    Cell,
    Picture,
    Section,
    Table,
    change_cell,
    costs,
    estimate_cell,
    line_cost,
    metric_cell,
)
from hf_contmerge.report._templates import fill
from hf_contmerge.report._terminal import rich_table
from hf_contmerge.report.write import csv_text, load_results
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import BASELINES, ORACLE, ROUTED
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.study import StudyCell
from hf_contmerge.run.scores import BLOCKS, Block
from hf_contmerge.scoring.forgetting.crossed import crossed_change
from hf_contmerge.scoring.forgetting.lines import RATIOS, SIDES, Line
from hf_contmerge.scoring.forgetting.matrix import ratio
from hf_contmerge.scoring.forgetting.paired import Change, mean_change, mean_of_runs

PLAIN = "fine-tuning alone"
_LITERATURE = ("acc", "bwt", "fwt", "general_delta", *SIDES)
_SHOWN = ("la", *_LITERATURE)
_UNMEASURED = (
    "Nothing was measured, so that no lines can be compared: give the stages held-out examples or `tasks`, or the "
    "recipe `evaluate.general_tasks`."
)

At = tuple[int, int]
"""Order and seed."""


@dataclass(frozen=True)
class StudyLine:
    """A line of a setting: its scores in each cell."""

    setting: str
    name: str
    cells: Mapping[At, tuple[Results, Line]]
    costs: Mapping[At, tuple[float, int | None]] = field(default_factory=dict)
    """What the last model cost in each cell: seconds, bytes of peak memory."""
    _metrics: dict[Block, dict[At, dict[str, float | None]]] = field(default_factory=dict, init=False, repr=False)
    _estimates: dict[tuple[Block, str], Change | None] = field(default_factory=dict, init=False, repr=False)

    @property
    def title(self) -> str:
        return f"{self.setting}: {self.name}"

    def metrics(self, block: Block) -> dict[At, dict[str, float | None]]:
        """Return each cell's metrics of one block."""
        if block not in self._metrics:
            self._metrics[block] = {
                at: line.metrics(r.stages, r.general_tasks, block) for at, (r, line) in self.cells.items()
            }
        return self._metrics[block]

    def mean(self, block: Block, metric: str) -> float | None:
        """Return a metric's mean over the cells, None if one lacks it.

        A quotient is that of the means.
        """
        if metric in RATIOS:
            parts = [x.fractions(r.stages, r.general_tasks, block)[metric] for r, x in self.cells.values()]
            known = [part for part in parts if part]
            return ratio((fmean(a for a, _ in known), fmean(b for _, b in known))) if len(known) == len(parts) else None
        values = [found[metric] for found in self.metrics(block).values()]
        return fmean(v for v in values if v is not None) if values and None not in values else None

    def estimate(self, block: Block, metric: str) -> Change | None:
        """Return a metric's mean over the cells with its interval; computed once."""
        if (block, metric) not in self._estimates:
            each = {at: x.estimate(metric, r.stages, r.general_tasks, block) for at, (r, x) in self.cells.items()}
            self._estimates[block, metric] = self.over_runs(each, block)
        return self._estimates[block, metric]

    def over_runs(self, changes: Mapping[At, Change | None], block: Block) -> Change | None:
        """Return the mean of each cell's change, None if one lacks it."""
        known = {at: change for at, change in sorted(changes.items()) if change}
        if not known or len(known) < len(changes):
            return None
        found = crossed_change({at: change.mean for at, change in known.items()}, mean_of_runs(list(known.values())))
        return replace(found, matters=next(iter(self.cells.values()))[0].matters.get(block, 0.0))

    def measures(self, block: Block) -> bool:
        """Say if all cells have stages or general tasks of the block."""
        return self.mean(block, "acc") is not None or self.mean(block, "general_delta") is not None


@dataclass(frozen=True)
class StudyResults:
    """The finished cells of a study."""

    name: str
    orders: Mapping[int, tuple[str, ...]]
    """Names of the stages by order."""
    seeds: tuple[int, ...]
    runs: Mapping[tuple[str, At], Run]
    lines: tuple[StudyLine, ...]
    asked: str | None = None
    """The reference line, if the study names one."""
    _changes: dict[tuple[str, Block, str], Change | None] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def blocks(self) -> list[Block]:
        """Measured blocks: of stages first, then of general tasks alone."""
        others: list[Block] = [b for b in reversed(BLOCKS) if b not in self.of_stages]
        return [*self.of_stages, *(b for b in others if any(line.measures(b) for line in self.lines))]

    @cached_property
    def of_stages(self) -> list[Block]:
        """The blocks with measured stages, perplexity first."""
        return [b for b in reversed(BLOCKS) if any(line.mean(b, "acc") is not None for line in self.lines)]

    @cached_property
    def reference(self) -> StudyLine:
        """The line for comparisons.

        Raises RunError for an unknown one, or if nothing was measured.
        """
        if not self.blocks:
            raise RunError(f"Study {self.name} has no reference. {_UNMEASURED}")
        block, metric = self.blocks[0], self.metric(self.blocks[0])
        measured = [line for line in self.lines if line.mean(block, metric) is not None]
        wanted = self.asked or PLAIN
        named = [line for line in measured if wanted in (line.title, line.name)]
        if self.asked and not named:
            raise RunError(unknown("line", wanted, {word for x in measured for word in (x.title, x.name)}))
        lines = named or [line for line in measured if line.name not in map(line_label, BASELINES)]
        return max(lines or measured, key=lambda line: line.mean(block, metric) or 0.0)

    def metric(self, block: Block) -> str:
        """Return what lines are ranked by.

        ACC, or without stages in the block the general tasks' change.
        """
        return "acc" if block in self.of_stages else "general_delta"

    def change(self, line: StudyLine, block: Block, scope: str) -> Change | None:
        """Return a line's difference from the reference, over common cells; computed once."""
        key = (line.title, block, scope)
        if key not in self._changes:
            self._changes[key] = self._change(line, block, scope)
        return self._changes[key]

    def _change(self, line: StudyLine, block: Block, scope: str) -> Change | None:
        changes: dict[At, Change | None] = {}
        for at in line.cells.keys() & self.reference.cells.keys():
            (results, mine), (_, theirs) = line.cells[at], self.reference.cells[at]
            groups = scopes(results.stages, results.general_tasks, mine.rows[-1], theirs.rows[-1])[scope]
            changes[at] = mean_change(groups, block)
        return line.over_runs(changes, block)

    def better_in(self, line: StudyLine, block: Block) -> tuple[int, int]:
        """Return the counts of cells above the reference, and of those compared.

        They are compared by `metric`, where both have it.
        """
        metric, mine, theirs = self.metric(block), line.metrics(block), self.reference.metrics(block)
        pairs = [(mine[at][metric], theirs[at][metric]) for at in mine if at in theirs]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        return sum(a > b for a, b in known), len(known)

    def compared(self, block: Block) -> Iterator[StudyLine]:
        """Yield the measured lines besides the reference."""
        return (x for x in self.lines if x is not self.reference and x.measures(block))


def load_study_results(
    name: str, runs: Sequence[tuple[StudyCell, Run]], seeds: Sequence[int], reference: str | None = None
) -> StudyResults:
    """Load the results of a study's finished cells. Raises RunError without any."""
    done = [(cell, run) for cell, run in runs if run.is_complete()]
    if not done:
        raise RunError(f"No cell of study {name} is finished, so there is nothing to report.")
    found: dict[tuple[str, str], dict[At, tuple[Results, Line]]] = {}
    costs: dict[tuple[str, str], dict[At, tuple[float, int | None]]] = {}
    for cell, run in done:
        results = load_results(run)
        for label, line in results.named_lines():
            if len(line.rows) > 1:
                key, at = (cell.setting, label), (cell.order, cell.seed)
                found.setdefault(key, {})[at] = results, line
                costs.setdefault(key, {})[at] = line_cost(run, line, merged=line in results.merges)
    orders = {cell.order: tuple(stage.name for stage in cell.recipe.stages) for cell, _ in runs}
    lines = tuple(StudyLine(*key, cells, costs[key]) for key, cells in found.items())
    by_cell = {(cell.setting, (cell.order, cell.seed)): run for cell, run in done}
    return StudyResults(name, orders, tuple(seeds), by_cell, lines, reference)


def line_names(recipe: Recipe, kinds: Iterable[str]) -> set[str]:
    """Return the names of a recipe's lines; `kinds`: of its experts."""
    experts = {*kinds, *recipe.baselines, *((ROUTED, ORACLE) if recipe.evaluate.routed else ())}
    if len(recipe.stages) == 1:
        experts |= {"base", "previous"}
    elif not recipe.evaluate.routed:  # experts for a stage each are measured on all with a router only
        experts -= {"base"}
    return {*(entry.name for entry in recipe.merge), *map(line_label, experts)}


# Words


def findings(study: StudyResults) -> list[str]:
    """Return a sentence on the grid, then one for each line."""
    cells = len(study.runs)
    said = [
        f"{cells} runs: {len(study.orders)} order{'s' * (len(study.orders) != 1)} of the stages, {len(study.seeds)} "
        f"seed{'s' * (len(study.seeds) != 1)}. "
        + (f"Reference: {study.reference.title}." if study.blocks else _UNMEASURED)
    ]
    for block in study.blocks:
        for line in study.compared(block):
            parts = [
                f"{change.seen} on {scope} ({amount(change.mean, block)}, {interval(change, block)})"
                for scope in SCOPES
                if (change := study.change(line, block, scope))
            ]
            wins, of = study.better_in(line, block)
            parts += [f"better in {wins} of {of} cells"] if of else []
            parts = parts or [f"not compared, because {study.reference.title} was not measured on the same"]
            said.append(f"{line.title}, {block}: {'; '.join(parts)}.")
    return said


# Tables


def sections(study: StudyResults) -> list[Section]:
    """Return the parts of the page; without measurements, the costs alone."""
    if not study.blocks:
        return [Section("Costs", tables=[_costs(study)])]
    against = (
        f"Difference from {study.reference.title} after the last stage, in cells of the same order and seed, paired by "
        "document. 95 % intervals over orders, seeds and documents; ≈: no difference seen."
    )
    orders = "; ".join(f"{number}: {', '.join(stages)}" for number, stages in study.orders.items())
    parts = {
        "Against the reference": (against, _against, study.blocks),
        "Means over orders and seeds": ("", _means, study.blocks),
        "Order by order": (f"ACC, mean over seeds. Orders: {orders}.", _by_order, study.of_stages),
        "All at the end": (_AT_THE_END, _literature, study.blocks),
    }
    shown = [Section(title, intro, [table(study, b) for b in of]) for title, (intro, table, of) in parts.items()]
    shown[0] = replace(shown[0], pictures=_pictures(study))
    return [*shown, Section("Costs", tables=[_costs(study)])]


def _pictures(study: StudyResults) -> list[Picture]:
    alt = f"Difference of each line from {study.reference.title}, with 95 % intervals"
    return [Picture(inlined(draw(study, block).decode()), f"{alt}, {block}") for block in study.blocks]


def draw(study: StudyResults, block: Block, form: Form = "svg") -> bytes:
    """Return a picture: differences from the reference with intervals."""
    dots = [
        Dot(line.title, scope, change)
        for line in study.compared(block)
        for scope in SCOPES
        if (change := study.change(line, block, scope))
    ]
    return draw_dots(dots, block, title=f"Against {study.reference.title}", form=form)


def _against(study: StudyResults, block: Block) -> Table:
    rows = []
    for line in study.compared(block):
        wins, of = study.better_in(line, block)
        cells = [change_cell(study.change(line, block, scope), block) for scope in SCOPES]
        hint = "cells with a higher " + ("ACC" if block in study.of_stages else "change on general tasks")
        rows.append([Cell(line.title), *cells, Cell(f"{wins} of {of}", hint) if of else Cell()])
    return Table(f"{block}, against {study.reference.title}", ("line", *SCOPES, "better in"), rows)


def _means(study: StudyResults, block: Block) -> Table:
    lines = [x for x in study.lines if x.measures(block)]
    found = {x.title: {m: x.mean(block, m) for m in METRICS} for x in lines}
    names = known_metrics(found.values())
    rows = [[Cell(title), *(metric_cell(values[m], block, m) for m in names)] for title, values in found.items()]
    return Table(f"{block}", ("line", *(METRICS[m].short for m in names)), rows)


def _by_order(study: StudyResults, block: Block) -> Table:
    """Return the table of ACC by order, then means."""
    rows = []
    for line in study.lines:
        if line.mean(block, "acc") is None:
            continue
        found = line.metrics(block)
        each = [_mean(found[at]["acc"] for at in found if at[0] == order) for order in study.orders]
        means = [line.mean(block, metric) for metric in ("acc", "bwt", "fwt")]
        rows.append(
            [Cell(line.title), *(metric_cell(v, block, "acc") for v in each)]
            + [metric_cell(v, block, m) for v, m in zip(means, ("acc", "bwt", "fwt"), strict=True)]
        )
    header = ("line", *(f"order {number}" for number in study.orders), "AA", "BWT", "FWT")
    return Table(block, header, rows)


_AT_THE_END = (
    "Means over orders and seeds, with 95 % intervals over orders, seeds and documents. Seconds are those of the "
    "trainings and merges behind the last model, as if each line had done them alone; the peak memory is their largest."
)


def _literature(study: StudyResults, block: Block) -> Table:
    """Return the table of the literature: metrics with intervals, and costs."""
    lines = [x for x in study.lines if x.measures(block)]
    names = [m for m in _LITERATURE if m not in SIDES or any(x.mean(block, m) is not None for x in lines)]
    rows = [
        [Cell(x.title), *(estimate_cell(x.mean(block, m), x.estimate(block, m), block, m) for m in names), *_spent(x)]
        for x in lines
    ]
    header = ("line", "AA", *(METRICS[m].short for m in names[1:]), "seconds", "peak memory")
    return Table(block, header, rows)


def _spent(line: StudyLine) -> list[Cell]:
    """Return a line's mean seconds and peak memory."""
    peaks = [peak for _, peak in line.costs.values() if peak is not None]
    seconds = fmean(spent for spent, _ in line.costs.values())
    memory = Cell(size(fmean(peaks)), "mean over the cells") if peaks else Cell()
    return [Cell(f"{seconds:.0f}", "mean over the cells"), memory]


def _mean(values: Iterator[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def _costs(study: StudyResults) -> Table:
    """Return seconds of training, merging and scoring per setting, shared work once."""
    rows = []
    for setting in dict.fromkeys(name for name, _ in study.runs):
        spent: dict[str, float] = {}
        shared = 0.0
        for (name, _), run in study.runs.items():
            for cost in costs(run) if name == setting else ():
                if cost.shared:
                    shared += cost.seconds or 0.0
                else:
                    spent[cost.phase] = spent.get(cost.phase, 0.0) + (cost.seconds or 0.0)
        each = [Cell(f"{spent.get(phase, 0.0):.0f} s") for phase in ("train", "merge", "score")]
        rows.append([Cell(setting), *each, Cell(f"{shared:.0f} s", "training of experts linked from other cells")])
    return Table("Seconds", ("setting", "train", "merge", "score", "saved by sharing"), rows)


# Files


def write_study_report(study: StudyResults, folder: Path) -> Path:
    """Write the report's files; return the page."""
    from hf_contmerge.runtime.files import make_folder, put_in_place, remove

    scratch = folder.with_name(f".{folder.name}")
    remove(scratch)
    make_folder(scratch)
    said, parts = findings(study), sections(study)
    shown = {"title": f"Study {study.name}", "findings": said, "sections": parts}
    (scratch / "index.html").write_text(fill("compare.html", **shown), encoding="utf-8")
    (scratch / "study.md").write_text(fill("compare.md", **shown), encoding="utf-8")
    tables = [table for part in parts[2:4] for table in part.tables]
    (scratch / "study.tex").write_text(fill("study.tex", tables=tables), encoding="utf-8")
    (scratch / "study.json").write_text(json.dumps(_summary(study, said), indent=1) + "\n", encoding="utf-8")
    if study.blocks:
        (scratch / "study.png").write_bytes(draw(study, study.blocks[0], "png"))
    (scratch / "study.csv").write_bytes(csv_text(_rows(study)).encode())
    put_in_place(scratch, folder)
    return folder / "index.html"


def _summary(study: StudyResults, said: Sequence[str]) -> dict[str, Any]:
    return {
        "study": study.name, "findings": list(said), "reference": study.reference.title if study.blocks else None,
        "orders": study.orders, "seeds": study.seeds,
        "lines": [
            {"line": x.title, "block": b, "mean": {m: x.mean(b, m) for m in _SHOWN},
             "intervals": {m: _limits(x.estimate(b, m), judged=m != "acc") for m in _LITERATURE}, **_cost_facts(x),
             "against_reference": {s: _limits(study.change(x, b, s)) for s in SCOPES} if x is not study.reference
             else None}
            for b in study.blocks for x in study.lines if x.measures(b)
        ],
    }  # fmt: skip


def _cost_facts(line: StudyLine) -> dict[str, Any]:
    """Return a line's mean seconds, and bytes of peak memory."""
    peaks = [peak for _, peak in line.costs.values() if peak is not None]
    return {
        "seconds": fmean(spent for spent, _ in line.costs.values()),
        "peak_memory_bytes": fmean(peaks) if peaks else None,
    }


def _limits(found: Change | None, *, judged: bool = True) -> dict[str, Any] | None:
    """Return an interval; a level, not `judged`, is neither better nor worse."""
    if not found:
        return None
    limits = {"mean": found.mean, "low": found.low, "high": found.high}
    return {**limits, "seen": found.seen} if judged else limits


def _rows(study: StudyResults) -> Iterator[Sequence[Any]]:
    yield "setting", "line", "order", "seed", "block", *METRICS, "seconds", "peak_memory_bytes"
    for block in study.blocks:
        for line in study.lines:
            for (order, seed), found in line.metrics(block).items():
                if found["acc"] is not None or found["general_delta"] is not None:
                    metrics = (found[m] for m in METRICS)
                    yield line.setting, line.name, order, seed, block, *metrics, *line.costs[order, seed]


def print_study(study: StudyResults) -> None:
    """Print the comparison and the findings."""
    from rich.console import Console

    console = Console()
    for block in study.blocks:
        console.print(rich_table(_against(study, block)), "")
    for sentence in findings(study):
        console.print(sentence, highlight=False, markup=False)
