"""Several runs next to each other: recipes, metrics, models on equal documents.

    contmerge compare RUN RUN... [--out DIR]        DIR/ index.html  compare.md  compare.csv

The first run is the reference: each line of another run (a way of learning: a merge entry, plain fine-tuning ...) is
compared with the reference's line of the same name, both after their last stage. Without a common merge entry, the best
entries are compared. Differences are paired by document; tasks measured on other documents are listed, not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ResourceError, RunError
from hf_contmerge.report._findings import amount, interval, natural
from hf_contmerge.report._pictures import Dot, draw_dots
from hf_contmerge.report._results import Results
from hf_contmerge.report._svg import inlined
from hf_contmerge.report._tables import Cell, Picture, Section, Table, change_cell, metric_table
from hf_contmerge.report._templates import fill
from hf_contmerge.report._terminal import rich_table
from hf_contmerge.report.write import csv_text, load_results
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.changes import flat_fields
from hf_contmerge.run.scores import BLOCKS, Block, Scores
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.hiding import blanked, names_secret
from hf_contmerge.scoring.forgetting.lines import Line
from hf_contmerge.scoring.forgetting.paired import Change, mean_change, same_documents

_COLUMNS = (
    "reference", "run", "reference_line", "line", "task", "block", "reference_value", "value", "difference", "low",
    "high", "confidence", "stderr", "detectable", "documents", "seen",
)  # fmt: skip
_DRAWN = 5
"""Tasks in a picture."""
_SHOWN = 60
"""Characters of a recipe field in a table."""


@dataclass(frozen=True)
class ComparedRun:
    """A run, its results and its name."""

    label: str
    run: Run
    results: Results

    def lines(self) -> list[tuple[str, Line]]:
        """Return the measured lines by name."""
        return [(name, line) for name, line in self.results.named_lines() if len(line.rows) > 1]


@dataclass(frozen=True)
class LinePair:
    """A line against one of the reference run, on common tasks."""

    new: ComparedRun
    old: ComparedRun
    names: tuple[str, str]
    """Names of the new and of the old line."""
    scores: tuple[Scores, Scores]
    tasks: tuple[str, ...]

    @property
    def title(self) -> str:
        new, old = self.names
        return f"{self.new.label}: {new}" + ("" if new == old else f" (against {old})")

    def comparable(self, block: Block) -> list[str]:
        """Return a block's tasks with equal documents in both."""
        new, old = self.scores
        return [t for t in self.tasks if new[t].block == block and same_documents(new[t], old[t])]

    def change(self, tasks: Sequence[str], block: Block) -> Change | None:
        """Return the mean paired difference over comparable tasks, or None."""
        change = mean_change([(*self.scores, tasks)], block) if tasks else None
        return replace(change, matters=self.old.results.matters.get(block, 0.0)) if change else None


@dataclass(frozen=True)
class Comparison:
    """The comparison of several runs."""

    runs: tuple[ComparedRun, ...]
    pairs: tuple[LinePair, ...]

    @property
    def title(self) -> str:
        return " against ".join([", ".join(c.label for c in self.runs[1:]), self.runs[0].label])


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Compare runs; the first is the reference.

    Raises:
        RunError: fewer than two runs, or no task in common with the first.
    """
    if len({run.folder.resolve() for run in runs}) < 2:
        raise RunError("Nothing to compare: name at least two different runs, the reference first.")
    names = [run.folder.resolve().name for run in runs]
    labels = [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]
    compared = [ComparedRun(label, run, load_results(run)) for label, run in zip(labels, runs, strict=True)]
    pairs = [pair for other in compared[1:] for pair in _pairs(other, compared[0])]
    if not any(pair.tasks for pair in pairs):
        measured = "; ".join(f"{c.label} has {', '.join(sorted(_tasks(c))) or 'no scores yet'}" for c in compared)
        raise RunError(
            f"These runs have no task in common, so they cannot be compared: {measured}. Add a common general task "
            "(`evaluate.general_tasks`) to their recipes and run them again: only missing scores are measured."
        )
    return Comparison(tuple(compared), tuple(pairs))


def _pairs(new: ComparedRun, old: ComparedRun) -> Iterator[LinePair]:
    there = dict(old.lines())
    pairs = [((name, line), (name, there[name])) for name, line in new.lines() if name in there]
    entries = {line.name for line in new.results.merges} & {line.name for line in old.results.merges}
    if not entries & {name for (name, _), _ in pairs}:
        best = _best(new), _best(old)
        pairs += [((best[0].name, best[0]), (best[1].name, best[1]))] if best[0] and best[1] else []
    for (name, line), (other, reference) in pairs:
        last, base = line.rows[-1], reference.rows[-1]
        common = [t for t in last if t in base and last[t].block == base[t].block]
        if common:
            yield LinePair(new, old, (name, other), (last, base), tuple(common))


def _best(compared: ComparedRun) -> Line | None:
    results = compared.results
    best = (results.best(block) for block in results.stage_blocks())
    return next(filter(None, best), None) or next((x for x in results.merges if len(x.rows) > 1), None)


def _tasks(compared: ComparedRun) -> set[str]:
    return {task for _, line in compared.lines() for row in line.rows for task in row}


def findings(comparison: Comparison) -> list[str]:
    """Return a sentence for each line of each run."""
    return [f"{pair.title}: {_verdict(pair)}." for pair in comparison.pairs]


def _verdict(pair: LinePair) -> str:
    parts = []
    for block in reversed(BLOCKS):  # perplexity first: every held-out text has it
        tasks = pair.comparable(block)
        change = pair.change(tasks, block)
        if change:
            where = f"on {len(tasks)} task{'s' * (len(tasks) != 1)} of {block}"
            parts.append(f"{change.seen} {where} ({amount(change.mean, block)}, {interval(change, block)})")
    others = len(pair.tasks) - sum(len(pair.comparable(block)) for block in BLOCKS)
    if others:
        parts.append(f"{others} measured on other documents, not compared")
    for compared, name in zip((pair.new, pair.old), pair.names, strict=True):
        survival = compared.results.stored.get(name)
        if survival and survival.lossy:
            parts.append(f"in {compared.label}, {survival.taken}, so this does not judge the rule")
    return "; ".join(parts)


def sections(comparison: Comparison) -> list[Section]:
    """Return the parts of the page."""
    paired = (
        f"Each line against {comparison.runs[0].label}, both after their last stage, paired by document; 95 % "
        "intervals; ≈: no change seen, or less than the first run's `evaluate.same_within`."
    )
    return [
        Section("Differences", paired, tables=_difference_tables(comparison), pictures=_pictures(comparison)),
        Section("Metrics", "Over each run's own stages.", tables=_metric_tables(comparison)),
        Section("Recipes", "Fields that differ, defaults included.", tables=[_recipe_table(comparison)]),
    ]


def _difference_tables(comparison: Comparison) -> list[Table]:
    """Return a table per block: tasks down, other runs' lines across."""
    tables = []
    for block in reversed(BLOCKS):
        pairs = [d for d in comparison.pairs if any(d.scores[0][t].block == block for t in d.tasks)]
        tasks = dict.fromkeys(t for d in pairs for t in d.tasks if d.scores[0][t].block == block)
        rows = [[Cell(task), *(_difference_cell(d, task, block) for d in pairs)] for task in tasks]
        means = [change_cell(d.change(d.comparable(block), block), block) for d in pairs]
        rows += [[Cell("mean"), *means]] if len(rows) > 1 else []
        if rows:
            tables.append(Table(f"{block}, task by task", ("task", *(d.title for d in pairs)), rows))
    return tables


def _pictures(comparison: Comparison) -> list[Picture]:
    """Return a picture per block: tasks across, lines down."""
    pictures, reference = [], comparison.runs[0].label
    for block in reversed(BLOCKS):
        dots = [
            Dot(pair.title, panel, change)
            for pair in comparison.pairs
            for panel, tasks in _panels(pair, block).items()
            if (change := pair.change(tasks, block))
        ]
        if dots:
            svg = inlined(draw_dots(dots, block, title=f"Against {reference}").decode())
            pictures.append(Picture(svg, f"Differences from {reference} with 95 % intervals, {block}"))
    return pictures


def _panels(pair: LinePair, block: Block) -> dict[str, list[str]]:
    """Return panel -> its tasks."""
    tasks = pair.comparable(block)
    each = {task: [task] for task in tasks[:_DRAWN]}
    return {"mean": tasks, **each} if len(tasks) > 1 else each


def _difference_cell(pair: LinePair, task: str, block: Block) -> Cell:
    if task not in pair.tasks:
        return Cell()
    new, old = (scores[task] for scores in pair.scores)
    values = f"{natural(new.value, block)} against {natural(old.value, block)}"
    if not same_documents(new, old):
        return Cell("other documents", values)
    cell = change_cell(pair.change([task], block), block)
    return Cell(cell.text, f"{values}; {cell.hint}".rstrip("; "), cell.shade)


def _metric_tables(comparison: Comparison) -> list[Table]:
    tables = []
    for block in reversed(BLOCKS):
        metrics = {
            f"{c.label}: {name}": line.metrics(c.results.stages, c.results.general_tasks, block)
            for c in comparison.runs if block in c.results.blocks() for name, line in c.lines()
        }  # fmt: skip
        if metrics:
            tables.append(metric_table(metrics, block))
    return tables


def _recipe_table(comparison: Comparison) -> Table:
    """Return the differing recipe fields, secrets blanked."""
    dumped = [dict(flat_fields(blanked(c.run.recipe.model_dump(mode="json")))) for c in comparison.runs]
    names = dict.fromkeys(name for fields in dumped for name in fields if not names_secret(name.rpartition(".")[2]))
    rows = []
    for name in names:
        values = [fields.get(name, "–") for fields in dumped]
        if any(value != values[0] for value in values):
            shown = [str(v) if len(str(v)) <= _SHOWN else str(v)[:_SHOWN] + " …" for v in values]
            rows.append([Cell(name), *(Cell(text) for text in shown)])
    header = ("field", *(c.label for c in comparison.runs))
    return Table("What differs", header, rows or [[Cell("nothing"), *[Cell() for _ in dumped]]])


def print_comparison(comparison: Comparison) -> None:
    """Print the differences, the metrics and a sentence for each line."""
    from rich.console import Console

    console = Console()
    shown = sections(comparison)
    for table in (*shown[0].tables, *shown[1].tables, *shown[2].tables):
        console.print(rich_table(table), "")
    for sentence in findings(comparison):
        console.print(sentence, highlight=False, markup=False)


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write index.html, compare.md and compare.csv. Raises ResourceError."""
    shown = {"title": comparison.title, "findings": findings(comparison), "sections": sections(comparison)}
    page = folder / "index.html"
    try:
        write_atomically(page, fill("compare.html", **shown))
        write_atomically(folder / "compare.md", fill("compare.md", **shown))
        write_atomically(folder / "compare.csv", csv_text([_COLUMNS, *_rows(comparison)]))
    except OSError as error:
        raise ResourceError(f"Cannot write {folder}: {error.strerror}. Name another folder with --out.") from error
    return page


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison for machines: sentences, and compare.csv as mappings."""
    rows = [dict(zip(_COLUMNS, row, strict=True)) for row in _rows(comparison)]
    folders = {compared.label: str(compared.run.folder) for compared in comparison.runs}
    return {"runs": folders, "findings": findings(comparison), "differences": rows}


def _rows(comparison: Comparison) -> Iterator[tuple[Any, ...]]:
    """Yield a row per task and pair; differences need equal documents."""
    for pair in comparison.pairs:
        for task in pair.tasks:
            new, old = (scores[task] for scores in pair.scores)
            change = pair.change([task], new.block) if same_documents(new, old) else None
            seen = change.seen if change else "other documents"
            numbers = (change.mean, change.low, change.high, change.confidence, change.stderr, change.detectable,
                       len(new.gains)) if change else (None,) * 7  # fmt: skip
            where = (pair.old.label, pair.new.label, *reversed(pair.names), task, new.block)
            yield (*where, old.value, new.value, *numbers, seen)
