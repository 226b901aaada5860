"""Merging one tensor: what it takes, in which pieces, at what cost. The rules have the maths; this hands it out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.work_sharing import Job

PIECE = 2**18
"""Elements worked on at once by rules that allow it: the float32 temporaries then stay in a core's cache. Measured on
28M elements and four experts, one thread: 0.5 s, against 2.6 s for the tensor in one go."""
_PIECE_ON_GPU = 2**26

# Measured on one core; only their ratio matters, which decides who works on what.
_BYTES_PER_SECOND, _FLOPS = 2e9, 3e10

_NOT_A_LINEAR_MAP = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|shared|router|gate|\w*_router|\w*expert_gate)(\.|$)"
)


@dataclass(frozen=True)
class Piece:
    """A run of a weight's elements, and the shape in which a rule sees it."""

    start: int
    stop: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """Cut the piece out of a flat tensor, or out of (slots, elements)."""
        return flat[..., self.start : self.stop].reshape((*flat.shape[:-1], *self.shape))


def needs_whole(rule: MergeRule, is_matrix: bool) -> bool:
    """Say whether a rule must see a weight in one piece."""
    return rule.unit == "tensor" or (rule.unit == "matrix" and is_matrix)


def pieces(
    rule: MergeRule, weight: Weight, shape: Sequence[int], device: torch.device, *, whole: bool = False
) -> Iterator[Piece]:
    """Yield the pieces in which a weight is worked on: whole, or flat runs of its elements."""
    numel = math.prod(shape)
    if whole or needs_whole(rule, weight.is_matrix):
        yield Piece(0, numel, tuple(shape))
        return
    size = PIECE if device.type == "cpu" else _PIECE_ON_GPU
    for start in range(0, numel, size):
        stop = min(start + size, numel)
        yield Piece(start, stop, (stop - start,))


def merged_tensor(
    base: Tensor, running: Tensor, scale: float, dtype: torch.dtype, *, expert: Tensor | None = None
) -> Tensor:
    """Return base + scale * running in float32, cast to dtype.

    With `expert`, the only one so far and taken whole (scale 1), its own values are returned where running is its task
    vector: base + (expert - base) may round to a neighbour.
    """
    wide = base.float()
    merged = torch.add(wide, running, alpha=scale)
    if expert is not None:
        whole = expert.float()
        merged = torch.where(running == whole - wide, whole, merged)
    return merged.to(dtype)


def fold_tensor(
    rule: MergeRule, base: Tensor, experts: Sequence[Tensor], name: str, *, is_matrix: bool
) -> tuple[Tensor, Norms]:
    """Fold tensors that are at hand: return the state after all of them, and this tensor's own norms."""
    wide = base.float()
    state, norms = zeros(rule, wide), []
    for stage, expert in enumerate(experts, 1):
        change = expert.float() - wide
        norms.append(math.sqrt(square(change)))
        state = rule.update(state, change, Weight(name, is_matrix, stage))
    return state, Norms(tuple(norms), math.sqrt(square(state)))


def is_matrix(name: str, shape: Sequence[int], vocabulary: int | None) -> bool:
    """Say whether a weight is a linear map, or a 3-D stack of them, which projection rules project.

    Vocabulary tables (embeddings, output heads; by name or by their size) and routers of expert mixtures are not.
    """
    if len(shape) not in (2, 3) or _NOT_A_LINEAR_MAP.search(name):
        return False
    return shape[0] != vocabulary


def zeros(rule: MergeRule, like: Tensor) -> Tensor:
    """Return a rule's state before the first expert, for a weight or a piece of one."""
    return torch.zeros((rule.slots, *like.shape) if rule.slots > 1 else like.shape, device=like.device)


def flat_slots(rule: MergeRule, state: Tensor) -> Tensor:
    """Return a weight's state with its elements along one axis, behind the slots' if there are several."""
    return state.reshape(rule.slots, -1) if rule.slots > 1 else state.reshape(-1)


def square(tensor: Tensor) -> float:
    """Return the sum of squares, in float64: not finite if and only if some element is not."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def job_of(
    rule: MergeRule,
    weight: Weight,
    shape: Sequence[int],
    nbytes: int,
    *,
    touched: int,
    group: int = 0,
    whole: bool = False,
) -> Job:
    """Estimate the work on one weight.

    `nbytes`: the size of the base's tensor. `touched`: how many more of that size are read or written. `whole`: it is
    worked on in one piece, though the rule would not ask for that.
    """
    numel, moved = math.prod(shape), nbytes * (1 + touched)
    whole = whole or needs_whole(rule, weight.is_matrix)
    seconds, memory = moved / _BYTES_PER_SECOND, 4 * (numel if whole else PIECE) * (2 * rule.slots + 4)
    if rule.unit == "matrix" and weight.is_matrix and numel:
        small, large = sorted(shape[-2:])
        seconds += touched * (numel // (small * large)) * (6 * small**2 * large + 30 * small**3) / _FLOPS
        memory += 8 * (3 * small * large + 6 * small**2)
    return Job(weight.name, seconds, memory, moved, group)
