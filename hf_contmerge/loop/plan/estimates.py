"""Estimates of memory, disk and time per phase.

    train   weights, gradients, Adam, activations, head: a dry step (_dry_step.py); written files
    merge   tensors in flight, as counted by the engine (merging/costs.py), mapped pages, the process itself
    score   weights, activations and logits of a batch: a dry batch

Seconds are operations over measured speeds (_machine.py), precise enough to separate minutes from hours.
"""

from __future__ import annotations

import functools
import heapq
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_contmerge.loop._entries import merged_dtype
from hf_contmerge.loop.plan._dry_step import StepCost, Work, scoring_batch, training_step
from hf_contmerge.loop.plan._machine import Machine, Speeds
from hf_contmerge.loop.plan.disk import DiskUse, Trained, disk_use, model_bytes, state_bytes
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging.costs import stream_job
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace
from hf_contmerge.run.recipe.schema import Recipe, Train
from hf_contmerge.run.steps import Step
from hf_contmerge.runtime.device import bf16_pays
from hf_contmerge.scoring.tasks import sample_requests
from hf_contmerge.train_strategies import StageSize
from hf_contmerge.train_strategies.lora import Lora
from hf_contmerge.training.data import StageData
from hf_contmerge.training.settings import make_strategies, sft_settings, trl_classes

_SAMPLED = 256  # examples with counted tokens
_ADAM_MOVES = 40  # bytes per trained parameter and step: p, g, m, v read, p, m, v written; the norm and clipping of g
_WITH_REFERENCE = 4 / 3  # preference pairs: the reference's forward pass on top of the model's forward and backward
_HELD_BY_MALLOC = 1.2
"""Resident memory over peak live bytes of a step on a CPU: the allocator keeps freed blocks of a few megabytes.
Measured: 1.24 in two runs of a model of 19M parameters, full and lora."""


@dataclass(frozen=True)
class Cost:
    """Cost of a phase, in bytes and seconds."""

    step: Step
    memory: int
    """Main memory of all processes of this machine."""
    vram: int
    """Memory of each GPU."""
    disk: DiskUse
    seconds: float


@dataclass(frozen=True)
class Subject:
    """A checked run, ready for estimates."""

    run: Run
    base: Path
    """Folder with config, tokenizer and headers; weights may be missing."""
    rules: Mapping[str, MergeRule]
    kinds: Mapping[str, str]
    given: Mapping[str, Path]
    data: Mapping[str, StageData]
    tasks: Path
    """Folder of the tasks made from datasets."""

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @functools.cached_property
    def weights(self) -> Weights:
        return Weights(self.base)


@dataclass(frozen=True)
class TrainingShape:
    """Shape of a stage's training data."""

    rows: int
    """Rows of a micro-batch."""
    length: int
    """Tokens of the longest example."""
    examples: int
    """Examples per epoch, after packing."""


class Estimates:
    """The costs of a checked run on a machine.

    Args:
        subject: the run.
        machine: the machine's resources.
        speeds: the machine's speeds.
        start: bytes of a process with loaded libraries.
        processes: processes on this machine, each with a full model (DDP).
    """

    def __init__(self, subject: Subject, machine: Machine, speeds: Speeds, *, start: int, processes: int) -> None:
        self._of, self._machine, self._speeds = subject, machine, speeds
        self._start, self._processes = start, processes
        self._tokenizer = AutoTokenizer.from_pretrained(subject.base)
        self.train = functools.cache(self._train)
        self._requests = functools.cache(self._requests_of)
        self._batch = functools.cache(self._scoring_batch)

    def cost(self, step: Step) -> Cost:
        """Return a phase's cost.

        Raises:
            ModelError: transformers does not know the architecture.
        """
        stage = self._of.run.stage(step.t) if step.t else None
        if step.phase == "train" and stage and stage.dataset:
            memory, vram, seconds = self._training(stage.name, self._of.recipe.train_of(stage))
        elif step.phase == "train":
            memory, vram, seconds = self._start, 0, self._giving(step)
        elif step.phase == "merge":
            memory, vram, seconds = self._merging(step)
        else:
            memory, vram, seconds = self._scoring(step)
        return Cost(step, memory, vram, self.disk(step), seconds)

    def disk(self, step: Step) -> DiskUse:
        """Return a phase's disk use."""
        first = next(iter(self._of.data), None)
        trained = self._dry(first, self._of.recipe.train).trained if first else 0
        keeps = bool(first) and make_strategies(self._of.recipe.train).carrier.keeps_adapter()
        use = disk_use(step, self._of.run, self._of.weights, self._of.rules, Trained(trained, keeps))
        return replace(use, kept=use.kept + self._remembered(step))

    def _remembered(self, step: Step) -> int:
        """Return the bytes of a stage's strategy memory."""
        stage = self._of.run.stage(step.t) if step.t else None
        alone = isinstance(step.place, ExpertPlace) and step.place.kind == "base" and step.t > 1
        if step.phase != "train" or not stage or not stage.dataset or alone:
            return 0
        train, data = self._of.recipe.train_of(stage), self._of.data[stage.name].train
        dry = self._dry(stage.name, train)
        rows = [dict(row) for row in data.select(range(min(len(data), _SAMPLED)))]  # pyright: ignore
        mean = sum(len(json.dumps(row).encode()) for row in rows) / len(rows)
        size = StageSize(step.t, dry.trained, dry.lora_a, len(data), mean)
        return make_strategies(train).memory_bytes(size)

    def training_memory(self, stage: str, train: Train) -> tuple[int, int]:
        """Return the bytes of main and GPU memory."""
        return self._training(stage, train)[:2]

    # Training

    def _dry(self, stage: str, train: Train) -> StepCost:
        return self.train(stage, train.model_dump_json())[0]

    def _train(self, stage: str, train_json: str) -> tuple[StepCost, Any, TrainingShape]:
        train, data = Train.model_validate_json(train_json), self._of.data[stage]
        fields = sft_settings(train, data, self._tokenizer, numel=self._of.weights.numel())
        init = {"dtype": torch.float32, **(fields.pop("model_init_kwargs", None) or {})}
        settings: Any = trl_classes(data.form)[1](**fields, output_dir="unused", seed=self._of.recipe.seed)
        shape = self._shape(data, settings)
        strategies = make_strategies(train)
        cost = training_step(self._of.base, strategies, settings, batch=shape.rows, length=shape.length, init=init)
        if data.form == "preference" and not isinstance(strategies.carrier, Lora):  # a second model is the reference
            more = model_bytes(self._of.weights, torch.float32)
            cost = replace(cost, held=cost.held + more, peak=cost.peak + more)
        return cost, settings, shape

    def _shape(self, data: StageData, settings: Any) -> TrainingShape:
        longest = settings.max_length or 2**62
        rows = [dict(row) for row in data.train.select(range(min(len(data.train), _SAMPLED)))]  # pyright: ignore
        lengths = [max(self._tokens(text) for text in _texts(row)) for row in rows]
        batch = settings.per_device_train_batch_size * (2 if data.form == "preference" else 1)
        if getattr(settings, "packing", False):
            tokens = sum(lengths) / len(lengths) * len(data.train)
            return TrainingShape(batch, settings.max_length, max(1, math.ceil(tokens / settings.max_length)))
        return TrainingShape(batch, max(2, *(min(n, longest) for n in lengths)), len(data.train))

    def _tokens(self, row: Mapping[str, Any]) -> int:
        """Count the tokens of an example of any form."""
        values = list(row.values())
        if any(isinstance(v, list) for v in values):
            turns = [turn for v in values for turn in (v if isinstance(v, list) else [])]
            return len(
                self._tokenizer(self._tokenizer.apply_chat_template(turns, tokenize=False), verbose=False)["input_ids"]
            )
        return 1 + len(self._tokenizer("".join(str(v) for v in values), verbose=False)["input_ids"])

    def _training(self, stage: str, train: Train) -> tuple[int, int, float]:
        dry, settings, shape = self.train(stage, train.model_dump_json())
        weights = 4 * self._of.weights.numel()
        at_once = settings.per_device_train_batch_size * self._processes * settings.gradient_accumulation_steps
        steps = settings.max_steps
        if steps <= 0:
            steps = math.ceil(math.ceil(shape.examples / at_once) * settings.num_train_epochs)
        each = settings.gradient_accumulation_steps * self._seconds(dry.work)
        if self._of.data[stage].form == "preference":
            each *= _WITH_REFERENCE
        each += _ADAM_MOVES * dry.trained / self._speeds.moved
        seconds = steps * each + self._loading(weights) + self._saving(weights)
        buckets = 4 * dry.trained if self._processes > 1 else 0  # DDP's copy of the gradients
        peak = dry.peak + buckets
        if self._machine.gpus:
            return self._processes * (self._start + weights), peak, seconds
        return self._processes * (self._start + round(peak * _HELD_BY_MALLOC)), 0, seconds

    # Merging

    def _merging(self, step: Step) -> tuple[int, int, float]:
        """Return memory and seconds of a merge.

        The engine takes tensors in order of cost, one per thread. Each holds its mapped parts of the base, the expert
        and the old state, and the rule's working memory.
        """
        assert isinstance(step.place, MergePlace)
        weights, entry = self._of.weights, step.place.entry
        rule, later = self._of.rules[entry.name], step.t > 1
        expert = self._expert_dtype(step.t)
        need, cost = [], 0.0
        for name in weights.names:
            job = stream_job(rule, weights, name, 3, 0)
            numel = math.prod(weights.shape(name))
            mapped = weights.nbytes(name) + numel * expert.itemsize + (4 * rule.slots * numel if later else 0)
            need.append((job.cost, job.memory + mapped))
            cost += job.cost
        threads = max(1, self._machine.cores // self._processes)
        ordered = [memory for _, memory in sorted(need, reverse=True)]
        flight = max(sum(ordered[i : i + threads]) for i in range(len(ordered)))
        merged, state = model_bytes(weights, merged_dtype(entry)), state_bytes(weights, rule)
        # The digest of the result maps one tensor per core.
        digest = sum(heapq.nlargest(os.cpu_count() or 1, (weights.nbytes(n) for n in weights.names)))
        seconds = self._folding(rule, later=later) / threads + self._saving(merged) + self._written(state)
        return self._processes * (self._start + max(flight, digest)), 0, seconds

    def _folding(self, rule: MergeRule, *, later: bool) -> float:
        """Return the seconds of one thread.

        These are moved bytes and decompositions. The first expert needs none, as the state is zero.
        """
        total = 0.0
        for name in self._of.weights.names:
            job = stream_job(rule, self._of.weights, name, 1, 0)
            shape = self._of.weights.shape(name)
            total += 16 * math.prod(shape) / self._speeds.moved * self._machine.cores
            if later and rule.unit == "matrix" and len(shape) > 1 and job.memory > 8 * 3 * math.prod(shape):
                small, large = sorted(shape[-2:])
                total += (
                    math.prod(shape)
                    // (small * large)
                    * (6 * small**2 * large + 30 * small**3)
                    / (self._speeds.decomposed)
                )
        return total

    def _expert_dtype(self, t: int) -> torch.dtype:
        stage = self._of.run.stage(t)
        if stage.expert and not stage.minus:
            given = Weights(self._of.given[stage.expert])
            return given.dtype(given.floating()[0])
        return torch.float32

    def _giving(self, step: Step) -> float:
        """Return the seconds of a given expert."""
        size = 4 * self._of.weights.numel()
        digest = size / (self._speeds.hashed * self._machine.cores)
        return digest + (self._written(size) if self._of.run.stage(step.t).minus else 0.0)

    # Scoring

    def _scoring(self, step: Step) -> tuple[int, int, float]:
        evaluate = self._of.recipe.evaluate
        batch = 8 if evaluate.batch_size == "auto" else evaluate.batch_size
        memory, seconds = 0, 0.0
        for task in step.tasks:
            count, mean, longest = self._requests(task.name, task.num_fewshot)
            rows = min(batch, count)
            memory = max(memory, self._batch(rows, longest).peak)
            seconds += math.ceil(count / rows / self._processes) * self._seconds(self._batch(rows, mean).work)
        weights = model_bytes(self._of.weights, self._scoring_dtype())
        seconds += self._loading(weights) + weights / self._speeds.hashed
        if self._machine.gpus:
            return self._processes * (self._start + weights), max(memory, weights), seconds
        # The pages of the converted weight files stay mapped.
        memory = weights + round((max(memory, weights) - weights) * _HELD_BY_MALLOC) + self._stored(step)
        return self._processes * (self._start + memory), 0, seconds

    def _stored(self, step: Step) -> int:
        """Return the bytes of the scored model's files."""
        if isinstance(step.place, ExpertPlace):
            return model_bytes(self._of.weights, self._expert_dtype(step.t))
        dtype = merged_dtype(step.place.entry) if isinstance(step.place, MergePlace) else None
        return model_bytes(self._of.weights, dtype)

    def _scoring_dtype(self) -> torch.dtype:
        chosen = self._of.recipe.evaluate.dtype
        if chosen != "auto":
            return getattr(torch, chosen)
        return torch.bfloat16 if bf16_pays(self._of.weights.numel()) else torch.float32

    def _scoring_batch(self, rows: int, length: int) -> StepCost:
        return scoring_batch(self._of.base, batch=rows, length=length, dtype=self._scoring_dtype())

    def _requests_of(self, task: str, few_shot: int | None) -> tuple[int, int, int]:
        """Return a task's requests, mean and largest length."""
        evaluate = self._of.recipe.evaluate
        asked = sample_requests(task, evaluate.task_folders(self._of.tasks), few_shot=few_shot, limit=evaluate.limit)
        lengths = [len(self._tokenizer(text, verbose=False)["input_ids"]) for text in asked.texts] or [1]
        mean, longest = sum(lengths) / len(lengths), max(lengths)
        if evaluate.max_length:
            mean, longest = min(mean, evaluate.max_length), min(longest, evaluate.max_length)
        return max(asked.count, 1), max(2, round(mean)), max(2, longest)

    # Seconds

    def _seconds(self, work: Work) -> float:
        others = sum(n / self._speeds.flops.get(d, self._speeds.flops[torch.float32]) for d, n in work.flops.items())
        return (
            self._speeds.products(work.products)
            + others
            + work.moved / self._speeds.moved
            + work.calls * self._speeds.call
        )

    def _loading(self, nbytes: int) -> float:
        return 2 * nbytes / self._speeds.moved * self._machine.cores

    def _saving(self, nbytes: int) -> float:
        return self._written(nbytes) + nbytes / (self._speeds.hashed * self._machine.cores)

    def _written(self, nbytes: int) -> float:
        return nbytes / self._speeds.written if self._speeds.written else 0.0


def _texts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return an example's rows: one, or two of a pair."""
    if "rejected" not in row:
        return [row]
    prompt = {"prompt": row.get("prompt", "")}
    return [{**prompt, "answer": row["chosen"]}, {**prompt, "answer": row["rejected"]}]


def costs(estimates: Estimates, steps: list[Step]) -> Iterator[Cost]:
    """Yield the costs of the unfinished phases."""
    return (estimates.cost(step) for step in steps if not step.done)
