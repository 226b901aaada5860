"""Task suites and benchmark streams, with sources, from `suites.yml`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.errors import RecipeError, unknown


@dataclass(frozen=True)
class StreamStage:
    """A stage of a stream: a classification dataset, or an expert."""

    name: str
    path: str = ""
    """Dataset on the Hub."""
    question: str = ""
    """Format string over its columns."""
    label: str = ""
    """Column with the number of the class."""
    words: tuple[str, ...] = ()
    """Name of each class, by its number."""
    expert: str = ""
    """Model on the Hub, a format over the last part of the base's name."""
    tasks: tuple[str, ...] = ()
    """lm-eval's tasks for the expert."""


def suite_tasks(name: str) -> tuple[str, ...]:
    """Return a suite's lm-eval tasks. Raises RecipeError if unknown."""
    suites = _contents()["suites"]
    if name not in suites:
        raise RecipeError(unknown("suite", name, suites))
    return tuple(suites[name]["tasks"])


def suite_names() -> tuple[str, ...]:
    """Return the suites' names, allowed in lists of tasks."""
    return tuple(_contents()["suites"])


def stream_names() -> tuple[str, ...]:
    """Return the names of the benchmark streams."""
    return tuple(_contents()["streams"])


def stream_stages(name: str, order: int) -> tuple[StreamStage, ...]:
    """Return a stream's stages in a published order.

    Raises RecipeError for an unknown stream or order.
    """
    streams = _contents()["streams"]
    if name not in streams:
        hint = f" {name} is a suite of tasks: name it in `general_tasks`." if name in suite_names() else ""
        raise RecipeError(unknown("stream", name, streams) + hint)
    stream = streams[name]
    if order not in stream["orders"]:
        raise RecipeError(unknown("order", str(order), map(str, stream["orders"]), where=name))
    stages: Mapping[str, Mapping[str, Any]] = stream["stages"]
    return tuple(_stage(name, stages[name]) for name in stream["orders"][order])


def _stage(name: str, fields: Mapping[str, Any]) -> StreamStage:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return StreamStage(name, **values)


def stream_rules(name: str) -> tuple[str, ...]:
    """Return the merge rules compared by a stream's authors."""
    return tuple(_contents()["streams"][name].get("rules", ()))


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
