"""Cost of a stage's expert, trained or given."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from hf_contmerge.loop.plan._dry_step import StepCost, scoring_batch, training_step
from hf_contmerge.loop.plan._planned import Cost, Host, PlannedRun, resident
from hf_contmerge.loop.plan.disk import Trained, model_bytes
from hf_contmerge.run.places import JOINT, ExpertPlace
from hf_contmerge.run.recipe.schema import Stage, Train
from hf_contmerge.run.steps import Step
from hf_contmerge.runtime.device import bf16_pays
from hf_contmerge.train_strategies import StageSize
from hf_contmerge.train_strategies.lora import Lora
from hf_contmerge.training.data import SAMPLED, Form, StageData
from hf_contmerge.training.joint import joint_train
from hf_contmerge.training.settings import config_of, make_strategies, sft_settings
from hf_contmerge.training.synthesis import PART, talks
from hf_contmerge.training.tokenizer import count_tokens

_BYTES_PER_TOKEN = 5  # of written documents, with JSON's quotes and escapes
_SAMPLED = 256  # examples with counted tokens
_ADAM_MOVES = 40  # bytes per trained parameter and step: p, g, m, v read, p, m, v written; the norm and clipping of g
_PASSES = {"preference": 4 / 3, "unpaired": 2.0, "prompts": 4 / 3, "demonstrations": 4 / 3}
"""Form -> a step's passes over those of plain training: the reference's forward pass, and two more for KTO's KL."""
_LOGITS = 16
"""Bytes for each answer's token and word of the vocabulary, where a teacher's and a student's logits are compared."""


class _Shape(NamedTuple):
    """Shape of a stage's training data."""

    rows: int
    """Rows of a micro-batch."""
    length: int
    """Tokens of the longest example."""
    usual: float
    """Mean tokens of a row, filled up to its batch's longest."""
    examples: int
    """Examples per epoch, after packing."""


class _DryTraining(NamedTuple):
    """A stage's dry step, with its settings."""

    step: StepCost
    settings: Any
    shape: _Shape


def training_cost(planned: PlannedRun, host: Host, stage: str, train: Train, *, past: bool = False) -> Cost:
    """Return the cost of training a stage with these settings.

    `past`: whether strategies remember an earlier stage.
    """
    dry, settings, shape = _dry_training(planned, stage, train.model_dump_json())
    weights = 4 * planned.weights.numel()
    at_once = settings.per_device_train_batch_size * host.processes * settings.gradient_accumulation_steps
    steps = settings.max_steps
    if steps <= 0:
        examples = shape.examples / (1 - make_strategies(train).added_share(past=past))
        steps = math.ceil(math.ceil(examples / at_once) * settings.num_train_epochs)
    each = settings.gradient_accumulation_steps * host.computing(dry.work) * shape.usual / shape.length
    form = planned.data[stage].form
    each *= _PASSES[form] if _has_reference(form, settings) else 1.0
    if form in SAMPLED:
        each += _sampling_seconds(planned, host, settings)
    each += _ADAM_MOVES * dry.trained / host.speeds.moved
    seconds = steps * each + host.loading(weights) + host.saving(weights)
    seconds += _synthesis_seconds(planned, host, train, stage)
    buckets = 4 * dry.trained if host.processes > 1 else 0  # DDP's copy of the gradients
    peak = dry.peak + buckets
    if host.machine.gpus:
        return Cost(host.memory(weights), peak, seconds)
    return Cost(host.memory(resident(peak)), 0, seconds)


def _synthesis_seconds(planned: PlannedRun, host: Host, train: Train, stage: str) -> float:
    """Return the seconds in which a stage's start model writes its replay."""
    wanted = make_strategies(train).synthesis()
    if not wanted:
        return 0.0
    parts = math.ceil(math.ceil(wanted.count / PART) / host.processes)
    turns = 2 if talks(planned.data[stage]) else 1
    loading = host.loading(4 * planned.weights.numel())
    return loading + parts * turns * writing_seconds(planned, host, rows=PART, tokens=wanted.tokens)


def writing_seconds(planned: PlannedRun, host: Host, *, rows: int, tokens: int) -> float:
    """Return the seconds of sampling texts, token by token."""
    return tokens * host.computing(_dry_token(planned, rows).work)


def _dry_token(planned: PlannedRun, rows: int) -> StepCost:
    dtype = torch.bfloat16 if bf16_pays(planned.weights.numel()) else torch.float32
    init = {"dtype": dtype, "trust_remote_code": planned.recipe.trust_remote_code}
    return scoring_batch(planned.base, batch=rows, length=1, init=init)


def _has_reference(form: Form, settings: Any) -> bool:
    """Say if a step has a forward pass of the stage's start."""
    return form in _PASSES and (form != "prompts" or settings.beta != 0)


def _sampling_seconds(planned: PlannedRun, host: Host, settings: Any) -> float:
    """Return the seconds per step of sampling longest answers."""
    rows = settings.per_device_train_batch_size * settings.steps_per_generation
    often = settings.gradient_accumulation_steps / (settings.steps_per_generation * settings.num_iterations)
    return often * writing_seconds(planned, host, rows=rows, tokens=settings.max_completion_length)


def _sampling_bytes(planned: PlannedRun, shape: _Shape, settings: Any) -> int:
    """Return the bytes of sampled answers' keys and values."""
    config = AutoConfig.from_pretrained(planned.base, trust_remote_code=planned.recipe.trust_remote_code)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    rows = shape.rows * settings.steps_per_generation
    return 2 * 4 * text.num_hidden_layers * width * rows * shape.length


def joint_cost(planned: PlannedRun, host: Host) -> Cost:
    """Return the cost of one expert on all stages."""
    stages, train = planned.recipe.stages, joint_train(planned.recipe)
    each = [training_cost(planned, host, s.name, train.model_copy(update=_length(planned, s))) for s in stages]
    return Cost(max(c.memory for c in each), max(c.vram for c in each), sum(c.seconds for c in each))


def _length(planned: PlannedRun, stage: Stage) -> dict[str, Any]:
    """Return the settings behind a stage's number of steps."""
    fields = planned.recipe.train_of(stage).sft_fields
    return {name: fields[name] for name in ("max_steps", "num_train_epochs") if name in fields}


def given_expert_cost(planned: PlannedRun, host: Host, step: Step) -> Cost:
    """Return the cost of a given expert.

    It is digested; a difference is also written.
    """
    size = 4 * planned.weights.numel()
    written = host.writing(size) if planned.run.stage(step.t).minus else 0.0
    return Cost(host.start, 0, host.hashing(size) + written)


def trained_part(planned: PlannedRun) -> Trained:
    """Return the trained part of the model, by the recipe's `train`."""
    train = planned.recipe.train
    if not planned.data:
        return Trained(0)
    step = _dry_training(planned, next(iter(planned.data)), train.model_dump_json()).step
    return Trained.by(make_strategies(train), step.trained)


def synthesised_bytes(planned: PlannedRun, step: Step) -> int:
    """Return about how many bytes of documents a stage's start model writes."""
    place, stage = step.place, planned.run.stage(step.t) if step.t else None
    if step.phase != "train" or not stage or not stage.dataset:
        return 0
    if isinstance(place, ExpertPlace) and place.kind == JOINT:
        return 0
    wanted = make_strategies(planned.recipe.train_of(stage)).synthesis()
    return wanted.count * wanted.tokens * _BYTES_PER_TOKEN if wanted else 0


def remembered_bytes(planned: PlannedRun, step: Step) -> int:
    """Return the bytes of a stage's strategy memory."""
    stage = planned.run.stage(step.t) if step.t else None
    alone = isinstance(step.place, ExpertPlace) and step.place.alone(step.t)
    if step.phase != "train" or not stage or not stage.dataset or alone:
        return 0
    train, data = planned.recipe.train_of(stage), planned.data[stage.name].train
    dry = _dry_training(planned, stage.name, train.model_dump_json()).step
    rows = sample_rows(data)
    mean = sum(len(json.dumps(row).encode()) for row in rows) / len(rows)
    return make_strategies(train).memory_bytes(StageSize(step.t, dry.trained, dry.lora_a, dry.inputs, len(data), mean))


@functools.cache
def _dry_training(planned: PlannedRun, stage: str, train_json: str) -> _DryTraining:
    train, data = Train.model_validate_json(train_json), planned.data[stage]
    fields = sft_settings(train, data, planned.tokenizer, numel=planned.weights.numel())
    init = {"dtype": torch.float32, **(fields.pop("model_init_kwargs", None) or {})}
    init["trust_remote_code"] = planned.recipe.trust_remote_code
    settings = config_of(data.form, {**fields, "output_dir": "unused", "seed": planned.recipe.seed}, "train")
    shape = _shape(planned, data, settings)
    strategies = make_strategies(train)
    step = training_step(planned.base, strategies, settings, batch=shape.rows, length=shape.length, init=init)
    if _has_reference(data.form, settings) and not isinstance(strategies.carrier, Lora):  # a second model
        more = model_bytes(planned.weights, torch.float32)
        step = replace(step, held=step.held + more, peak=step.peak + more)
    if data.form == "demonstrations":
        logits = _LOGITS * shape.rows * settings.max_completion_length * len(planned.tokenizer)
        step = replace(step, peak=step.peak + logits)
    if data.form in SAMPLED:
        step = replace(step, peak=max(step.peak, step.held + _sampling_bytes(planned, shape, settings)))
    return _DryTraining(step, settings, shape)


def _shape(planned: PlannedRun, data: StageData, settings: Any) -> _Shape:
    longest = getattr(settings, "max_length", None) or 2**62
    lengths = [max(count_tokens(planned.tokenizer, row)) for row in sample_rows(data.train)]
    batch = settings.per_device_train_batch_size * (2 if data.form == "preference" else 1)
    if data.form in SAMPLED:
        longest = max(lengths) + settings.max_completion_length
        return _Shape(batch, longest, longest, len(data.train) * settings.num_generations)
    if getattr(settings, "packing", False):
        full, tokens = settings.max_length, sum(lengths) / len(lengths) * len(data.train)
        return _Shape(batch, full, full, max(1, math.ceil(tokens / full)))
    cut = [min(n, longest) for n in lengths]
    filled = [max(cut[i : i + batch]) for i in range(0, len(cut), batch)]
    return _Shape(batch, max(2, *cut), sum(filled) / len(filled), len(data.train))


def sample_rows(examples: Any) -> list[dict[str, Any]]:
    """Return the first examples, whose tokens are counted."""
    return [dict(row) for row in examples.select(range(min(len(examples), _SAMPLED)))]
