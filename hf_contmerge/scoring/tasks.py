"""Finds, loads and checks lm-eval's tasks before loading a model."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants

from hf_contmerge.errors import DataError, RecipeError, ResourceError, unknown
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.scoring._strangers import foreign_tasks, task_errors
from hf_contmerge.scoring.keys import DocumentPart

_OWN: dict[str, Any] = {}  # lm-eval's own tasks, filled on demand
_SAMPLED = 32  # documents per task, to estimate request lengths


@dataclass(frozen=True)
class Requests:
    """A task's requests to a model: number, sample texts and kind."""

    count: int
    texts: tuple[str, ...]
    generates: bool


@dataclass(frozen=True)
class LoadedTask:
    """lm-eval's tasks and groups loaded under one name."""

    name: str
    leaves: Mapping[str, Any]
    """One task, or the members of a group or tag, by name."""
    groups: Mapping[str, Any]


def check_tasks(
    tasks: Sequence[Task],
    folders: Sequence[Path],
    *,
    split: bool = False,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Load all tasks to check them and their data.

    Args:
        tasks: tasks to measure.
        folders: folders of our own task files.
        split: True if documents will be split into a validation and a test part.
        limit: documents per task; None for all.
        trust_remote_code: allow task files to run Python.

    Raises:
        RecipeError: a task is unknown, or runs code written by the model, or by others without consent.
        DataError: a dataset is missing, unreadable or too small.
        ResourceError: datasets on the Hub cannot be reached; the message names all affected tasks.
    """
    with foreign_tasks(trust_remote_code=trust_remote_code), task_errors():
        _check_tasks(tasks, folders, limit, split=split)


def _check_tasks(tasks: Sequence[Task], folders: Sequence[Path], limit: int | None, *, split: bool) -> None:
    manager = task_manager([t.name for t in tasks], folders)
    for task in tasks:
        if task.name not in manager.all_tasks:
            what = f"task of the suite {task.suite}," if task.suite else "task"
            raise RecipeError(unknown(what, task.name, _near(task.name, manager.all_tasks)))
    absent: dict[str, ResourceError] = {}
    offline = constants.HF_HUB_OFFLINE
    try:
        for task in tasks:
            try:
                _check_documents(load_task(manager, task), limit, split=split)
            except ResourceError as error:
                absent[f"{task.name} (of the suite {task.suite})" if task.suite else task.name] = error
                constants.HF_HUB_OFFLINE = True  # retries take 20 seconds: once is enough
    finally:
        constants.HF_HUB_OFFLINE = offline
    if len(absent) == 1:
        raise next(iter(absent.values()))
    if absent:
        raise ResourceError(
            f"The datasets of {len(absent)} tasks are missing, and the Hub cannot be reached: {', '.join(absent)}. "
            "Check the network and HF_HUB_OFFLINE, or remove these tasks."
        )


def load_libraries() -> None:
    """Import the libraries of scoring.

    The plan measures the memory of a process with these imports.
    """
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401


def sample_requests(
    name: str, folders: Sequence[Path], *, few_shot: int | None, limit: int | None, trust_remote_code: bool = False
) -> Requests:
    """Estimate a task's requests from its first documents.

    Args:
        name: name of the task.
        folders: folders of our own task files.
        few_shot: number of examples; None for the task's default.
        limit: number of documents; None for all.
        trust_remote_code: allow task files to run Python.

    Raises:
        ContmergeError: as `check_tasks`.
    """
    with foreign_tasks(trust_remote_code=trust_remote_code), task_errors(name):
        return _sample_requests(name, folders, few_shot, limit)


def _sample_requests(name: str, folders: Sequence[Path], few_shot: int | None, limit: int | None) -> Requests:
    loaded = load_task(task_manager([name], folders), Task(name=name, num_fewshot=few_shot))
    count, sampled = 0, []
    for leaf in loaded.leaves.values():
        documents = min(len(leaf.eval_docs), limit or len(leaf.eval_docs))
        leaf.build_all_requests(limit=min(documents, _SAMPLED))
        requests = [tuple(word for word in i.args if isinstance(word, str)) for i in leaf.instances]
        count += round(len(requests) * documents / min(documents, _SAMPLED)) if documents else 0
        sampled += requests
    generates = any(leaf.OUTPUT_TYPE == "generate_until" for leaf in loaded.leaves.values())
    return Requests(count, tuple("".join(words) for words in sampled), generates)


def task_manager(names: Sequence[str], folders: Sequence[Path]) -> Any:
    """Index the tasks in folders.

    lm-eval's own tasks are added if a name needs them.
    """
    from lm_eval.tasks import TaskManager

    include: list[str | Path] = [str(f) for f in folders if f.is_dir()]
    ours = TaskManager(include_path=include, include_defaults=False)
    # Indexing lm-eval's own tasks takes seconds.
    if set(names) <= set(ours.all_tasks):
        return ours
    whole = TaskManager(include_path=include)
    _OWN.update({name: entry for name, entry in whole._index.items() if name not in ours.all_tasks})
    return whole


def own_tasks() -> Mapping[str, Any]:
    """Return lm-eval's own task entries, as listed by `task_manager`."""
    return dict(_OWN)


def load_task(manager: Any, task: Task) -> LoadedTask:
    """Load lm-eval's tasks and groups under one name.

    Raises as `check_tasks`.
    """
    name = task.name
    try:
        loaded: Mapping[str, Mapping[str, Any]] = manager.load([name])
    except ConnectionError as error:
        raise ResourceError(
            f"The dataset of the task {name} is missing, and the Hub cannot be reached: {error}. Check the network "
            "and HF_HUB_OFFLINE, or remove the task."
        ) from error
    except (FileNotFoundError, DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"Cannot read the dataset of the task {name}: {error.__cause__ or error}") from error
    for leaf in loaded["tasks"].values():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise RecipeError(
                f"The task {name} runs code written by the model, which is not supported here. Remove it, and "
                "measure it with the lm_eval command inside a sandbox."
            )
        shots = leaf.get_config("num_fewshot") or 0 if task.num_fewshot is None else task.num_fewshot
        leaf.set_config(key="num_fewshot", value=shots)
    return LoadedTask(name, loaded["tasks"], {k: v for k, v in loaded["groups"].items() if k == name})


def part_indices(leaf: Any, part: DocumentPart, evaluate: Evaluate) -> list[int]:
    """Return the indices of the documents in a part, in order.

    A document belongs to the validation part if its digest, as a fraction of all digests, is below
    `evaluate.validation`. The split is the same on every machine, in every task and at every `limit`; copies of a
    document share a side. A side with fewer than two documents gets the nearest ones, if there are at least four: one
    document gives no estimate of the noise.
    """
    documents = list(leaf.eval_docs)[: evaluate.limit]
    everything = range(len(documents))
    if part == "all":
        return list(everything)
    if len(documents) < 2:
        raise DataError("One document cannot be split into a validation and a test part. Set `limit` to 2 or more.")
    places = [_place(document) for document in documents]
    order = sorted(everything, key=places.__getitem__)
    below = sum(place < evaluate.validation for place in places)
    least = min(2, len(order) // 2)
    below = min(max(below, least), len(order) - least)
    return sorted(order[:below] if part == "validation" else order[below:])


def _place(document: Any) -> float:
    """Map a document's digest to a fraction from 0 to 1."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(document, default=handle_non_serializable, ensure_ascii=False, sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256


def _check_documents(task: LoadedTask, limit: int | None, *, split: bool) -> None:
    for name, leaf in task.leaves.items():
        count = len(list(leaf.eval_docs)[:limit])
        if count < 1 + split:
            need = "A guard or an `auto` parameter needs at least two: one to choose on, one to judge by." * split
            raise DataError(
                f"The task {name} has {count or 'no'} document{'s' * (count != 1)} to measure. {need or 'Remove it.'}"
            )


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Return close matches among lm-eval's thousands of tasks."""
    return difflib.get_close_matches(name, known, n=8, cutoff=0.4)
