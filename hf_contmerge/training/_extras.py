"""Columns of chat templates besides the turns: tools, template arguments.

TRL takes them from each example. Tool definitions become JSON text: as columns of structures, rows with different tools
would get each other's keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

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


def argument_keys(row: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys of a row's template arguments, equal for all rows."""
    value = row.get(ARGUMENTS)
    return frozenset(key for key, item in value.items() if item is not None) if isinstance(value, dict) else frozenset()


def read_tools(value: Any, *, exact: bool) -> str | None:
    """Return tool definitions as JSON text; None without any.

    `exact`: nulls are the file's. Raises DataError for anything but a list, without its place.
    """
    try:
        definitions = json.loads(value) if isinstance(value, str) else value if exact else _without_nulls(value)
    except ValueError as error:
        raise DataError(f"the column {TOOLS} is no JSON ({error}). Give a list of definitions.") from error
    if not definitions:
        return None
    if not isinstance(definitions, list) or not all(isinstance(tool, dict) for tool in definitions):
        raise DataError(f"the column {TOOLS} must hold a list of tool definitions; got {value!r:.60}.")
    return json.dumps(definitions, ensure_ascii=False)


def checked_arguments(value: Any, keys: frozenset[str]) -> dict[str, Any]:
    """Return template arguments. Raises DataError for other keys and nulls."""
    if not isinstance(value, dict) or value.keys() != keys or None in value.values():
        raise DataError(
            f"the column {ARGUMENTS} must hold a mapping with the same keys in every row, none of them null; got "
            f"{value!r:.60}. Give every row a value for each key."
        )
    return value


def _without_nulls(value: Any) -> Any:
    """Drop null keys: a column of structures has those of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
