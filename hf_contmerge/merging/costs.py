"""The cost of merging a tensor: seconds and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_contmerge.merge_rules import MergeRule, Weight, inputs_shape
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Job

PIECE = 2**18
"""Elements worked on at once by rules that allow it: the float32 temporaries then stay in a core's cache. Measured on
28M elements and four experts, one thread: 0.5 s, against 2.6 s for the tensor in one go."""


PIECE_ON_GPU = 2**26


@dataclass(frozen=True)
class Passage:
    """How a weight passes through a merge."""

    touched: int
    """How many tensors of the base's size are read or written besides it."""
    group: int = 0
    """Number of the output file."""
    whole: bool = False
    """It is worked on in one piece, though the rule would not ask for that."""
    piece: int = PIECE
    """Elements worked on at once."""


# Measured on one core; only their ratio matters, which decides who works on what.
_BYTES_PER_SECOND, _FLOPS = 2e9, 3e10


def piece_size(device: torch.device) -> int:
    """Return the elements worked on at once."""
    return PIECE if device.type == "cpu" else PIECE_ON_GPU


def needs_whole(rule: MergeRule, weight: Weight) -> bool:
    """Say if a rule needs a weight in one piece."""
    if rule.unit == "tensor" or (weight.is_matrix and (rule.unit == "matrix" or rule.needs)):
        return True
    axes = len(weight.shape)
    return any(part[len(part) - axes :] != weight.shape for part in rule.parts(weight).values())


def state_dtype(rule: MergeRule) -> torch.dtype:
    """Return the dtype of a rule's states."""
    return torch.float64 if rule.ill_posed else torch.float32


def state_bytes(rule: MergeRule, weight: Weight) -> int:
    """Return the bytes of a weight's state."""
    return state_dtype(rule).itemsize * sum(math.prod(part) for part in rule.parts(weight).values())


def weight_of(base: Weights, name: str, stage: int) -> Weight:
    """Describe a weight of the base to a rule."""
    shape = base.shape(name)
    return Weight(name, is_matrix(name, shape, base.vocabulary), stage, shape, base.depths.get(name))


def stream_job(rule: MergeRule, base: Weights, name: str, passage: Passage) -> Job:
    """Estimate the work on one weight."""
    weight, touched = weight_of(base, name, 1), passage.touched
    numel, moved = math.prod(weight.shape), base.nbytes(name) * (1 + touched)
    whole = passage.whole or needs_whole(rule, weight)
    state = state_bytes(rule, weight)
    share = 1 if whole else passage.piece / max(numel, passage.piece)
    seconds, memory = moved / _BYTES_PER_SECOND, round(share * (2 * state + 16 * numel))
    if "inputs" in rule.needs and weight.is_matrix:
        memory += 4 * math.prod(inputs_shape(weight.shape[-1]))
    memory += 4 * numel * len({"fisher", "adam"}.intersection(rule.needs))
    if rule.unit == "matrix" and weight.is_matrix and numel:
        small, large = sorted(weight.shape[-2:])
        seconds += touched * (numel // (small * large)) * (6 * small**2 * large + 30 * small**3) / _FLOPS
        memory += 8 * (3 * small * large + 6 * small**2)
    return Job(name, seconds, memory, moved, passage.group)
