"""Merging one tensor: what it takes, in which pieces, at what cost. The rules have the maths; this hands it out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merging.costs import PIECE, PIECE_ON_GPU, needs_whole


@dataclass(frozen=True)
class Piece:
    """A run of a weight's elements, and the shape in which a rule sees it."""

    start: int
    stop: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """Cut the piece out of a flat tensor, or out of (slots, elements)."""
        return flat[..., self.start : self.stop].reshape((*flat.shape[:-1], *self.shape))


def pieces(
    rule: MergeRule, weight: Weight, shape: Sequence[int], device: torch.device, *, whole: bool = False
) -> Iterator[Piece]:
    """Yield the pieces in which a weight is worked on: whole, or flat runs of its elements."""
    numel = math.prod(shape)
    if whole or needs_whole(rule, weight.is_matrix):
        yield Piece(0, numel, tuple(shape))
        return
    size = PIECE if device.type == "cpu" else PIECE_ON_GPU
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


def zeros(rule: MergeRule, like: Tensor) -> Tensor:
    """Return a rule's state before the first expert, for a weight or a piece of one."""
    return torch.zeros((rule.slots, *like.shape) if rule.slots > 1 else like.shape, device=like.device)


def flat_slots(rule: MergeRule, state: Tensor) -> Tensor:
    """Return a weight's state with its elements along one axis, behind the slots' if there are several."""
    return state.reshape(rule.slots, -1) if rule.slots > 1 else state.reshape(-1)


def square(tensor: Tensor) -> float:
    """Return the sum of squares, in float64: not finite if and only if some element is not."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
