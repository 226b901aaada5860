"""Cost of scoring a model, from dry batches."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from hf_contmerge.loop._entries import merged_dtype
from hf_contmerge.loop.plan._dry_step import StepCost, scoring_batch
from hf_contmerge.loop.plan._planned import Cost, Host, PlannedRun, resident
from hf_contmerge.loop.plan._training import sample_rows
from hf_contmerge.loop.plan.disk import model_bytes
from hf_contmerge.models.config import config, setting
from hf_contmerge.run.places import IN_CONTEXT, ORACLE, ROUTED, ExpertPlace, MergePlace
from hf_contmerge.run.steps import Step
from hf_contmerge.runtime.device import bf16_pays
from hf_contmerge.scoring.setup import AUTO_BATCH_SIZE
from hf_contmerge.scoring.tasks import sample_requests
from hf_contmerge.training.tokenizer import count_tokens


class _Requests(NamedTuple):
    """Requests of a task."""

    count: int
    """Rows that go through the model."""
    mean: int
    """Mean tokens."""
    longest: int
    """Most tokens."""


def scoring_cost(planned: PlannedRun, host: Host, step: Step) -> Cost:
    """Return the cost of measuring a place's tasks."""
    evaluate = planned.recipe.evaluate
    batch = AUTO_BATCH_SIZE if evaluate.batch_size == "auto" else evaluate.batch_size
    peak, seconds = 0, 0.0
    for task in () if step.place.folder.name in (ROUTED, ORACLE) else step.tasks:  # made of others' scores
        count, mean, longest = _requests(planned, task.name, task.num_fewshot)
        if step.place.folder.name == IN_CONTEXT:
            mean, longest = (_with_examples(planned, task.name, tokens) for tokens in (mean, longest))
        rows = min(batch, count)
        peak = max(peak, _dry_batch(planned, rows, longest).peak)
        work = _dry_batch(planned, rows, mean).work
        seconds += math.ceil(count / rows / host.processes) * host.computing(work)
    weights = model_bytes(planned.weights, _scoring_dtype(planned))
    seconds += host.loading(weights) + weights / host.speeds.hashed
    if host.machine.gpus:
        return Cost(host.memory(weights), max(peak, weights), seconds)
    # The pages of the converted weight files stay mapped.
    memory = weights + resident(max(peak, weights) - weights) + _stored_bytes(planned, step)
    return Cost(host.memory(memory), 0, seconds)


def _with_examples(planned: PlannedRun, task: str, tokens: int) -> int:
    """Return the tokens of a question behind its examples."""
    most = planned.recipe.evaluate.max_length or setting(config(planned.base), "max_position_embeddings")
    tokens += planned.recipe.evaluate.shots * _example_tokens(planned, task)
    return min(tokens, most) if isinstance(most, int) else tokens


@functools.cache
def _example_tokens(planned: PlannedRun, task: str) -> int:
    """Return the mean tokens of the training examples of a task's stage."""
    stage = next(stage for stage in planned.recipe.stages if task in stage.task_names())
    lengths = [max(count_tokens(planned.tokenizer, row)) for row in sample_rows(planned.data[stage.name].train)]
    return round(sum(lengths) / len(lengths))


def _stored_bytes(planned: PlannedRun, step: Step) -> int:
    """Return the bytes of the scored model's files."""
    if isinstance(step.place, ExpertPlace):
        return model_bytes(planned.weights, planned.expert_dtype(step.t))
    dtype = merged_dtype(step.place.entry) if isinstance(step.place, MergePlace) else None
    return model_bytes(planned.weights, dtype)


def _scoring_dtype(planned: PlannedRun) -> torch.dtype:
    chosen = planned.recipe.evaluate.dtype
    if chosen != "auto":
        return getattr(torch, chosen)
    return torch.bfloat16 if bf16_pays(planned.weights.numel()) else torch.float32


def _dry_batch(planned: PlannedRun, rows: int, length: int) -> StepCost:
    init = {"dtype": _scoring_dtype(planned), "trust_remote_code": planned.recipe.trust_remote_code}
    return scoring_batch(planned.base, batch=rows, length=length, init=init)


@functools.cache
def _requests(planned: PlannedRun, task: str, few_shot: int | None) -> _Requests:
    evaluate = planned.recipe.evaluate
    sample = sample_requests(
        task, evaluate.task_folders(planned.tasks), few_shot=few_shot, limit=evaluate.limit,
        trust_remote_code=planned.recipe.trust_remote_code,
    )  # fmt: skip
    tokens = [tuple(planned.tokenizer(text, verbose=False)["input_ids"]) for text in sample.texts] or [(0,)]
    # lm-eval gives answers of one token to the same question one pass through transformers.
    shared = len({ids[:-1] for ids in tokens}) / len(tokens) if evaluate.backend == "hf" else 1.0
    lengths = [len(ids) for ids in tokens]
    mean, longest = sum(lengths) / len(lengths), max(lengths)
    if evaluate.max_length:
        mean, longest = min(mean, evaluate.max_length), min(longest, evaluate.max_length)
    return _Requests(max(round(shared * sample.count), 1), max(2, round(mean)), max(2, longest))
