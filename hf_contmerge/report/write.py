"""The report of a run, whole or half done.

    report/  index.html       one file for screen, phone and paper; the picture is inside
             report.md        the same as Markdown
             forgetting.png   the picture
             summary.json     for scripts: matrices of utilities, metrics, tasks; null where not measured
             scores.csv       one row per score
             costs.html       seconds and memory of each phase
             costs.csv        the same for scripts
             digests.json     of these files

Everything but the costs is the same, byte for byte, for interrupted and uninterrupted runs.

A verdict claims a change only if 0 lies outside the 95 % interval of the paired difference over documents.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import webbrowser
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from hf_contmerge.report._choices import choice_tables, choices_intro, curves
from hf_contmerge.report._examples import answers, examples
from hf_contmerge.report._findings import UNITS, smallest, verdict
from hf_contmerge.report._losses import loss_section
from hf_contmerge.report._merges import geometry_section, storage_section, stored
from hf_contmerge.report._panels import panels
from hf_contmerge.report._pictures import draw_alone, draw_curve, draw_forgetting
from hf_contmerge.report._relevance import relevance_section
from hf_contmerge.report._results import Results, task_facts
from hf_contmerge.report._routes import route_section
from hf_contmerge.report._sources import sources_section
from hf_contmerge.report._tables import (
    Cost,
    Picture,
    Section,
    cost_tables,
    costs,
    final_table,
    metric_tables,
    score_grid,
    sides_tables,
    task_tables,
)
from hf_contmerge.report._terminal import rich_table
from hf_contmerge.report.front import front_sections
from hf_contmerge.run.folder import Run
from hf_contmerge.runtime.digests import DIGESTS, digests_below
from hf_contmerge.runtime.records import write_record
from hf_contmerge.runtime.refusals import refusals
from hf_contmerge.scoring.forgetting.lines import Line, load_lines

_COLUMNS = ("line", "stage_index", "stage", "task", "block", "metric", "value", "utility", "stderr", "documents")


_SIDES = (
    "Documents that went from right to wrong / from wrong to right, in points beyond what guessing does by itself: of "
    "a stage's tasks since it was learnt, of general tasks since the base. A plus in front, or a minus behind: fewer "
    "changed sides than guessing explains. Hover over a number for its intervals."
)


def write_report(run: Run) -> Path:
    """Write the report; return the picture's path. The caller writes the record.

    Another process may write the report of this run, too: the second one waits.
    """
    with run.report_lock(), refusals(run.folder / "report"):
        _write(run, run.report.scratch("report"))
        return run.report.publish("report") / "forgetting.png"


def _write(run: Run, folder: Path) -> None:
    from hf_contmerge.report._pages import pages  # jinja2 is for reports that are written, not shown again
    from hf_contmerge.report._templates import fill

    results, spent = load_results(run), costs(run)
    draw_forgetting(results, folder / "forgetting.png")
    pictures = [Picture(draw_alone(results, panel), panel.alt_text(results)) for panel in panels(results)]
    shown = [section for section in sections(run, results) if not section.empty]
    texts = {
        **pages(run, results, pictures, shown),
        "summary.json": json.dumps(summary(run, results), indent=1) + "\n",
        "costs.html": fill("costs.html", name=run.recipe.name, tables=cost_tables(spent)),
        "scores.csv": csv_text([_COLUMNS, *_score_rows(results)]),
        "costs.csv": csv_text([[f.name for f in fields(Cost)], *(astuple(cost) for cost in spent)]),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    write_record(folder / DIGESTS, {"files": digests_below(folder)})


def sections(run: Run, results: Results) -> list[Section]:
    """Return the sections below the picture; some may be empty."""
    least = smallest(results)
    shades = (
        "▴ and blue: better than the base; ▾ and orange: worse; no colour: no change seen (the 95 % interval contains "
        f"0), or the same (less than {least}). A frame marks the stage just learnt. Hover over a number for details."
    )
    intervals = (
        "Changes are paired by document, with 95 % intervals; ≈: no change seen, or the same. The last column is the "
        "smallest true change that these documents show in four of five samples; smaller changes may go unnoticed."
    )
    return [
        answers(results),
        Section("Scores after each stage", shades, tables=score_grid(results)),
        Section("Metrics", tables=metric_tables(results)),
        Section("Task by task", intervals, tables=task_tables(results)),
        Section("Right and wrong", _SIDES, tables=sides_tables(results)),
        route_section(run, results),
        relevance_section(run, results),
        examples(results),
        sources_section(run),
        loss_section(run),
        _choices(run),
        *front_sections(run),
        storage_section(run),
        geometry_section(run),
    ]


def _choices(run: Run) -> Section:
    """Return the sections on choices, with their curves; empty without any."""
    pictures = [Picture(draw_curve(curve), f"{curve.entry}: search of {curve.word}") for curve in curves(run)]
    hint = " In the curves, a ring marks the value taken; hollow marks lose general ability." * bool(pictures)
    return Section("Choosing the merges", choices_intro(run) + hint, choice_tables(run), pictures=pictures)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def show_report(run: Run, *, browser: bool = False) -> None:
    """Print the table and the report's path; open it if asked."""
    folder = run.folder / "report"
    print_table(run)
    print(f"Report:  {folder / 'index.html'}\nPicture: {folder / 'forgetting.png'}")
    if browser and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32")):
        webbrowser.open((folder / "index.html").resolve().as_uri())


def print_table(run: Run) -> None:
    """Print metrics and final scores of each line, then verdicts."""
    from rich.console import Console

    results, console = load_results(run), Console()
    for block in results.blocks():
        console.print(rich_table(final_table(results, block)), "")
    for line in results.merges:
        console.print(f"[bold]{line.name}[/bold]: {verdict(results, line)}", highlight=False)


def load_results(run: Run) -> Results:
    """Load a run's results. The first expert is plain fine-tuning."""
    experts, merges = load_lines(run, tuple(dict.fromkeys(("previous", *run.expert_kinds()))))
    measured = max(len(line.rows) for line in (*experts, *merges)) - 1
    if measured > 1 and "previous" not in run.expert_kinds():  # not trained in this run
        experts = [line for line in experts if line.name != "previous"]
    general = run.recipe.evaluate.general_names
    mean = next((entry.name for entry in run.recipe.merge if entry.rule == "average"), None)
    matters = run.recipe.evaluate.same_within.model_dump()
    return Results(run.recipe.stages, general, tuple(experts), tuple(merges), mean, stored(run), matters)


def summary(run: Run, results: Results) -> dict[str, Any]:
    """Return summary.json."""
    return {
        "base_model": run.recipe.base_model,
        "seed": run.recipe.seed,
        "stages": [stage.name for stage in results.stages],
        "units": UNITS,
        "tasks": task_facts(results),
        "experts": {line.name: _line_summary(results, line) for line in results.experts},
        "merges": {line.name: _line_summary(results, line) | _kept(results, line) for line in results.merges},
    }


def _line_summary(results: Results, line: Line) -> dict[str, Any]:
    blocks = results.blocks()
    general = {b: m for b in blocks if (m := line.general(results.general_tasks, b))}
    return {
        "matrix": {b: line.matrix(results.stages, b).rows for b in results.stage_blocks()},
        "metrics": {b: line.metrics(results.stages, results.general_tasks, b) for b in blocks},
        "general": {b: {"tasks": m.stages, "rows": m.rows} for b, m in general.items()},
    }


def _kept(results: Results, line: Line) -> dict[str, Any]:
    survival = results.stored.get(line.name)
    return {"stored": survival.to_json()} if survival else {}


def _score_rows(results: Results) -> list[tuple[Any, ...]]:
    names = ["base", *(stage.name for stage in results.stages)]
    return [
        (f"{kind}/{line.name}", t, names[t], task, s.block, s.metric, s.value, s.utility, s.stderr, len(s.gains))
        for kind, lines in (("experts", results.experts), ("merges", results.merges))
        for line in lines
        for t, row in enumerate(line.rows)
        for task, s in row.items()
    ]
