"""lm-eval's tasks: found by name, loaded, and looked at before a model is."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants

from hf_contmerge.errors import DataError, RecipeError, ResourceError, unknown
from hf_contmerge.run.recipe.parts import Evaluate, Task

DocumentPart = Literal["all", "test", "validation"]
"""Which of a task's documents to measure: what is chosen on the validation part must not be judged by it."""

_OWN: dict[str, Any] = {}  # lm-eval's own tasks, once this process has listed them
_SAMPLED = 32  # documents of a task, to tell how long its requests are


@dataclass(frozen=True)
class Requests:
    """What a task asks of a model: how often, some of the texts, and whether it wants text back."""

    count: int
    texts: tuple[str, ...]
    generates: bool


@dataclass(frozen=True)
class LoadedTask:
    """lm-eval's tasks under a name, and the groups that join them."""

    name: str
    leaves: Mapping[str, Any]
    """One, or those of a group or a tag, by their own names."""
    groups: Mapping[str, Any]


def check_tasks(
    tasks: Sequence[Task], folders: Sequence[Path], *, split: bool = False, limit: int | None = None
) -> None:
    """Load all tasks, to see that they and their data are there.

    Args:
        tasks: what will be measured.
        folders: where tasks of our own lie.
        split: whether their documents will be split into a validation and a test part.
        limit: how many documents of each will be measured; None for all.

    Raises:
        RecipeError: a task is neither in the folders nor known to lm-eval, or runs what a model writes.
        DataError: its dataset is missing, cannot be read, or has too few documents.
        ResourceError: the Hub, where its dataset lies, cannot be reached; all such tasks are named at once.
    """
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
                constants.HF_HUB_OFFLINE = True  # one task's retries of 20 seconds tell enough
    finally:
        constants.HF_HUB_OFFLINE = offline
    if len(absent) == 1:
        raise next(iter(absent.values()))
    if absent:
        raise ResourceError(
            f"The datasets of {len(absent)} tasks are not here, and the Hub cannot be reached: {', '.join(absent)}. "
            "Check the network and HF_HUB_OFFLINE, or leave these tasks out."
        )


def load_libraries() -> None:
    """Import what scoring imports when it begins, so that the memory of a process that has them can be measured."""
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401


def sample_requests(name: str, folders: Sequence[Path], *, few_shot: int | None, limit: int | None) -> Requests:
    """Return what a task will ask of a model, from its first documents. Raises as `check_tasks`.

    `few_shot`, `limit`: as the recipe has them; None: as the task does.
    """
    loaded = load_task(task_manager([name], folders), Task(name=name, num_fewshot=few_shot))
    count, sampled = 0, []
    for leaf in loaded.leaves.values():
        documents = min(len(leaf.eval_docs), limit or len(leaf.eval_docs))
        leaf.build_all_requests(limit=min(documents, _SAMPLED))
        asked = [tuple(word for word in i.args if isinstance(word, str)) for i in leaf.instances]
        count += round(len(asked) * documents / min(documents, _SAMPLED)) if documents else 0
        sampled += asked
    generates = any(leaf.OUTPUT_TYPE == "generate_until" for leaf in loaded.leaves.values())
    return Requests(count, tuple("".join(words) for words in sampled), generates)


def task_manager(names: Sequence[str], folders: Sequence[Path]) -> Any:
    """Return lm-eval's index of tasks: of those in the folders, and of its own if one of the names is."""
    from lm_eval.tasks import TaskManager

    include: list[str | Path] = [str(f) for f in folders if f.is_dir()]
    ours = TaskManager(include_path=include, include_defaults=False)
    # Indexing lm-eval's own tasks takes seconds: only when one of them is meant.
    if set(names) <= set(ours.all_tasks):
        return ours
    whole = TaskManager(include_path=include)
    _OWN.update({name: entry for name, entry in whole._index.items() if name not in ours.all_tasks})
    return whole


def own_tasks() -> Mapping[str, Any]:
    """Return the entries of lm-eval's own tasks, groups and tags by name, if `task_manager` has come to list them."""
    return dict(_OWN)


def load_task(manager: Any, task: Task) -> LoadedTask:
    """Return lm-eval's tasks and groups under a name, with the few-shot examples asked for. Raises as `check_tasks`."""
    name = task.name
    try:
        loaded: Mapping[str, Mapping[str, Any]] = manager.load([name])
    except ConnectionError as error:
        raise ResourceError(
            f"The dataset of the task {name} is not here, and the Hub cannot be reached: {error}. Check the network "
            "and HF_HUB_OFFLINE, or leave the task out."
        ) from error
    except (FileNotFoundError, DatasetGenerationError) as error:
        raise DataError(f"The dataset of the task {name} cannot be read: {error.__cause__ or error}") from error
    for leaf in loaded["tasks"].values():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise RecipeError(
                f"The task {name} runs the program code that a model writes, which this program does not. Leave it "
                "out, and measure it with lm_eval's own command inside a sandbox."
            )
        shots = leaf.get_config("num_fewshot") or 0 if task.num_fewshot is None else task.num_fewshot
        leaf.set_config(key="num_fewshot", value=shots)
    return LoadedTask(name, loaded["tasks"], {k: v for k, v in loaded["groups"].items() if k == name})


def part_indices(leaf: Any, part: DocumentPart, evaluate: Evaluate) -> list[int]:
    """Return which of a task's documents belong to a part, in order.

    A document belongs to the validation part if its digest, as a fraction of all digests, is below
    `evaluate.validation`: on every machine, in every task and at every `limit` the same; so two copies of a document
    never lie on different sides. A side that this leaves with less than two gets the nearest ones, if there are four:
    one document says nothing of the noise.
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
    """Return where a document's digest lies between 0 and 1."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(document, default=handle_non_serializable, ensure_ascii=False, sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256


def _check_documents(task: LoadedTask, limit: int | None, *, split: bool) -> None:
    for name, leaf in task.leaves.items():
        count = len(list(leaf.eval_docs)[:limit])
        if count < 1 + split:
            need = "A guard or an `auto` parameter needs at least two, to choose on one and judge by another." * split
            raise DataError(
                f"The task {name} has {count or 'no'} document{'s' * (count != 1)} to measure. "
                f"{need or 'Leave it out.'}"
            )


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Return the few of lm-eval's thousands of tasks that a message should show."""
    return difflib.get_close_matches(name, known, n=8, cutoff=0.4)
