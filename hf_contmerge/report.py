"""The report of a run, whole or half done: what was learnt, what was forgotten, what each merge rule made of it.

    report/  index.html       one file to look at, on a phone and on paper too; the picture is inside
             report.md        the same as Markdown
             forgetting.png   the picture
             summary.json     for scripts: matrices of utilities, metrics, tasks; null where not measured
             scores.csv       every score, a row each
             costs.html       seconds and memory of each phase
             costs.csv        the same for scripts

All but the costs is the same, byte for byte, whenever and however often a run was interrupted.

A verdict claims a change only beyond two standard errors of the paired difference over documents.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

from hf_contmerge.forgetting import Line, load_lines
from hf_contmerge.report_findings import UNITS, Results, task_facts, verdict
from hf_contmerge.report_pages import (
    costs,
    costs_page,
    final_table,
    heat_maps,
    markdown,
    metric_tables,
    page,
    rich_table,
    vectors,
)
from hf_contmerge.report_pictures import draw_forgetting
from hf_contmerge.run_folder import Run

_COLUMNS = ("line", "stage_index", "stage", "task", "block", "metric", "value", "utility", "stderr", "documents")


def write_report(run: Run) -> Path:
    """Write the report of what there is; return the path of the picture. Leaves the report's record to the caller."""
    results = load_results(run)
    folder = run.report.scratch("report")
    draw_forgetting(results, folder / "forgetting.png")
    (folder / "summary.json").write_text(json.dumps(summary(run, results), indent=1) + "\n", encoding="utf-8")
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *_score_rows(results)])
    spent = costs(run)
    (folder / "costs.html").write_text(costs_page(run, spent), encoding="utf-8")
    with (folder / "costs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([spent.header, *([cell.text for cell in row] for row in spent.rows)])
    tables = [*heat_maps(results), *metric_tables(results), *vectors(run)]
    (folder / "report.md").write_text(markdown(run, results, tables), encoding="utf-8")
    picture = base64.b64encode((folder / "forgetting.png").read_bytes()).decode()
    (folder / "index.html").write_text(page(run, results, tables, picture), encoding="utf-8")
    return run.report.publish("report") / "forgetting.png"


def show_report(run: Run, *, browser: bool = False) -> None:
    """Print the table of scores and where the report lies; open it, if asked and if there is a browser."""
    folder = run.folder / "report"
    print_table(run)
    print(f"Report:  {folder / 'index.html'}\nPicture: {folder / 'forgetting.png'}")
    if browser and (os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32")):
        webbrowser.open((folder / "index.html").resolve().as_uri())


def print_table(run: Run) -> None:
    """Print what a user wants to see at the end: metrics and final scores of each line, then the verdicts."""
    from rich.console import Console

    results, console = load_results(run), Console()
    for block in results.blocks():
        console.print(rich_table(final_table(results, block)))
    for line in results.merges:
        console.print(f"[bold]{line.name}[/bold]: {verdict(results, line)}", highlight=False)


def load_results(run: Run) -> Results:
    """Read what has been measured of a run. The first stage's expert is plain fine-tuning, whatever its kind."""
    experts, merges = load_lines(run, tuple(dict.fromkeys(("previous", *run.expert_kinds()))))
    seen = max(len(line.rows) for line in (*experts, *merges)) - 1
    if seen > 1 and "previous" not in run.expert_kinds():  # this run does not train it
        experts = [line for line in experts if line.name != "previous"]
    general = tuple(task.name for task in run.recipe.evaluate.general_tasks)
    mean = next((entry.name for entry in run.recipe.merge if entry.rule == "average"), None)
    return Results(run.recipe.stages, general, tuple(experts), tuple(merges), mean)


def summary(run: Run, results: Results) -> dict[str, Any]:
    """Return summary.json."""
    return {
        "base_model": run.recipe.base_model,
        "seed": run.recipe.seed,
        "stages": [stage.name for stage in results.stages],
        "units": UNITS,
        "tasks": task_facts(results),
        "experts": {line.name: _line_summary(results, line) for line in results.experts},
        "merges": {line.name: _line_summary(results, line) for line in results.merges},
    }


def _line_summary(results: Results, line: Line) -> dict[str, Any]:
    blocks = results.blocks()
    general = {b: m for b in blocks if (m := line.general(results.general_tasks, b))}
    return {
        "matrix": {b: line.matrix(results.stages, b).rows for b in results.stage_blocks()},
        "metrics": {b: line.metrics(results.stages, results.general_tasks, b) for b in blocks},
        "general": {b: {"tasks": m.stages, "rows": m.rows} for b, m in general.items()},
    }


def _score_rows(results: Results) -> list[tuple[Any, ...]]:
    names = ["base", *(stage.name for stage in results.stages)]
    return [
        (f"{kind}/{line.name}", t, names[t], task, s.block, s.metric, s.value, s.utility, s.stderr, len(s.gains))
        for kind, lines in (("experts", results.experts), ("merges", results.merges))
        for line in lines
        for t, row in enumerate(line.rows)
        for task, s in row.items()
    ]
