"""Pages of the site that are made from code, tables and notebooks; links out of docs/.

MkDocs calls the functions whose names begin with `on_`. Nothing is written into docs/.
"""

import ast
import base64
import json
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PROJECT = {"README.md": "front.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md",
           "CHANGELOG.md": "changelog.md"}  # fmt: skip
"""Pages outside docs/ -> their place on the site."""
EFFECT = (
    "The quickstart", "cl-standard on SmolLM2", "Streams that were set aside", "Rules side by side",
    "Strategies side by side", "Objectives side by side", "Rounding",
)  # fmt: skip
"""Sections of figures.md about what a model knows afterwards; the others are about cost and exactness."""
FACES = ("hf_contmerge", "hf_contmerge.merge_rules", "hf_contmerge.train_strategies", "hf_contmerge.merging",
         "hf_contmerge.training.rewards", "hf_contmerge.testing")  # fmt: skip
KINDS = {"rules": "merge_rules", "strategies": "train_strategies"}
"""Page with the tables -> folder of the package with one file a name."""


# Which pages there are


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the pages of the navigation that are named by a folder."""
    made = [*_generated(), *(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))]
    config.nav = [{title: list(_listed(pages, made)) for title, pages in part.items()} for part in config.nav]
    return config


def _listed(pages: list[str], made: list[str]) -> Iterator[str]:
    for page in pages:
        if page.endswith("/*"):
            yield from sorted(p for p in made if p.startswith(page[:-1]) and p.endswith(".md"))
        else:
            yield page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, pictures and the recipe's schema that do not lie in docs/."""
    for place, content in _generated().items():
        files.append(File.generated(config, place, content=content))
    return files


@cache
def _generated() -> dict[str, str | bytes]:
    """Return place on the site -> content."""
    made: dict[str, str | bytes] = {place: (ROOT / name).read_text() for name, place in PROJECT.items()}
    for page, folder in KINDS.items():
        for file in sorted((ROOT / "hf_contmerge" / folder).glob("[!_]*.py")):
            made[f"{page}/{file.stem}.md"] = method_page(page, file.stem)
    for face in FACES:
        made[f"api/{face}.md"] = _api_page(face)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made |= _notebook_page(notebook)
    for picture in (ROOT / "notebooks").glob("*.png"):
        made[f"notebooks/{picture.name}"] = picture.read_bytes()
    made["commands.md"] = _commands_page()
    made["contmerge.schema.json"] = _schema()
    return made


# Links: pages are written for GitHub


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to other files of the repository into links of the site, or to the repository."""
    here = page.file.src_uri
    folder = _folder_of(here)

    def moved(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        place = _on_site(posixpath.normpath(posixpath.join(folder, target)), files)
        if place is None:
            path = posixpath.normpath(posixpath.join(folder, target))
            if not (ROOT / path).exists():
                raise PluginError(f"{here} links to {target}, which is missing")
            return f"]({config.repo_url}/blob/main/{path}{hash_}{anchor})"
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{hash_}{anchor})"

    text = "".join(
        part if part.startswith("```") else re.sub(r"\]\(([^)\s]+)\)", moved, part)
        for part in re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)
    )
    return _with_pages_of_methods(text, here.removesuffix(".md")) if here.removesuffix(".md") in KINDS else text


def _folder_of(place: str) -> str:
    """Return the folder of the repository to which a page's links are relative."""
    if place in PROJECT.values():
        return ""
    if place.startswith("notebooks/"):
        return "notebooks"
    return posixpath.dirname(f"docs/{place}") if (DOCS / place).exists() else "docs"


def _on_site(path: str, files: Files) -> str | None:
    """Return the place on the site of a file of the repository."""
    place = PROJECT.get(path) or path.removeprefix("docs/")
    if path.startswith("notebooks/"):
        place = path.replace(".ipynb", ".md")
    inside = path.startswith(("docs/", "notebooks/")) or path in PROJECT
    return place if inside and files.get_file_from_path(place) else None


def _with_pages_of_methods(text: str, page: str) -> str:
    return re.sub(r"^\| `(\w+)` \|", rf"| [`\1`]({page}/\1.md) |", text, flags=re.M)


# One page a rule or strategy


class Row(NamedTuple):
    """A row of a table, with the table's header and section."""

    section: str
    header: list[str]
    cells: list[str]


def method_page(page: str, name: str) -> str:
    """Return the page of one rule or strategy: its docstrings, its rows of the tables, its figures."""
    file = ROOT / "hf_contmerge" / KINDS[page] / f"{name}.py"
    overview, parameters = _table_rows(page, 0)[name], _table_rows(page, 1)[name]
    facts = zip(overview.header[1:] + parameters.header[1:], overview.cells[1:] + parameters.cells[1:], strict=True)
    kind = {"rules": "merge rule", "strategies": "training strategy"}[page]
    parts = [
        f"# {name}\n\nA {kind}, one of [all {page}]({page}.md).",
        _docstrings(file),
        "| | |\n|---|---|\n" + "\n".join(f"| {what} | {value or 'none'} |" for what, value in facts),
        _in_a_recipe(page, name),
        "\n".join(_notes(page, name)),
        f"## Measured effect\n\n{_effect(page, name)}",
        *re.findall(rf"Figures\s+of `{name}`[^.]+\.", _text("figures.md")),
        "Machines, seeds and limits: [figures.md](figures.md).",
        *([f"## Cost and exactness\n\n{cost}"] if (cost := _tables_of(name, effect=False)) else []),
        f"Code: [{file.name}](../{file.relative_to(ROOT).as_posix()}).",
    ]
    return re.sub(r"\]\(#", f"]({page}.md#", "\n\n".join(part for part in parts if part)) + "\n"


def _docstrings(file: Path) -> str:
    tree = ast.parse(file.read_text())
    name = "".join(word.capitalize() for word in file.stem.split("_"))
    (method,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.lower() == name.lower())
    formula, _, rest = (ast.get_docstring(method) or "").partition("\n\n")
    rest = re.sub(r"((?:^ {4}.*\n?)+)", r"```\n\1\n```\n", rest, flags=re.M)
    return f"{ast.get_docstring(tree)}\n\n```\n{formula}\n```\n\n{rest}".strip()


def _in_a_recipe(page: str, name: str) -> str:
    if page == "rules":
        return f"```yaml\nmerge: [{name}]\n```"
    carriers = re.findall(r"^\| `(\w+)`", _text("strategies.md"), flags=re.M)[:6]
    return f"```yaml\ntrain: {{strategy: {name if name in carriers else f'[full, {name}]'}}}\n```"


def _notes(page: str, name: str) -> Iterator[str]:
    """Yield the list items of the tables' page that begin with the name."""
    for item in re.findall(r"^- (?:[^\n]|\n  )+", _text(f"{page}.md"), flags=re.M):
        if re.match(rf"- \W*{name}\b", item, flags=re.I):
            yield item


def _effect(page: str, name: str) -> str:
    measured = _tables_of(name, effect=True)
    published = [
        row for row in _rows("strategies.md") if f"`{name}" in row.cells[0] and "published effect" in row.header
    ]
    if measured or page == "rules" or not published:
        return measured or "Not measured yet on a real model. It is tested against its paper's formula."
    return f"Not measured yet on a real model. What is known is from the papers:\n\n{_table(published)}"


def _tables_of(name: str, *, effect: bool) -> str:
    """Return the rows of figures.md about a name, section by section."""
    of = re.compile(rf"(?<![\w-])`?\[?(?:\w+, )?{name}\]?(?:`| |$)")
    rows = [r for r in _rows("figures.md") if any(of.search(cell.strip("*")) for cell in r.cells[:2])]
    rows = [r for r in rows if (r.section in EFFECT) == effect]
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.section, *row.header), []).append(row)
    return "\n\n".join(
        f"From [{key[0]}](figures.md#{_slug(key[0])}):\n\n{_table(found)}" for key, found in tables.items()
    )


def _table(rows: list[Row]) -> str:
    lines = [rows[0].header, ["---"] * len(rows[0].header), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _table_rows(page: str, number: int) -> dict[str, Row]:
    """Return name -> row of the first or second table whose rows are names."""
    tables: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in _rows(f"{page}.md"):
        if match := re.fullmatch(r"`(\w+)`", row.cells[0]):
            tables.setdefault(tuple(row.header), {})[match[1]] = row
    return list(tables.values())[number]


@cache
def _rows(page: str) -> tuple[Row, ...]:
    """Return all rows of a page's tables; an empty first cell repeats the one above."""
    rows, section, header, first = [], "", None, ""
    for line in _text(page).splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else None
        if cells is None:
            header = None
        elif header is None:
            header = cells
        elif not re.fullmatch(r"[-:| ]+", line):
            first = cells[0] or first
            rows.append(Row(section, header, [first, *cells[1:]]))
    return tuple(rows)


@cache
def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Commands, public names, the schema


def _commands_page() -> str:
    from hf_contmerge.commands.main import _COMMANDS, every_command

    helps = {a.prog: a.format_help() for action in every_command()._actions for a in _parsers(action)}
    named = [f"## {prog}\n\n```text\n{text}```" for prog, text in helps.items() if prog.split()[1] in _COMMANDS]
    return "# Commands\n\nWhat `contmerge COMMAND --help` prints.\n\n" + "\n\n".join(named)


def _parsers(action: Any) -> Iterator[Any]:
    for child in (getattr(action, "choices", None) or {}).values() if hasattr(action, "add_parser") else ():
        yield child
        for inner in child._actions:
            yield from _parsers(inner)


def _schema() -> str:
    from hf_contmerge.run.recipe.json_schema import recipe_schema

    return json.dumps(recipe_schema(DOCS / "recipe.md"), indent=1, ensure_ascii=False)


def _api_page(face: str) -> str:
    path = ROOT.joinpath(*face.split("."), "__init__.py")
    tree = ast.parse(path.read_text())
    names = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names += [alias.asname for alias in node.names if alias.asname == alias.name]
    if not names:
        raise PluginError(f"{face} has no public names")
    shown = "\n\n".join(f"::: {face}.{name}" for name in dict.fromkeys(names))
    return f"# {face}\n\n{ast.get_docstring(tree)}\n\n{shown}\n"


# Notebooks


def _notebook_page(file: Path) -> dict[str, str | bytes]:
    """Return a notebook as a page with its stored outputs, and its pictures."""
    parts, pictures = [], {}
    for number, cell in enumerate(json.loads(file.read_text())["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for place, output in enumerate(cell.get("outputs", ())):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{file.stem}-{number}-{place}.png"
                pictures[f"notebooks/{name}"] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![The cell's picture](../notebooks/{name})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]).replace("\n# ", "\n### "))
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            elif text := "".join(output.get("text", ()) or data.get("text/plain", ())):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return {f"notebooks/{file.stem}.md": "\n\n".join(parts), **pictures}
