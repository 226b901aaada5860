"""The report's tables, and the page, Markdown and terminal output that show them."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_contmerge.forgetting import Line
from hf_contmerge.recipe import PHASES, recipe_yaml
from hf_contmerge.report_findings import (
    METRICS,
    UNITS,
    Results,
    amount,
    any_score,
    badge,
    caption,
    headline,
    line_label,
    natural,
    task_facts,
    verdict,
)
from hf_contmerge.run_folder import Run
from hf_contmerge.task_scores import Block, TaskScore

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_MISSING = "–"


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


def heat_maps(results: Results) -> list[Table]:
    """Return one table per line and block: tasks across, stages down."""
    lines = [(line_label(x.name), x) for x in results.experts if len(x.rows) > 1]
    lines += [(x.name, x) for x in results.merges]
    return [_heat_map(results, name, line, b) for b in results.blocks() for name, line in lines]


def _heat_map(results: Results, name: str, line: Line, block: Block) -> Table:
    learnt = {task: t for t, stage in enumerate(results.stages, 1) for task in stage.task_names()}
    tasks = [t for t in (*learnt, *results.general_tasks) if (s := any_score(results, t)) and s.block == block]
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


def metric_tables(results: Results) -> list[Table]:
    """Return one table per block: ACC, LA, BWT, F, FWT and general delta of each line."""
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


def final_table(results: Results, block: Block) -> Table:
    """Return metrics and last scores of all lines; with many tasks only the metrics, to fit a terminal."""
    tasks = [t for t in task_facts(results) if (s := any_score(results, t)) and s.block == block]
    tasks = tasks if len(tasks) <= 4 else []
    header = ("", *tasks, "ACC", "LA", "BWT", "general Δ")
    rows = [[Cell("base"), *(_cell(results.base.get(t), None, 0, own=False) for t in tasks), *[Cell()] * 4]]
    for name, line in _named_lines(results):
        values = line.metrics(results.stages, results.general_tasks, block)
        last = [_cell(line.rows[-1].get(t), results.base.get(t), 1, own=False) for t in tasks]
        rows.append([Cell(name), *last, *(_metric(values[m], block, m) for m in ("acc", "la", "bwt", "general_delta"))])
    return Table(f"{block} at the end (metrics in {'nats' if block == 'perplexity' else 'shares'})", header, rows)


def vectors(run: Run) -> list[Table]:
    """Return, for each stage that is the difference of two models, how it lies to what the stage before had learnt."""
    tables = []
    for t, place in run.places():
        found = place.record("train").get("vector", {}) if place.is_done("train") else {}
        if "layers" in found:
            rows = [
                [Cell(layer), Cell(f"{x['cosine']:+.3f}".replace("-", "−")), Cell(f"{x['norm_ratio']:.3g}")]
                for layer, x in found["layers"].items()
            ]
            against = f"cosine with {run.stage(t - 1).name}"
            title = f"Vector {run.stage(t).name} ({place.folder.name})"
            tables.append(Table(title, ("layer", against, "length over that one's"), rows))
        if found.get("special_tokens"):
            moved = [[Cell(token), Cell(f"{100 * x:.1f} %")] for token, x in found["special_tokens"].items()]
            title = f"Special tokens of {run.stage(t).name} ({place.folder.name})"
            tables.append(Table(title, ("token", "its embedding moved by"), moved))
    return tables


def costs(run: Run) -> Table:
    """Return seconds and peak memory of each phase."""
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


def frozen_recipe(run: Run) -> str:
    """Return the recipe with every default, as frozen in the run folder; a token must not be shown."""
    return re.sub(r"(?m)^(\s*hub_token: ).+", r"\1(removed)", recipe_yaml(run.recipe))


def _notes() -> list[str]:
    return [f"{short}: {text}." for short, text in METRICS.values()] + [f"{b}: {unit}." for b, unit in UNITS.items()]


def markdown(run: Run, results: Results, tables: Sequence[Table]) -> str:
    """Return report.md."""
    verdicts = "\n".join(f"- **{_plain(x.name)}**: {_plain(verdict(results, x))}" for x in results.merges)
    notes = "\n".join(f"- {_plain(note)}" for note in _notes())
    parts = [
        f"# {_plain(run.recipe.name)}", _plain(headline(results)) + ".", verdicts,
        f"![{_plain(headline(results))}](forgetting.png)", *map(_markdown_table, tables), f"## How to read\n\n{notes}",
        f"## Recipe\n\n~~~yaml\n{frozen_recipe(run)}~~~", "Time and memory of each phase: [costs.csv](costs.csv).",
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


def rich_table(table: Table) -> RichTable:
    """Return a table for the terminal."""
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


def page(run: Run, results: Results, tables: Sequence[Table], picture: str) -> str:
    """Return index.html, whole in itself; `picture` is a PNG in base64."""
    escape = html.escape
    verdicts = "".join(
        f'<li class="{badge(results, x)}"><b>{escape(x.name)}</b> {escape(verdict(results, x))}</li>'
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
</details><p><a href="costs.html">Time and memory of each phase</a></p></body></html>
"""


def costs_page(run: Run, table: Table) -> str:
    """Return costs.html: what depends on the machine and on interruptions, apart from what must not."""
    name = html.escape(run.recipe.name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: costs</title><style>{_CSS}</style></head><body>
<header><p><a href="index.html">{name}</a></p></header>{_html_table(table, html.escape)}</body></html>
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
