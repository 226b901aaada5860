"""Tables for notebooks, with every value escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from hf_contmerge.runtime.hiding import printable


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as HTML, without secrets."""
    head = "".join(f"<th>{_shown(word)}</th>" for word in header)
    body = "".join(f"<tr>{''.join(f'<td>{_shown(value)}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><caption>{_shown(caption)}</caption><tr>{head}</tr>{body}</table>"


def _shown(value: object) -> str:
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(printable(text))
