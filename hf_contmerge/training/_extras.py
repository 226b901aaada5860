"""Columns that chat templates read next to a conversation: tool definitions, arguments of the template.

TRL takes them from each example. Tool definitions become JSON text: as columns of structures, rows with different tools
would get each other's keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import datasets

from hf_contmerge.errors import DataError

TOOLS, ARGUMENTS = "tools", "chat_template_kwargs"
EXTRAS = (TOOLS, ARGUMENTS)


def extras_of(columns: Iterable[str], *, talk: bool) -> tuple[str, ...]:
    """Return the extra columns among a dataset's. `talk`: its examples are conversations."""
    return tuple(name for name in EXTRAS if talk and name in columns)


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a row's chat template."""
    tools = {TOOLS: json.loads(row[TOOLS])} if row.get(TOOLS) else {}
    return tools | (row.get(ARGUMENTS) or {})


def with_extras(rows: datasets.Dataset, where: str) -> datasets.Dataset:
    """Return rows with checked extra columns.

    Raises DataError for tools that are no list, and for arguments that only some rows have.
    """
    if TOOLS in rows.column_names:
        exact = "Json(" in str(rows.features[TOOLS])  # nulls are the row's own
        tools = [_tools(value, f"{where}, row {number}", exact=exact) for number, value in enumerate(rows[TOOLS], 1)]
        rows = rows.remove_columns([TOOLS]).add_column(TOOLS, tools)  # pyright: ignore
        rows = rows.cast_column(TOOLS, datasets.Value("string"))
    if ARGUMENTS in rows.column_names:
        _check_arguments(rows[ARGUMENTS], where)
    return rows


def _tools(value: Any, where: str, *, exact: bool) -> str | None:
    """Return tool definitions as JSON text; None without any."""
    try:
        definitions = json.loads(value) if isinstance(value, str) else value if exact else _without_nulls(value)
    except ValueError as error:
        raise DataError(f"{where}: the column {TOOLS} is no JSON ({error}). Give a list of definitions.") from error
    if not definitions:
        return None
    if not isinstance(definitions, list) or not all(isinstance(tool, dict) for tool in definitions):
        raise DataError(f"{where}: the column {TOOLS} must hold a list of tool definitions; got {value!r:.60}.")
    return json.dumps(definitions, ensure_ascii=False)


def _without_nulls(value: Any) -> Any:
    """Drop null keys: a column of structures has those of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_arguments(values: Iterable[Any], where: str) -> None:
    keys: set[str] | None = None
    for number, value in enumerate(values, 1):
        mine = {key for key, item in value.items() if item is not None} if isinstance(value, dict) else None
        keys = mine if number == 1 else keys
        if mine is None or mine != keys or len(mine) != len(value):
            raise DataError(
                f"{where}, row {number}: the column {ARGUMENTS} must hold a mapping with the same keys in every row, "
                f"none of them null; got {value!r:.60}. Give every row a value for each key."
            )
