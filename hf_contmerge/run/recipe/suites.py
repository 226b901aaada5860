"""Tasks and benchmarks under one name; `task_suites.yml` beside this file lists them with their sources."""

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
    """A dataset of a stream: texts of several classes, whose names are to be learnt."""

    name: str
    path: str
    """On the Hub."""
    question: str
    """A format over its columns."""
    label: str
    """The column with the number of the class."""
    words: tuple[str, ...]
    """What stands for each class."""


def suite_tasks(name: str) -> tuple[str, ...]:
    """Return lm-eval's names of the tasks of a suite. Raises RecipeError for an unknown one."""
    suites = _contents()["suites"]
    if name not in suites:
        raise RecipeError(unknown("suite", name, suites))
    return tuple(suites[name]["tasks"])


def suite_names() -> tuple[str, ...]:
    """Return the names that may stand in a list of tasks."""
    return tuple(_contents()["suites"])


def stream_names() -> tuple[str, ...]:
    """Return the names of the benchmarks that are stages."""
    return tuple(_contents()["streams"])


def stream_stages(name: str, order: int) -> tuple[StreamStage, ...]:
    """Return the stages of a stream in one of its published orders. Raises RecipeError for an unknown one."""
    streams = _contents()["streams"]
    if name not in streams:
        hint = f" {name} is a suite of tasks: name it in `general_tasks`." if name in suite_names() else ""
        raise RecipeError(unknown("stream", name, streams) + hint)
    stream = streams[name]
    if order not in stream["orders"]:
        raise RecipeError(unknown("order", str(order), map(str, stream["orders"]), where=name))
    found: Mapping[str, Mapping[str, Any]] = stream["stages"]
    return tuple(
        StreamStage(n, found[n]["path"], found[n]["question"], found[n]["label"], tuple(found[n]["words"]))
        for n in stream["orders"][order]
    )


def expand_suites(value: Any) -> Any:
    """Return a recipe's list of tasks with the tasks of each suite in the place of its name.

    A task that a suite repeats is taken once, from where it stands first. `{name: general}` means a task of that name.
    """
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        return value
    found: list[Any] = []
    for item in values:
        if not isinstance(item, str) or item not in suite_names():
            found.append(item)
            continue
        known = {i.get("name") if isinstance(i, dict) else i for i in found if isinstance(i, dict | str)}
        found += [{"name": task, "suite": item} for task in suite_tasks(item) if task not in known]
    return tuple(found)


@functools.cache
def _contents() -> Mapping[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))
