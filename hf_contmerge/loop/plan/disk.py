"""Disk use of each phase of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_contmerge.loop._entries import merged_dtype
from hf_contmerge.merge_rules import MergeRule, inputs_shape
from hf_contmerge.merging.costs import state_bytes, weight_of
from hf_contmerge.merging.write import merged_plan
from hf_contmerge.models.contents import companions
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace
from hf_contmerge.run.steps import Step
from hf_contmerge.train_strategies import Combined

_CHECKPOINTS = 2
_ADAM = 8  # bytes per trained parameter


@dataclass(frozen=True)
class Trained:
    """The trained part of a model."""

    count: int
    """Number of trained parameters."""
    as_adapter: bool = False
    """Whether the expert is stored as an adapter."""
    state: int = 0
    """Bytes of the strategies' own state in a checkpoint."""

    @classmethod
    def by(cls, strategies: Combined, count: int) -> Trained:
        """Return what strategies train of `count` parameters."""
        return cls(count, strategies.carrier.keeps_adapter(), strategies.bytes_in_checkpoints * count)


@dataclass(frozen=True)
class DiskUse:
    """Bytes written by a phase."""

    kept: int
    """Bytes left at the end of the phase."""
    at_work: int
    """Further bytes during the phase."""


class DiskNeed(NamedTuple):
    """Bytes of several phases in order."""

    kept: int
    """Bytes left at the end."""
    peak: int
    """Most bytes at any time."""


def disk_use(step: Step, run: Run, base: Weights, rules: Mapping[str, MergeRule], trained: Trained) -> DiskUse:
    """Return a phase's disk use, from tensor sizes.

    Args:
        step: the phase.
        run: its run.
        base: the base model; only headers are read.
        rules: rules by merge entry.
        trained: the trained part, stored in checkpoints with the optimizer state.
    """
    companions = _companions_bytes(base)
    if step.phase == "train" and isinstance(step.place, ExpertPlace):
        stage = run.stage(step.t)
        if stage.expert and not stage.minus:
            return DiskUse(0, 0)
        whole = stage.minus or not trained.as_adapter
        expert = model_bytes(base, torch.float32) + companions if whole else 4 * trained.count
        train = run.recipe.train_of(stage)
        expert += statistics_bytes(base, train.statistics.kinds) if stage.dataset and train.statistics else 0
        fields = train.sft_fields
        saved = stage.dataset and fields.get("save_strategy", "steps") != "no"
        moving = train.learn == "sdft" and fields.get("teacher_model_kind") == "ema"
        teacher = model_bytes(base, torch.float32) if moving else 0
        at_work = _checkpoint_bytes(trained, fields, teacher) if saved else 0
        return DiskUse(expert, at_work + _earlier_bytes(run, trained) if stage.dataset else 0)
    if step.phase == "merge" and isinstance(step.place, MergePlace):
        entry, rule = step.place.entry, rules[step.place.entry.name]
        state = running_bytes(base, rule)
        kept_before = state if step.t > 1 else 0  # pruned once this stage's state is recorded
        ladder = run.recipe.guard.ladder if run.recipe.guard else ()
        again = model_bytes(base, torch.float32) if any(rung.do == "replay" for rung in ladder) and step.t > 1 else 0
        again += _earlier_bytes(run, trained)
        if any(rung.do == "earlier" for rung in ladder):
            again += model_bytes(base, torch.float32)
        return DiskUse(model_bytes(base, merged_dtype(entry)) + companions + state - kept_before, kept_before + again)
    return DiskUse(0, 0)


def _earlier_bytes(run: Run, trained: Trained) -> int:
    """Return the bytes of the checkpoints kept for a guard."""
    return (4 * trained.count + trained.state) * run.recipe.guard.checkpoints if run.recipe.guard else 0


def disk_need(uses: Iterable[DiskUse]) -> DiskNeed:
    """Add up the disk use of phases in order."""
    kept = peak = 0
    for use in uses:
        kept += use.kept
        peak = max(peak, kept + use.at_work)
    return DiskNeed(kept, peak)


def model_bytes(base: Weights, dtype: torch.dtype | None) -> int:
    """Return a model's bytes in `dtype` (None: the base's)."""
    return sum(math.prod(shape) * kind.itemsize for _, shape, kind in merged_plan(base, dtype))


def running_bytes(base: Weights, rule: MergeRule) -> int:
    """Return a running state's bytes."""
    weights = [weight_of(base, name, 1) for name in base.floating()]
    owners = sum(math.prod(weight.shape) for weight in weights) if rule.selects else 0
    return sum(state_bytes(rule, weight) for weight in weights) + owners


def statistics_bytes(base: Weights, kinds: Iterable[str]) -> int:
    """Return the most bytes of an expert's statistics."""
    weights = [weight_of(base, name, 1) for name in base.floating()]
    # linear maps with the same inputs share one
    inputs = sum(4 * math.prod(inputs_shape(w.shape[1])) for w in weights if w.is_matrix and len(w.shape) == 2)
    return sum(inputs if kind == "inputs" else 4 * sum(math.prod(w.shape) for w in weights) for kind in {*kinds})


def _checkpoint_bytes(trained: Trained, fields: Mapping[str, Any], teacher: int) -> int:
    """Return the bytes of coexisting checkpoints; `teacher`: of one that moves."""
    copies = min(_CHECKPOINTS, int(fields.get("save_total_limit") or 1) + 1)
    each = (4 if fields.get("save_only_model") else 4 + _ADAM) * trained.count
    return copies * (each + trained.state + teacher)


def _companions_bytes(base: Weights) -> int:
    """Return the bytes of config, tokenizer, ..."""
    return sum(path.stat().st_size for path in companions(base.folder))
