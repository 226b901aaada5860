"""Task suites, with sources, from `suites.yml`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.errors import RecipeError, unknown


def suite_tasks(name: str) -> tuple[str, ...]:
    """Return a suite's lm-eval tasks. Raises RecipeError if unknown."""
    suites = _contents()["suites"]
    if name not in suites:
        raise RecipeError(unknown("suite", name, suites))
    return tuple(suites[name]["tasks"])


def suite_names() -> tuple[str, ...]:
    """Return the suites' names, allowed in lists of tasks."""
    return tuple(_contents()["suites"])


def expand_suites(value: Any) -> Any:
    """Replace suites in a recipe's list of tasks by their tasks.

    Duplicates are dropped; the first occurrence wins. `{name: general}` means a task of that name.
    """
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        return value
    tasks: list[Any] = []
    for item in values:
        if not isinstance(item, str) or item not in suite_names():
            tasks.append(item)
            continue
        names = {i.get("name") if isinstance(i, dict) else i for i in tasks if isinstance(i, dict | str)}
        tasks += [{"name": task, "suite": item} for task in suite_tasks(item) if task not in names]
    return tuple(tasks)


@functools.cache
def _contents() -> Mapping[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))
