"""The report of a run, whole or half done: what was learnt, what was forgotten, what each merge rule made of it.

    report/  index.html       one file to look at, on a phone and on paper too; the picture is inside
             report.md        the same as Markdown
             forgetting.png   the picture
             summary.json     for scripts: matrices of utilities, metrics, tasks; null where not measured
             scores.csv       every score, a row each

A verdict claims a change only beyond two standard errors of the paired difference over documents.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_contmerge.forgetting import Block, Line, Scores, TaskScore, load_lines
from hf_contmerge.recipe import PHASES, recipe_yaml
from hf_contmerge.report_pictures import (
    Change,
    Results,
    amount,
    caption,
    draw_forgetting,
    headline,
    line_label,
    mean_change,
    natural,
)
from hf_contmerge.run_folder import Run

if TYPE_CHECKING:
    from rich.table import Table as RichTable

UNITS = {
    "accuracy": "share of right answers, 0 to 1; the metric as it is",
    "perplexity": "-ln(perplexity): nats per word for word_perplexity; higher is better, 0.1 nats is about a tenth",
}
METRICS = {
    "acc": ("ACC", "mean utility over the stages learnt so far, at the end"),
    "la": ("LA", "mean utility of each stage right after it was learnt"),
    "bwt": ("BWT", "mean change of the earlier stages since they were learnt; negative is forgetting"),
    "forgetting": ("F", "mean drop of the earlier stages from their best; higher is worse"),
    "fwt": ("FWT", "mean gain over the base on a stage before it is learnt; needs `matrix: full`"),
    "general_delta": ("general Δ", "mean change of the general tasks against the base"),
}
_MISSING = "–"
_COLUMNS = ("line", "stage_index", "stage", "task", "block", "metric", "value", "utility", "stderr", "documents")


def write_report(run: Run) -> Path:
    """Write the report of what there is; return the path of the picture. Leaves the report's record to the caller."""
    results = load_results(run)
    folder = run.report.scratch("report")
    draw_forgetting(results, folder / "forgetting.png")
    (folder / "summary.json").write_text(json.dumps(summary(run, results), indent=1) + "\n", encoding="utf-8")
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *_score_rows(results)])
    tables = [*_heat_maps(results), *_metric_tables(results), _costs(run)]
    (folder / "report.md").write_text(_markdown(run, results, tables), encoding="utf-8")
    picture = base64.b64encode((folder / "forgetting.png").read_bytes()).decode()
    (folder / "index.html").write_text(_page(run, results, tables, picture), encoding="utf-8")
    return run.report.publish("report") / "forgetting.png"


def print_table(run: Run) -> None:
    """Print what a user wants to see at the end: metrics and final scores of each line, then the verdicts."""
    from rich.console import Console

    results, console = load_results(run), Console()
    for block in results.blocks():
        console.print(_rich(_final_table(results, block)))
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


# For scripts


def summary(run: Run, results: Results) -> dict[str, Any]:
    """Return summary.json."""
    return {
        "base_model": run.recipe.base_model,
        "seed": run.recipe.seed,
        "stages": [stage.name for stage in results.stages],
        "units": UNITS,
        "tasks": _tasks(results),
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


def _tasks(results: Results) -> dict[str, Any]:
    of_stage = {task: stage.name for stage in results.stages for task in stage.task_names()}
    found = {}
    for task in (*of_stage, *results.general_tasks):
        score = _any_score(results, task)
        found[task] = {
            "stage": of_stage.get(task),
            "block": score.block if score else None,
            "metric": score.metric if score else None,
            "documents": len(score.gains) if score else None,
            "base": results.base[task].value if task in results.base else None,
        }
    return found


def _any_score(results: Results, task: str) -> TaskScore | None:
    return next((row[task] for x in (*results.merges, *results.experts) for row in x.rows if task in row), None)


def _score_rows(results: Results) -> list[tuple[Any, ...]]:
    names = ["base", *(stage.name for stage in results.stages)]
    return [
        (f"{kind}/{line.name}", t, names[t], task, s.block, s.metric, s.value, s.utility, s.stderr, len(s.gains))
        for kind, lines in (("experts", results.experts), ("merges", results.merges))
        for line in lines
        for t, row in enumerate(line.rows)
        for task, s in row.items()
    ]


# Verdicts


def verdict(results: Results, line: Line) -> str:
    """Say in one sentence what a merge made of the stages, against plain fine-tuning and the mean of the experts."""
    plain = results.baseline
    if len(line.rows) < 2:
        return "not measured yet."
    t = min(len(line.rows), len(plain.rows)) - 1 if plain else len(line.rows) - 1
    parts = [f"after {t} stage{'s' * (t != 1)}, this run has no plain fine-tuning to compare with"]
    if plain:
        parts = [_against(results, line, plain, t)]
    mean = next((m for m in results.merges if m.name == results.mean_of_experts != line.name and len(m.rows) > t), None)
    for block in results.stage_blocks() if mean else ():
        assert mean
        if change := _overall(results, line.rows[t], mean.rows[t], t, block):
            parts.append(f"against the mean of the experts: {_told(change, block, 'over all stages')}")
    return "; ".join(parts) + "."


def _against(results: Results, line: Line, plain: Line, t: int) -> str:
    new, old = line.rows[t], plain.rows[t]
    last = results.stages[t - 1]
    parts = []
    for block in results.blocks():
        scopes = {
            f"on {last.name}, the last one" if t > 1 else f"on {last.name}": [(new, old, last.task_names())],
            "on general tasks": [(new, old, results.general_tasks)],
        }
        if t > 1:
            earlier = [(new, old, stage.task_names()) for stage in results.stages[: t - 1]]
            scopes = {"over all stages": [*earlier, (new, old, last.task_names())], "on the earlier": earlier, **scopes}
        parts += [_told(change, block, where) for where, g in scopes.items() if (change := mean_change(g, block))]
    told = "; ".join(parts) or "nothing to compare yet"
    return f"after {t} stage{'s' * (t != 1)}, against plain fine-tuning: {told}"


def _overall(results: Results, new: Scores, old: Scores, t: int, block: Block) -> Change | None:
    return mean_change([(new, old, stage.task_names()) for stage in results.stages[:t]], block)


def _told(change: Change, block: Block, where: str) -> str:
    if change.stderr is None:
        return f"too few documents to tell {where} ({amount(change.mean, block)})"
    number, unit = amount(change.mean, block).split()
    error = amount(2 * change.stderr, block, sign=False).split()[0]
    return f"{('no change seen', 'better', 'worse')[change.sign]} {where} ({number} ± {error} {unit})"


def _badge(results: Results, line: Line) -> str:
    """Return better, worse or same: the whole of the stages against plain fine-tuning, in the first block."""
    plain = results.baseline
    t = min(len(line.rows), len(plain.rows)) - 1 if plain else 0
    if not plain or t < 1:
        return "same"
    found = [c for b in results.stage_blocks() if (c := _overall(results, line.rows[t], plain.rows[t], t, b))]
    return ("same", "better", "worse")[found[0].sign] if found else "same"


# Tables, which the page and the Markdown share


@dataclass(frozen=True)
class Cell:
    """A number in words, what to say of it, how much better or worse than the base (-1 to 1), and if it is marked."""

    text: str = _MISSING
    hint: str = ""
    shade: float = 0.0
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a heading; cells of the first column are names."""

    title: str
    header: tuple[str, ...]
    rows: list[list[Cell]]
    small: bool = False


def _heat_maps(results: Results) -> list[Table]:
    """Return one table per line and block: tasks across, stages down."""
    lines = [(line_label(x.name), x) for x in results.experts if len(x.rows) > 1]
    lines += [(x.name, x) for x in results.merges]
    return [_heat_map(results, name, line, b) for b in results.blocks() for name, line in lines]


def _heat_map(results: Results, name: str, line: Line, block: Block) -> Table:
    learnt = {task: t for t, stage in enumerate(results.stages, 1) for task in stage.task_names()}
    tasks = [t for t in (*learnt, *results.general_tasks) if (s := _any_score(results, t)) and s.block == block]
    lines = (*results.experts, *results.merges)
    largest = max([abs(_gain(row[t], results.base.get(t))) for x in lines for row in x.rows for t in tasks if t in row])
    names = ["base", *(stage.name for stage in results.stages)]
    rows = []
    for t, row in enumerate(line.rows):
        cells = [_cell(row.get(k), results.base.get(k), largest, own=learnt.get(k) == t) for k in tasks]
        rows.append([Cell(names[t]), *cells])
    return Table(f"{name}, {block}", ("after", *tasks), rows, small=True)


def _gain(score: TaskScore, base: TaskScore | None) -> float:
    return score.utility - base.utility if base else 0.0


def _cell(score: TaskScore | None, base: TaskScore | None, largest: float, *, own: bool) -> Cell:
    if score is None:
        return Cell()
    error = "" if score.stderr is None else f" ± {2 * score.stderr:.3f}"
    against = f", {amount(_gain(score, base), score.block)} against the base" if base else ""
    shade = _gain(score, base) / largest if largest else 0.0
    return Cell(natural(score.value, score.block), f"utility {score.utility:.4f}{error}{against}", shade, own)


def _metric_tables(results: Results) -> list[Table]:
    tables = []
    for block in results.blocks():
        rows = []
        for name, line in _named_lines(results):
            values = line.metrics(results.stages, results.general_tasks, block)
            rows.append([Cell(name), *(_metric(values[m], block, m) for m in METRICS)])
        tables.append(Table(f"Metrics, {block}", ("line", *(short for short, _ in METRICS.values())), rows))
    return tables


def _named_lines(results: Results) -> list[tuple[str, Line]]:
    return [(line_label(x.name), x) for x in results.experts] + [(x.name, x) for x in results.merges]


def _metric(value: float | None, block: Block, name: str) -> Cell:
    if value is None:
        return Cell()
    signed = "+" if name in ("bwt", "fwt", "general_delta") else ""
    text = f"{value + 0.0:{signed}.3f}".replace("-", "−")
    means = f"{METRICS[name][1]}; {UNITS[block]}"
    return Cell(text, means)


def _final_table(results: Results, block: Block) -> Table:
    """Return metrics and last scores of all lines; with many tasks only the metrics, to fit a terminal."""
    tasks = [t for t in _tasks(results) if (s := _any_score(results, t)) and s.block == block]
    tasks = tasks if len(tasks) <= 4 else []
    header = ("", *tasks, "ACC", "LA", "BWT", "general Δ")
    rows = [[Cell("base"), *(_cell(results.base.get(t), None, 0, own=False) for t in tasks), *[Cell()] * 4]]
    for name, line in _named_lines(results):
        values = line.metrics(results.stages, results.general_tasks, block)
        last = [_cell(line.rows[-1].get(t), results.base.get(t), 1, own=False) for t in tasks]
        rows.append([Cell(name), *last, *(_metric(values[m], block, m) for m in ("acc", "la", "bwt", "general_delta"))])
    return Table(f"{block} at the end (metrics in {'nats' if block == 'perplexity' else 'shares'})", header, rows)


def _costs(run: Run) -> Table:
    rows = []
    for _, place in run.places():
        done = {phase: place.record(phase) for phase in PHASES[:-1] if place.is_done(phase)}
        peaks = [r["peak_memory_bytes"] for r in done.values() if r.get("peak_memory_bytes") is not None]
        times = [_seconds(done[p].get("seconds")) if p in done else Cell() for p in PHASES[:-1]]
        memory = Cell(f"{max(peaks) / 2**30:.1f} GiB") if peaks else Cell()
        rows.append([Cell(str(place.folder.relative_to(run.folder))), *times, memory])
    return Table("Time and memory", ("what", *PHASES[:-1], "peak memory"), rows)


def _seconds(seconds: float | None) -> Cell:
    if seconds is None:
        return Cell()
    return Cell(f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min")


# Markdown, terminal and page


def frozen_recipe(run: Run) -> str:
    """Return the recipe with every default, as frozen in the run folder; a token must not be shown."""
    return re.sub(r"(?m)^(\s*hub_token: ).+", r"\1(removed)", recipe_yaml(run.recipe))


def _notes() -> list[str]:
    return [f"{short}: {text}." for short, text in METRICS.values()] + [f"{b}: {unit}." for b, unit in UNITS.items()]


def _markdown(run: Run, results: Results, tables: Sequence[Table]) -> str:
    verdicts = "\n".join(f"- **{_plain(x.name)}**: {_plain(verdict(results, x))}" for x in results.merges)
    notes = "\n".join(f"- {_plain(note)}" for note in _notes())
    parts = [
        f"# {_plain(run.recipe.name)}", _plain(headline(results)) + ".", verdicts,
        f"![{_plain(headline(results))}](forgetting.png)", *map(_markdown_table, tables), f"## How to read\n\n{notes}",
        f"## Recipe\n\n~~~yaml\n{frozen_recipe(run)}~~~",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    body = [row([f"**{_plain(c.text)}**" if c.marked else _plain(c.text) for c in cells]) for cells in table.rows]
    lines = [row([_plain(h) for h in table.header]), row(["---", *["---:"] * (len(table.header) - 1)]), *body]
    return f"## {_plain(table.title)}\n\n" + "\n".join(lines)


def _plain(text: str) -> str:
    """Escape what Markdown would take for markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def _rich(table: Table) -> RichTable:
    from rich.table import Table as RichTable

    rich = RichTable(title=table.title, title_justify="left")
    for i, name in enumerate(table.header):
        rich.add_column(name, justify="right" if i else "left")
    for cells in table.rows:
        rich.add_row(*(_coloured(c) for c in cells))
    return rich


def _coloured(cell: Cell) -> str:
    colour = "" if not cell.shade else "green" if cell.shade > 0 else "red"
    return f"[{colour}]{cell.text}[/{colour}]" if colour else cell.text


def _page(run: Run, results: Results, tables: Sequence[Table], picture: str) -> str:
    escape = html.escape
    verdicts = "".join(
        f'<li class="{_badge(results, x)}"><b>{escape(x.name)}</b> {escape(verdict(results, x))}</li>'
        for x in results.merges
    )
    finding = escape(headline(results))
    maps = "".join(_html_table(t, escape) for t in tables if t.small)
    rest = "".join(_html_table(t, escape) for t in tables if not t.small)
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.recipe.name)}</title><style>{_CSS}</style></head><body>
<header><p>{escape(run.recipe.name)} · {escape(run.recipe.base_model)}</p><h1>{finding}</h1></header>
<ul class="verdicts">{verdicts}</ul>
<figure><div class="scroll"><img alt="{finding}" src="data:image/png;base64,{picture}"></div>
<figcaption>{escape(caption(results))}</figcaption></figure>
<h2>Scores after each stage</h2><p>Blue is better than the base, orange worse; a frame marks the stage just learnt.
Point at a number for its utility and two standard errors.</p><div class="maps">{maps}</div>
{rest}<h2>How to read</h2><ul class="notes">{notes}</ul>
<h2>Recipe</h2><details open><summary>as frozen in the run folder</summary><pre>{escape(frozen_recipe(run))}</pre>
</details></body></html>
"""


def _html_table(table: Table, escape: Callable[[str], str]) -> str:
    def cell(c: Cell, first: bool) -> str:
        colour = "0,114,178" if c.shade > 0 else "213,94,0"
        style = f' style="background:rgba({colour},{0.6 * min(abs(c.shade), 1):.2f})"' if c.shade else ""
        hint = f' title="{escape(c.hint)}"' if c.hint else ""
        mark = ' class="own"' if c.marked else ""
        return f"<th>{escape(c.text)}</th>" if first else f"<td{style}{hint}{mark}>{escape(c.text)}</td>"

    head = "".join(f"<th>{escape(h)}</th>" for h in table.header)
    body = "".join("<tr>" + "".join(cell(c, i == 0) for i, c in enumerate(row)) + "</tr>" for row in table.rows)
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    level = "h3" if table.small else "h2"
    return f'<section><{level}>{escape(table.title)}</{level}><div class="scroll">{inner}</div></section>'


_CSS = """
:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#6b6b6b;--line:#dcdcd8;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e4;--soft:#a3a39e;--line:#3a3a38;--paper:#161615}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1200px;margin:0 auto;padding:1rem}
header p,figcaption,.notes,summary{color:var(--soft);font-size:.9rem}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 1rem}
h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:0 0 .3rem}
.verdicts{list-style:none;padding:0}.verdicts li{border-left:5px solid var(--soft);padding:.3rem .8rem;margin:.5rem 0}
.verdicts .better{border-color:#0072b2}.verdicts .worse{border-color:#d55e00}
figure{margin:1.5rem 0}.scroll{overflow-x:auto}img{width:100%;min-width:860px;background:#fff;border-radius:8px}
.maps{display:flex;flex-wrap:wrap;gap:1.2rem 2rem}section{max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:500;color:var(--soft)}th:first-child{text-align:left}tbody th{color:var(--ink)}
.own{outline:2px solid var(--ink);outline-offset:-3px}pre{overflow-x:auto;font-size:.85rem}
@media print{body{max-width:none;font-size:11px}img{min-width:0}.scroll{overflow:visible}td{print-color-adjust:exact;
-webkit-print-color-adjust:exact}section,figure{break-inside:avoid}}
"""
