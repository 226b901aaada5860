"""How the report's sections look: as a page, as Markdown, in the terminal."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_contmerge.report._findings import METRICS, UNITS, Results, badge, caption, headline, verdict
from hf_contmerge.report._tables import Cell, Picture, Quote, Section, Table
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import recipe_yaml

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_KEPT = 300  # characters of a document; of a longer one the scores keep only the beginning
_WORD = 12  # characters: longer ones may be broken
_TOKEN = re.compile(r"(?m)^(\s*hub_token: ).+")


def frozen_recipe(run: Run) -> str:
    """Return the recipe with every default, as frozen in the run folder; a token must not be shown."""
    return _TOKEN.sub(r"\1(removed)", recipe_yaml(run.recipe))


def _notes() -> list[str]:
    return [f"{short}: {text}." for short, text in METRICS.values()] + [f"{b}: {unit}." for b, unit in UNITS.items()]


def markdown(run: Run, results: Results, sections: Sequence[Section]) -> str:
    """Return report.md."""
    verdicts = "\n".join(f"- **{_plain(x.name)}**: {_plain(verdict(results, x))}" for x in results.merges)
    notes = "\n".join(f"- {_plain(note)}" for note in _notes())
    parts = [
        f"# {_plain(run.recipe.name)}", _plain(headline(results)) + ".", verdicts,
        f"![{_plain(headline(results))}](forgetting.png)", _plain(caption(results)),
        *(text for section in sections for text in _markdown_section(section)), f"## How to read\n\n{notes}",
        f"## Recipe\n\n~~~yaml\n{frozen_recipe(run)}~~~", "Time and memory of each phase: [costs.csv](costs.csv).",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _markdown_section(section: Section) -> list[str]:
    intro = [_plain(section.intro)] if section.intro else []
    quotes = [f"**{_plain(q.source)}**\n\n> {_plain(_beginning(q.text))}\n\n{_plain(q.told)}" for q in section.quotes]
    return [f"## {_plain(section.title)}", *intro, *quotes, *map(_markdown_table, section.tables)]


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    body = [row([f"**{_plain(c.text)}**" if c.marked else _plain(c.text) for c in cells]) for cells in table.rows]
    lines = [row([_plain(h) for h in table.header]), row(["---", *["---:"] * (len(table.header) - 1)]), *body]
    return f"### {_plain(table.title)}\n\n" + "\n".join(lines)


def _plain(text: str) -> str:
    """Escape what Markdown would take for markup; a line that begins like a list or a heading is still a line."""
    text = re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", text)
    return re.sub(r"^(#|[-+](?=\s)|\d+(?=[.)]\s))", r"\\\1", text)


def rich_table(table: Table) -> RichTable:
    """Return a table for the terminal. Where that is narrow, lines are broken, numbers never."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    rich = RichTable(title=table.title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for i, name in enumerate(table.header):
        longest = max((len(word) for cells in table.rows for word in cells[i].text.split()), default=0)
        rich.add_column(
            re.sub("[ _]", "\n", name), justify="right" if i else "left", overflow="fold", min_width=min(longest, _WORD)
        )
    for cells in table.rows:
        rich.add_row(*(_coloured(c) for c in cells))
    return rich


def _coloured(cell: Cell) -> str:
    colour = "" if not cell.shade else "green" if cell.shade > 0 else "red"
    return f"[{colour}]{cell.text}[/{colour}]" if colour else cell.text


def page(run: Run, results: Results, panels: Sequence[Picture], sections: Sequence[Section]) -> str:
    """Return index.html, whole in itself."""
    escape = html.escape
    verdicts = "".join(
        f'<li class="{badge(results, x)}"><b>{escape(x.name)}</b> {escape(verdict(results, x))}</li>'
        for x in results.merges
    )
    numbered = list(enumerate(sections, 1))
    links = "".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in numbered)
    body = "".join(_html_section(s, f"s{i}") for i, s in numbered)
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes())
    return f"""{_head(run.recipe.name)}
<header><p>{escape(run.recipe.name)} · {escape(run.recipe.base_model)}</p><h1>{escape(headline(results))}</h1></header>
<ul class="verdicts">{verdicts}</ul>
<figure><div class="panels">{"".join(_image(p) for p in panels)}</div>
<figcaption>{escape(caption(results))}</figcaption></figure>
<nav>{links}<a href="#read">How to read</a><a href="#recipe">Recipe</a><a href="costs.html">Time and memory</a></nav>
{body}<h2 id="read">How to read</h2><ul class="notes">{notes}</ul>
<h2 id="recipe">Recipe</h2><details open><summary>as frozen in the run folder</summary>
<pre>{escape(frozen_recipe(run))}</pre></details></body></html>
"""


def costs_page(run: Run, tables: Sequence[Table]) -> str:
    """Return costs.html: what depends on the machine and on interruptions, apart from what must not."""
    name = html.escape(run.recipe.name)
    shown = "".join(f"<h2>{html.escape(t.title)}</h2>{_html_table(t)}" for t in tables)
    return f"""{_head(run.recipe.name + ": costs")}
<header><p><a href="index.html">{name}</a></p></header>{shown}</body></html>
"""


def sections_page(title: str, found: Sequence[str], sections: Sequence[Section]) -> str:
    """Return a page of its own: a title, what was found in a sentence each, and sections."""
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found)
    body = "".join(_html_section(s, f"s{i}") for i, s in enumerate(sections, 1))
    return f"""{_head(title)}
<header><h1>{html.escape(title)}</h1></header><ul class="verdicts">{said}</ul>{body}</body></html>
"""


def sections_markdown(title: str, found: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the same as Markdown."""
    said = "\n".join(f"- {_plain(sentence)}" for sentence in found)
    parts = [f"# {_plain(title)}", said, *(text for section in sections for text in _markdown_section(section))]
    return "\n\n".join(parts) + "\n"


def _head(title: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{CSS}</style></head><body>"""


def _html_section(section: Section, anchor: str) -> str:
    intro = f'<p class="intro">{html.escape(section.intro)}</p>' if section.intro else ""
    tables = "".join(f"<div><h3>{html.escape(t.title)}</h3>{_html_table(t)}</div>" for t in section.tables)
    inner = "".join([*map(_image, section.pictures), *map(_quote, section.quotes)])
    held = f'<div class="tables">{tables}</div>' if tables else ""
    return f'<section><h2 id="{anchor}">{html.escape(section.title)}</h2>{intro}{inner}{held}</section>'


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<img alt="{html.escape(picture.told)}" src="data:image/png;base64,{data}">'


def _quote(quote: Quote) -> str:
    return (
        f"<blockquote><small>{html.escape(quote.source)}</small><p>{html.escape(_beginning(quote.text))}</p>"
        f"<small>{html.escape(quote.told)}</small></blockquote>"
    )


def _beginning(text: str) -> str:
    """Return the beginning of a document on one line, with dots where it goes on."""
    return " ".join(text.split()) + " …" * (len(text) >= _KEPT)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in table.header)
    rows = ("".join(_html_cell(c, table, first=i == 0) for i, c in enumerate(row)) for row in table.rows)
    body = "".join(f"<tr>{cells}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell: Cell, table: Table, *, first: bool) -> str:
    if first:
        return f"<th>{html.escape(cell.text)}</th>"
    strength = min(abs(cell.shade), 1)
    words = ["up" if cell.shade > 0 else "down"] * bool(cell.shade) + ["own"] * cell.marked
    words += ["judged"] * (table.judged and bool(cell.shade))
    style = f' style="--a:{0.08 + 0.5 * strength:.2f}"' if cell.shade else ""
    named = f' class="{" ".join(words)}"' if words else ""
    hint = f' title="{html.escape(cell.hint)}"' if cell.hint else ""
    return f"<td{named}{style}{hint}>{html.escape(cell.text)}</td>"


CSS = """
:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#5f5f5f;--line:#dcdcd8;--paper:#fff;--card:#f6f6f3;--good:0,114,178;
--bad:213,94,0}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e4;--soft:#a9a9a4;--line:#3a3a38;--paper:#161615;--card:#21211f;
--good:64,158,224;--bad:222,114,32}.panels img,section img{filter:invert(.91) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1280px;margin:0 auto;
padding:1rem;overflow-wrap:anywhere}
header p,figcaption,.notes,summary,.intro{color:var(--soft);font-size:.9rem}.intro{max-width:75ch}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 1rem;text-wrap:balance}
h2{font-size:1.2rem;margin:2.2rem 0 .5rem}h3{font-size:1rem;margin:0 0 .3rem}
a{color:inherit}nav{font-size:.9rem;display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:1rem 0}
.verdicts{list-style:none;padding:0}.verdicts li{border-left:5px solid var(--soft);padding:.2rem .8rem;margin:.5rem 0}
.verdicts .better{border-color:rgb(var(--good))}.verdicts .worse{border-color:rgb(var(--bad))}
figure{margin:1.2rem 0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:.5rem}
img{width:100%;max-width:675px;height:auto;background:#fff;border-radius:6px;display:block}
section img{max-width:440px;margin:.5rem 0}
.scroll{overflow-x:auto;max-width:100%}.tables{display:flex;flex-wrap:wrap;gap:1.2rem 2rem}.tables>div{max-width:100%;
min-width:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}
th,td{padding:.25rem .55rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:500;color:var(--soft)}th:first-child{text-align:left}tbody th{color:var(--ink);position:sticky;left:0;
background:var(--paper)}
td.up{background:rgba(var(--good),var(--a))}td.down{background:rgba(var(--bad),var(--a))}
td.down.judged::before{content:"▾";font-size:.7em;opacity:.75;margin-right:.2em}
td.up.judged::before{content:"▴";font-size:.7em;opacity:.75;margin-right:.2em}
.own{outline:2px solid var(--ink);outline-offset:-3px}
blockquote{margin:.8rem 0;padding:.5rem .8rem;background:var(--card);border-radius:6px;max-width:75ch}
blockquote p{margin:.2rem 0}blockquote small{color:var(--soft);display:block}
pre{overflow-x:auto;font-size:.85rem;background:var(--card);padding:.6rem;border-radius:6px}
@page{margin:12mm}
@media print{:root{--ink:#000;--soft:#444;--line:#ccc;--paper:#fff;--card:#f4f4f1;--good:0,114,178;--bad:213,94,0}
body{max-width:none;padding:0;font-size:10.5px}nav{display:none}.panels{grid-template-columns:1fr 1fr}
.panels img,section img{filter:none;max-width:100%}
table{font-size:8.5px}th,td{padding:.1rem .3rem}tbody th{position:static}
.scroll{overflow:visible}pre{white-space:pre-wrap}
td,blockquote{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.panels img,.tables>div,blockquote,tr{break-inside:avoid}h2,h3{break-after:avoid}}
"""
