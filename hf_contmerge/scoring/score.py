"""Scores model folders or loaded models with lm-eval, on all ranks."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import PartialState
from transformers.distributed.configuration_utils import DistributedConfig

from hf_contmerge.models.layout import check_loads, check_tokenizer
from hf_contmerge.models.loading import load_model, load_tokenizer
from hf_contmerge.models.tokenizer import tokenizer_folder
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.runtime.device import cpu_only, free_memory
from hf_contmerge.runtime.ranks import OneRank, Ranks
from hf_contmerge.scoring._formats import Listing
from hf_contmerge.scoring._results import task_score
from hf_contmerge.scoring._strangers import foreign_tasks
from hf_contmerge.scoring._task_digest import keep_own_listing
from hf_contmerge.scoring.cache import ScoreCache
from hf_contmerge.scoring.keys import DocumentPart, ModelKey, ScoreRequest, Shown
from hf_contmerge.scoring.known import KnownScores, keep_scores, known_scores
from hf_contmerge.scoring.locate import ModelFolders, fetched_folders
from hf_contmerge.scoring.setup import check_evaluate, require_template
from hf_contmerge.scoring.tasks import LoadedTask, check_tasks, load_task, own_tasks, part_indices, task_manager

_SEEDS = 0, 1234
"""Seeds of the stock command: Python; numpy, torch and few-shot examples."""


def score_model(
    folder: Path,
    tasks: Sequence[Task],
    *,
    task_folder: Path,
    evaluate: Evaluate,
    ranks: Ranks,
    base: Path | None = None,
    cache: ScoreCache | None = None,
    trust_remote_code: bool = False,
    part: DocumentPart = "all",
    shown: Shown | None = None,
) -> tuple[ModelKey, dict[str, TaskScore]]:
    """Score a model on tasks; the main process gets the result.

    All ranks call this together.

    Args:
        folder: the model, or an adapter of `base`.
        tasks: tasks to measure; tasks made from datasets already lie in `task_folder`.
        task_folder: folder of task files.
        evaluate: batch size, dtype, limits.
        ranks: the job's processes, over all nodes.
        base: the base model of an adapter; None for a whole model.
        cache: earlier scores; default: this machine's cache, unless `evaluate` disables it.
        trust_remote_code: allow the model's own code to run.
        part: document subset to measure.
        shown: examples in front of the questions.

    Returns:
        The scored model's digest (weights, dtype, tokenizer) and dtype, and the score of each task by name.

    Raises:
        DataError: a task gave no number.
        ModelError: the folder holds no model, or the tokenizer lacks the chat template requested by `evaluate`.
        ResourceError: this machine does not support the settings in `evaluate`.
    """
    request = ScoreRequest(tuple(tasks), task_folder, evaluate, part, trust_remote_code, shown)
    cache = cache or ScoreCache.open(use=evaluate.cache)
    known, fresh = measure_missing(ModelFolders(folder, base), request, ranks=ranks, cache=cache)
    scores = {**known.scores, **fresh} if ranks.is_main else {}
    return known.model, {task.name: scores[task.name] for task in tasks if task.name in scores}


def measure_named(
    name: str, base: str | None, request: ScoreRequest, *, ranks: Ranks, cache: ScoreCache
) -> tuple[KnownScores, dict[str, TaskScore]]:
    """Locate, check and measure a named model.

    Returns as `measure_missing`; raises as `score_model`, `fetched_folders` and `check_tasks`.
    """

    def locate() -> ModelFolders:
        model = fetched_folders(name, base, cache.store)
        check_tokenizer(model.whole)
        check_loads(model.whole, trusted=request.trust_remote_code)
        folders = request.evaluate.task_folders(request.task_folder)
        check_tasks(
            request.tasks, folders, split=request.part != "all", limit=request.evaluate.limit,
            trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
        return model

    return measure_missing(ranks.local_main_first(locate), request, ranks=ranks, cache=cache)


def measure_missing(
    model: ModelFolders, request: ScoreRequest, *, ranks: Ranks, cache: ScoreCache
) -> tuple[KnownScores, dict[str, TaskScore]]:
    """Measure and cache missing scores. Raises as `score_model`.

    Returns:
        The cache lookup, on all ranks; the new scores, on the main process only.
    """
    check_evaluate(request.evaluate, processes=ranks.size, adapter=model.is_adapter)
    known = ranks.first(known_scores, model, request, cache)
    assert known  # None only with read=False
    missing = known.missing(request.tasks)
    if not missing:
        return known, {}
    scores = _measure_folder(model, replace(request, tasks=missing), known.model.dtype, ranks)
    free_memory()
    if not ranks.is_main:
        return known, {}
    return known, keep_scores(request, known, scores, cache, own_listing(known, cache))


def own_listing(known: KnownScores, cache: ScoreCache) -> Listing | None:
    """Remember lm-eval's own tasks, if a task lacks a key."""
    return None if all(known.keys.values()) else keep_own_listing(cache.store, own_tasks())


def _measure_folder(model: ModelFolders, request: ScoreRequest, dtype: str, ranks: Ranks) -> dict[str, TaskScore]:
    """Load and score a model; the main process gets the result."""
    evaluate, remote = request.evaluate, request.trust_remote_code
    if evaluate.backend == "vllm":
        from hf_contmerge.scoring._vllm import load_vllm

        return _measure(load_vllm(model.folder, dtype, evaluate), request)
    return score_loaded(*load_to_score(model, evaluate, dtype, trust_remote_code=remote), request, ranks=ranks)


def load_to_score(model: ModelFolders, evaluate: Evaluate, dtype: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load a model onto its devices; return it with its tokenizer."""
    loaded = _load(model, evaluate, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    folder = tokenizer_folder(model.whole, model.folder)
    return loaded, load_tokenizer(folder, trust_remote_code=trust_remote_code)


def score_loaded(model: Any, tokenizer: Any, request: ScoreRequest, *, ranks: Ranks) -> dict[str, TaskScore]:
    """Score a loaded model; restore its mode and random states.

    All ranks hold the model, call this together and share the work. The main process gets the result.

    Args:
        model: a transformers model, or peft's around one, on its final device; not a DDP wrapper.
        tokenizer: its tokenizer.
        request: tasks and settings; tasks made from datasets already lie in its folder. The dtype is the model's.
        ranks: the job's processes.

    Raises:
        DataError: a task gave no number.
        ModelError: the tokenizer lacks the chat template requested by `evaluate`.
    """
    from hf_contmerge.scoring._lm import SharedLM

    evaluate = request.evaluate
    if evaluate.chat_template:
        require_template(tokenizer)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about intended settings
    sharing = OneRank() if evaluate.parallel == "tensor" else ranks  # tensor: all ranks form one model
    with _undisturbed(model):
        lm = SharedLM(
            model, copy.deepcopy(tokenizer), sharing, batch_size=evaluate.batch_size, max_length=evaluate.max_length
        )
        scores = _measure(lm, request)
    return scores if ranks.is_main else {}


def _measure(lm: Any, request: ScoreRequest) -> dict[str, TaskScore]:
    """Score a request's tasks."""
    lm.shown = request.shown
    with foreign_tasks(trust_remote_code=request.trust_remote_code):
        return _measure_together(lm, request)


def _measure_together(lm: Any, request: ScoreRequest) -> dict[str, TaskScore]:
    """Score tasks in as few lm-eval calls as possible.

    One call batches similar lengths across tasks. Task names must be unique within a call, so a task repeated
    with other few-shot examples waits for a second call.
    """
    folders = request.evaluate.task_folders(request.task_folder)
    manager = task_manager([t.name for t in request.tasks], folders)
    rounds: list[list[LoadedTask]] = []
    for task in request.tasks:
        loaded = load_task(manager, task)
        apart = request.shown is not None
        place = next((x for x in rounds if all(_agree(loaded, other, apart=apart) for other in x)), None)
        if place is None:
            rounds.append(place := [])
        place.append(loaded)
    scores = {}
    for together in rounds:
        if request.shown:
            request.shown.begin({leaf: loaded.name for loaded in together for leaf in loaded.leaves})
        results = _evaluate(lm, together, request.evaluate, request.part)
        scores |= {loaded.name: task_score(results, loaded.name, loaded.leaves) for loaded in together}
    return {task.name: _with_shown(scores[task.name], request, task) for task in request.tasks}


def _with_shown(score: TaskScore, request: ScoreRequest, task: Task) -> TaskScore:
    """Add the counts of examples to a score's details."""
    if not request.shown:
        return score
    return replace(score, details={**score.details, "shown": request.shown.facts(task.name)})


def _agree(one: LoadedTask, other: LoadedTask, *, apart: bool) -> bool:
    """Check for equal few-shot settings in the tasks common to both.

    `apart`: no task may be common.
    """
    common = one.leaves.keys() & other.leaves.keys()
    if apart and common:
        return False
    return all(one.leaves[n].get_config("num_fewshot") == other.leaves[n].get_config("num_fewshot") for n in common)


def _evaluate(lm: Any, tasks: Sequence[LoadedTask], evaluate: Evaluate, part: DocumentPart) -> Any:
    """Run lm-eval on tasks in one call, identically on all ranks."""
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
    """Seed random generators as the stock command does."""
    random.seed(_SEEDS[0])
    numpy.random.seed(_SEEDS[1])
    torch.manual_seed(_SEEDS[1])


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Enter eval mode; restore mode and random states on exit."""
    training, states = model.training, (random.getstate(), numpy.random.get_state())
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(training)
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _load(model: ModelFolders, evaluate: Evaluate, **init: Any) -> Any:
    """Load a model onto its devices."""
    if evaluate.parallel == "layers":
        return load_model(model.folder, model.whole, device_map="auto", **init)
    if evaluate.parallel == "tensor":
        return load_model(model.folder, model.whole, distributed_config=DistributedConfig(tp_plan="auto"), **init)
    return load_model(model.folder, model.whole, **init).to(PartialState(cpu=cpu_only()).device)
