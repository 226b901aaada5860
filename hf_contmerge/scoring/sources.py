"""The Hub datasets behind tasks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.scoring._formats import LOCAL_READERS, dataset_commit
from hf_contmerge.scoring._task_digest import TaskDigests
from hf_contmerge.scoring.cache import JsonStore


class HubData(NamedTuple):
    """A dataset on the Hub, as a task reads it."""

    path: str
    config: str | None
    commit: str | None
    """The fetched one, if known."""


def hub_datasets(tasks: Iterable[Task], folder: Path) -> dict[str, HubData]:
    """Return task -> dataset, without local files and unknown tasks.

    `folder`: of the run's own task files.
    """
    digests = TaskDigests.open([folder], JsonStore.open())
    return {task.name: data for task in tasks if (data := _hub_data(task, digests))}


def _hub_data(task: Task, digests: TaskDigests) -> HubData | None:
    if task.dataset:
        source = task.dataset.sources()[0]
        path, config, revision = source.path, source.config, source.revision
    else:
        settings = digests.settings(task.name)
        options = settings.get("dataset_kwargs")
        path, config = settings.get("dataset_path"), settings.get("dataset_name")
        revision = options.get("revision") if isinstance(options, dict) else None
    if not isinstance(path, str) or path.count("/") != 1 or path in LOCAL_READERS or Path(path).exists():
        return None
    config, revision = (word if isinstance(word, str) else None for word in (config, revision))
    return HubData(path, config, dataset_commit(path, config, revision))
