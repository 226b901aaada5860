"""Fills the templates. Values are escaped for HTML or Markdown."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_FOLDER = Path(__file__).with_name("templates")
_MARKUP = re.compile(r"[\\`*_\[\]<>|~]|&(?=#?\w+;)")
_TEX = re.compile(r"[\\&%$#_{}~^−–Δ→]")
_TEX_WORDS = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--",
    "Δ": r"$\Delta$", "→": r"$\to$",
}  # fmt: skip
_LIST = re.compile(r"^(\d*)(#|[-+](?=\s)|(?<=\d)[.)](?=\s))")
"""A heading or a list item at the start of a line."""


def fill(template: str, **values: Any) -> str:
    """Fill a template of the folder `templates`, named such as page.html."""
    return _environment(Path(template).suffix).get_template(template).render(values)


@cache
def _environment(suffix: str) -> Environment:
    settings: dict[str, Any] = {"finalize": escape_markdown} if suffix == ".md" else {}
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **settings,
    )
    environment.filters |= {
        "drawn": Markup, "code": code_span, "fenced": fenced, "latex": escape_latex, "quoted": quoted,
    }  # fmt: skip
    return environment


def escape_markdown(value: object) -> Markup:
    """Escape Markdown's markup, on one line."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).splitlines())
    return Markup(_LIST.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", text)))


def escape_latex(value: object) -> Markup:
    """Escape LaTeX's special characters, on one line."""
    text = " ".join(str(value).splitlines())
    return Markup(_TEX.sub(lambda found: _TEX_WORDS.get(found.group(), f"\\{found.group()}"), text))


def code_span(text: str | None) -> Markup:
    """Return a text as inline code of Markdown; nothing for nothing."""
    if not text:
        return Markup("")
    text = " ".join(text.splitlines())  # an empty line would end the code
    tick = _longer_than_in("`", text)
    pad = " " * ("`" in text)
    return Markup(f"{tick}{pad}{text}{pad}{tick}")


def quoted(text: str) -> Markup:
    """Return a text as a string of Python or JSON."""
    return Markup(json.dumps(text))


def fenced(text: str, language: str) -> Markup:
    """Return lines as a block of code in Markdown."""
    fence = _longer_than_in("```", text)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _longer_than_in(mark: str, text: str) -> str:
    while mark in text:
        mark += mark[0]
    return mark
