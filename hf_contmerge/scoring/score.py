"""Score a model with lm-eval, on all ranks of all nodes: a folder, or a model that is in memory already."""

from __future__ import annotations

import copy
import gc
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig

from hf_contmerge.errors import ContmergeError, mark_shared
from hf_contmerge.models.loading import load_model
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.scoring._results import task_score
from hf_contmerge.scoring._task_digest import Listing, keep_own_listing
from hf_contmerge.scoring.cache import ScoreCache
from hf_contmerge.scoring.keys import Asked, Lookup, keep_scores, look_up
from hf_contmerge.scoring.setup import check_evaluate, require_template
from hf_contmerge.scoring.tasks import DocumentPart, LoadedTask, load_task, own_tasks, part_indices, task_manager

T = TypeVar("T")

_SEEDS = 0, 1234
"""Of Python, and of numpy, torch and few-shot examples: those of the stock command."""
_ALL = 2**30
"""More requests than any task makes."""


def score_model(
    folder: Path,
    tasks: Sequence[Task],
    *,
    task_folder: Path,
    evaluate: Evaluate,
    ranks: PartialState,
    base: Path | None = None,
    cache: ScoreCache | None = None,
    trust_remote_code: bool = False,
    part: DocumentPart = "all",
) -> tuple[str, dict[str, TaskScore]]:
    """Measure a model on tasks. All ranks call this together; the result is whole on the main process only.

    Args:
        folder: the model, or an adapter of `base`.
        tasks: what to measure; those made from datasets have been written to `task_folder`.
        task_folder: where they lie.
        evaluate: batch size, dtype, limits.
        ranks: accelerate's PartialState: device, rank and world size, over all nodes.
        base: the model that an adapter belongs to; a whole model needs none.
        cache: what has been measured before; without it, that of this machine, unless `evaluate` forbids it.
        trust_remote_code: let the model run code of its own.
        part: which of each task's documents to measure.

    Returns:
        The digest of the model as it was scored (weights, dtype, tokenizer), and the score of each task by name.

    Raises:
        DataError: a task gave no number.
        ModelError: the folder is no model, or the tokenizer lacks the chat template that `evaluate` asks for.
        ResourceError: this machine cannot do what `evaluate` asks for.
    """
    asked = Asked(folder, base, tuple(tasks), task_folder, evaluate, part, trust_remote_code)
    seen, fresh = score_asked(asked, ranks=ranks, cache=cache or ScoreCache.open(use=evaluate.cache))
    scores = {**seen.found, **fresh} if ranks.is_main_process else {}
    return seen.model.sha256, {task.name: scores[task.name] for task in tasks if task.name in scores}


def score_asked(asked: Asked, *, ranks: PartialState, cache: ScoreCache) -> tuple[Lookup, dict[str, TaskScore]]:
    """Measure what the cache does not know, and keep it there. Raises as `score_model`.

    Returns:
        What was known, on all ranks; and what has been measured, on the main process.
    """
    adapter = asked.folder != asked.whole
    check_evaluate(asked.evaluate, processes=ranks.num_processes, adapter=adapter)
    seen = _from_main(ranks, lambda: look_up(asked, cache))
    assert seen  # weights may be read
    missing = seen.missing(asked.tasks)
    if not missing:
        return seen, {}
    scores = _measure_folder(asked, missing, getattr(torch, seen.model.dtype), ranks)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not ranks.is_main_process:
        return seen, {}
    return seen, keep_scores(asked, seen, scores, cache, _own_tasks(seen, cache))


def _own_tasks(seen: Lookup, cache: ScoreCache) -> Listing | None:
    """Remember the tasks that lm-eval brings, if one of them had no key for want of their list."""
    return None if all(seen.keys.values()) else keep_own_listing(cache.shelf, own_tasks())


def _from_main(ranks: PartialState, do: Callable[[], T]) -> T:
    """Return what the main process finds on all ranks; or raise its failure there, so that none waits for it."""
    if ranks.num_processes == 1:
        return do()
    outcome: list[Any] = [None, None]
    if ranks.is_main_process:
        try:
            outcome[0] = do()
        except (ContmergeError, OSError, ValueError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise mark_shared(outcome[1])
    return outcome[0]


def _measure_folder(
    asked: Asked, tasks: Sequence[Task], dtype: torch.dtype, ranks: PartialState
) -> dict[str, TaskScore]:
    """Load a model and measure it; the result is on the main process."""
    evaluate, remote, part = asked.evaluate, asked.trust_remote_code, cast(DocumentPart, asked.part)
    if evaluate.backend == "vllm":
        return _measure(_vllm(asked.folder, dtype, evaluate), tasks, asked.task_folder, evaluate, part)
    model = _load(asked.folder, asked.whole, evaluate, ranks, dtype=dtype, trust_remote_code=remote)
    tokenizer = AutoTokenizer.from_pretrained(asked.whole, trust_remote_code=remote)
    return score_loaded(
        model, tokenizer, tasks, task_folder=asked.task_folder, evaluate=evaluate, ranks=ranks, part=part
    )


def score_loaded(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    task_folder: Path,
    evaluate: Evaluate,
    ranks: PartialState,
    part: DocumentPart = "all",
) -> dict[str, TaskScore]:
    """Measure a model that is in memory, in training too: its mode and all random states are left as they were.

    All ranks, each of which has the model, call this together and share the work; the result is on the main process.

    Args:
        model: a transformers model, or peft's around one, on the device where it shall run; not a DDP wrapper.
        tokenizer: its tokenizer.
        tasks: what to measure; those made from datasets have been written to `task_folder`.
        task_folder: where they lie.
        evaluate: batch size, limits; not dtype, which is the model's.
        ranks: accelerate's PartialState.
        part: which of each task's documents to measure.

    Raises:
        DataError: a task gave no number.
        ModelError: the tokenizer lacks the chat template that `evaluate` asks for.
    """
    from hf_contmerge.scoring._lm import SharedLM

    if evaluate.chat_template:
        require_template(tokenizer)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about what we do on purpose
    alone = evaluate.parallel == "tensor"  # all ranks are one model
    sharing = {} if alone else {"rank": ranks.process_index, "size": ranks.num_processes}
    with _as_it_was(model):
        lm = SharedLM(
            model, copy.deepcopy(tokenizer), batch_size=evaluate.batch_size, max_length=evaluate.max_length, **sharing
        )
        scores = _measure(lm, tasks, task_folder, evaluate, part)
    return scores if ranks.is_main_process else {}


def _measure(
    lm: Any, tasks: Sequence[Task], task_folder: Path, evaluate: Evaluate, part: DocumentPart
) -> dict[str, TaskScore]:
    """Return the scores of tasks.

    All are measured in one call, whose batches are of like lengths across tasks. Its parts must have names of their
    own, so the same one with other few-shot examples waits for a second call.
    """
    manager = task_manager([t.name for t in tasks], evaluate.task_folders(task_folder))
    rounds: list[list[LoadedTask]] = []
    for task in tasks:
        loaded = load_task(manager, task)
        place = next((together for together in rounds if all(_agree(loaded, other) for other in together)), None)
        if place is None:
            rounds.append(place := [])
        place.append(loaded)
    scores = {}
    for together in rounds:
        results = _evaluate(lm, together, evaluate, part)
        scores |= {loaded.name: task_score(results, loaded.name, loaded.leaves) for loaded in together}
    return {task.name: scores[task.name] for task in tasks}


def _agree(one: LoadedTask, other: LoadedTask) -> bool:
    """Say whether what two tasks have in common is asked in the same way."""
    common = one.leaves.keys() & other.leaves.keys()
    return all(one.leaves[n].get_config("num_fewshot") == other.leaves[n].get_config("num_fewshot") for n in common)


def _evaluate(lm: Any, tasks: Sequence[LoadedTask], evaluate: Evaluate, part: DocumentPart) -> Any:
    """Return lm-eval's results of tasks in one call; on every rank, and the same."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    leaves = {name: leaf for task in tasks for name, leaf in task.leaves.items()}
    groups = {name: group for task in tasks for name, group in task.groups.items()}
    for leaf in leaves.values():
        leaf.set_fewshot_seed(seed=_SEEDS[1])
    samples = None if part == "all" else {name: part_indices(leaf, part, evaluate) for name, leaf in leaves.items()}
    _seed()
    return lm_evaluate(
        lm, {"tasks": leaves, "groups": groups, "group_map": {}}, limit=None if samples else evaluate.limit,
        samples=samples, bootstrap_iters=0, log_samples=True, apply_chat_template=evaluate.chat_template,
        fewshot_as_multiturn=evaluate.chat_template,
    )  # fmt: skip


def _seed() -> None:
    """Give random generators the stock command's seeds, for tasks that draw."""
    random.seed(_SEEDS[0])
    numpy.random.seed(_SEEDS[1])
    torch.manual_seed(_SEEDS[1])


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Let a model be scored; give it its mode, and random generators their states back."""
    training, states = model.training, (random.getstate(), numpy.random.get_state())
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(training)
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _load(folder: Path, whole: Path, evaluate: Evaluate, ranks: PartialState, **init: Any) -> Any:
    """Return a model where it will run."""
    if evaluate.parallel == "layers":
        return load_model(folder, whole, device_map="auto", **init)
    if evaluate.parallel == "tensor":
        return load_model(folder, whole, distributed_config=DistributedConfig(tp_plan="auto"), **init)
    return load_model(folder, whole, **init).to(ranks.device)


def _vllm(folder: Path, dtype: torch.dtype, evaluate: Evaluate) -> Any:
    """Return lm-eval's view of a model that vLLM loads."""
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    make: Any = VLLM  # its registration hides its type
    gpus = max(1, torch.cuda.device_count())
    # vLLM forms batches itself. To lm-eval "auto" means a bar as well, by whose time vLLM divides: 0, if bars are off.
    batch_size = _ALL if evaluate.batch_size == "auto" else evaluate.batch_size
    return make(
        pretrained=str(folder), dtype=str(dtype).removeprefix("torch."), batch_size=batch_size,
        max_model_len=evaluate.max_length, tensor_parallel_size=gpus if evaluate.parallel == "tensor" else 1,
        gpu_memory_utilization=0.2 if current_platform.is_cpu() else 0.9,  # others live in main memory too
    )  # fmt: skip
