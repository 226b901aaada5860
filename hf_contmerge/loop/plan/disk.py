"""What each phase of a run writes to the disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_contmerge.loop._entries import merged_dtype
from hf_contmerge.merge_rules import MergeRule, inputs_shape
from hf_contmerge.merging.costs import state_numel, weight_of
from hf_contmerge.models.config import COMPANIONS
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace
from hf_contmerge.run.steps import Step

_CHECKPOINTS = 2
_ADAM = 8  # bytes per trained parameter


@dataclass(frozen=True)
class Trained:
    """What of the model is trained: so many parameters, and whether the expert is kept as an adapter of these alone."""

    count: int
    as_adapter: bool = False


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a phase adds: what is kept once it is done, and how much more there is while it works."""

    kept: int
    at_work: int


def disk_use(step: Step, run: Run, base: Weights, rules: Mapping[str, MergeRule], trained: Trained) -> DiskUse:
    """Return what a phase writes, from the sizes of the tensors.

    Args:
        step: the phase.
        run: its run.
        base: the base model, of which headers are read.
        rules: of the merge entries, by name.
        trained: what checkpoints hold, with the optimizer's state.
    """
    companions = _companions_bytes(base)
    if step.phase == "train" and isinstance(step.place, ExpertPlace):
        stage = run.stage(step.t)
        if stage.expert and not stage.minus:
            return DiskUse(0, 0)
        whole = stage.minus or not trained.as_adapter
        expert = model_bytes(base, torch.float32) + companions if whole else 4 * trained.count
        train = run.recipe.train_of(stage)
        expert += statistics_bytes(base) if stage.dataset and train.statistics else 0
        fields = train.sft_fields
        saved = stage.dataset and fields.get("save_strategy", "steps") != "no"
        return DiskUse(expert, _checkpoint_bytes(trained.count, fields) if saved else 0)
    if step.phase == "merge" and isinstance(step.place, MergePlace):
        entry, rule = step.place.entry, rules[step.place.entry.name]
        state = state_bytes(base, rule)
        kept_before = state if step.t > 1 else 0  # pruned as soon as this stage's is recorded
        ladder = run.recipe.guard.ladder if run.recipe.guard else ()
        again = model_bytes(base, torch.float32) if any(rung.do == "replay" for rung in ladder) and step.t > 1 else 0
        return DiskUse(model_bytes(base, merged_dtype(entry)) + companions + state - kept_before, kept_before + again)
    return DiskUse(0, 0)


def peak_disk(uses: Iterable[DiskUse]) -> tuple[int, int]:
    """Return (what is left at the end, the most that is there at any time) of phases in their order, in bytes."""
    kept = most = 0
    for use in uses:
        kept += use.kept
        most = max(most, kept + use.at_work)
    return kept, most


def model_bytes(base: Weights, dtype: torch.dtype | None) -> int:
    """Return the bytes of a model's tensors with the floating ones in `dtype` (None: as the base stores them)."""
    floating = set(base.floating())
    return sum(
        math.prod(base.shape(n)) * (dtype.itemsize if dtype and n in floating else base.dtype(n).itemsize)
        for n in base.names
    )


def state_bytes(base: Weights, rule: MergeRule) -> int:
    """Return the bytes of a rule's running state: float32 for all parts, and a byte for the owner where it selects."""
    weights = [weight_of(base, name, 1) for name in base.floating()]
    owners = sum(math.prod(weight.shape) for weight in weights) if rule.selects else 0
    return 4 * sum(state_numel(rule, weight) for weight in weights) + owners


def statistics_bytes(base: Weights) -> int:
    """Return the bytes of an expert's statistics at most: linear maps that share their inputs are stored once."""
    weights = [weight_of(base, name, 1) for name in base.floating()]
    return sum(4 * math.prod(inputs_shape(w.shape[1])) for w in weights if w.is_matrix and len(w.shape) == 2)


def _checkpoint_bytes(count: int, fields: Mapping[str, Any]) -> int:
    """Return the bytes of the checkpoints that lie there at a time: trained weights in float32, and Adam's moments."""
    copies = min(_CHECKPOINTS, int(fields.get("save_total_limit") or 1) + 1)
    return copies * (4 if fields.get("save_only_model") else 4 + _ADAM) * count


def _companions_bytes(base: Weights) -> int:
    """Return the bytes of config, tokenizer, ... which go with every model."""
    files = (p for p in base.folder.iterdir() if p.suffix in COMPANIONS)
    return sum(p.stat().st_size for p in files if not p.name.endswith(".index.json"))
