"""Formats over columns, such as "{question}\\n{answer}"."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_contmerge.errors import DataError

_WIDE = re.compile(r"\d{4}")


@dataclass(frozen=True)
class Format:
    """A column's name, or a format over columns."""

    text: str
    columns: tuple[str, ...]
    is_column: bool

    def fill(self, row: Mapping[str, Any], *, exact: bool) -> str:
        """Return a row's text. Raises ValueError for a value of wrong format.

        `exact`: show values of JSON as JSON.
        """
        return shown(row[self.text], exact=exact) if self.is_column else _Columns(exact).vformat(self.text, (), row)


def read_format(text: str, columns: Collection[str], where: str) -> Format:
    """Return the format in a text; a name means its column.

    Raises DataError for text that is neither.
    """
    if text in columns:
        return Format(text, (text,), True)
    try:
        fields = list(_fields(text))
    except ValueError as error:
        raise DataError(f"{where} is no format string: {text!r} ({error}).") from error
    if "" in fields:
        raise DataError(f"{where} has a field without a name: {text!r}. Name the column, such as {{question}}.")
    return Format(text, tuple(dict.fromkeys(fields)) or (text,), not fields)


def _fields(text: str, *, inner: bool = False) -> Iterator[str]:
    """Yield the names of fields. Raises ValueError for deep nesting."""
    for _, name, width, _ in string.Formatter().parse(text):
        if name is not None:
            yield name
            if inner and "{" in (width or ""):
                raise ValueError("fields are nested too deeply")
            yield from _fields(width or "", inner=True)


def shown(value: Any, *, exact: bool) -> str:
    """Return a value as text: strings unchanged, others as Python or JSON."""
    if isinstance(value, str) or not exact or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


class _Columns(string.Formatter):
    """Takes each field for a column's name, dots and brackets included."""

    def __init__(self, exact: bool) -> None:
        self._exact = exact

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if not format_spec:
            return shown(value, exact=self._exact)
        if _WIDE.search(format_spec):  # a text of as many blanks
            raise ValueError(f"the format {format_spec!r:.40} is wider than 999")
        try:
            return format(value, format_spec)
        except ValueError:
            return format(_number(value), format_spec)  # CSV has numbers as strings


def _number(text: Any) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
