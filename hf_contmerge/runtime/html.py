"""Tables for notebooks, as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(caption: str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table.

    None is an empty cell; floats have three decimals.
    """
    body = "".join(f"<tr>{''.join(f'<td>{escape(_text(cell))}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{escape(word)}</th>" for word in header)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(cell: object) -> str:
    return "" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
