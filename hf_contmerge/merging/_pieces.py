"""The pieces of a tensor, and its state in parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.merge_rules import MergeRule, Norms, Shape, Weight
from hf_contmerge.merging.costs import needs_whole, piece_size, state_dtype
from hf_contmerge.models.config import outer_depth
from hf_contmerge.models.rounding import Rounding, compared, rounded, square
from hf_contmerge.models.survival import Kept

Parts = dict[str, Tensor]
"""A weight's state, or a piece of it. The only part of a rule that names none is called ""."""


@dataclass(frozen=True)
class Piece:
    """A run of a weight's elements, with its shape for rules."""

    start: int
    stop: int
    shape: Shape

    def of(self, flat: Tensor) -> Tensor:
        """Cut the piece out of a flat tensor."""
        return flat[self.start : self.stop].reshape(self.shape)

    def of_state(self, state: Parts, weight: Weight) -> Parts:
        """Cut the piece out of a state, part by part."""
        if self.shape == weight.shape:
            return state
        lead = {name: part.shape[: part.ndim - len(weight.shape)] for name, part in state.items()}
        return {name: part.reshape(*lead[name], -1)[..., self.start : self.stop] for name, part in state.items()}

    def zeros(self, rule: MergeRule, weight: Weight, device: torch.device) -> Parts:
        """Return the piece's state before the first expert."""
        shapes = dict(rule.parts(weight))
        if self.shape != weight.shape:
            shapes = {name: (*s[: len(s) - len(weight.shape)], *self.shape) for name, s in shapes.items()}
        return {name: torch.zeros(shape, dtype=state_dtype(rule), device=device) for name, shape in shapes.items()}


def pieces(rule: MergeRule, weight: Weight, device: torch.device, *, whole: bool = False) -> Iterator[Piece]:
    """Yield a weight's pieces: the whole, flat runs, or none if empty."""
    numel = math.prod(weight.shape)
    if not numel:
        return
    if whole or needs_whole(rule, weight):
        yield Piece(0, numel, weight.shape)
        return
    size = piece_size(device)
    for start in range(0, numel, size):
        stop = min(start + size, numel)
        yield Piece(start, stop, (stop - start,))


def updated(rule: MergeRule, state: Parts, change: Tensor, weight: Weight) -> Parts:
    """Fold one expert into a state."""
    change = change.to(state_dtype(rule))
    if "" in state:
        return {"": rule.update(state[""], change, weight)}  # pyright: ignore[reportReturnType]
    return dict(rule.update(state, change, weight))  # pyright: ignore


def read_out(rule: MergeRule, state: Parts, weight: Weight) -> Tensor:
    """Return the tensor to scale, in float32, times its layer's factor."""
    read, factor = rule.read_out(state.get("", state), weight).float(), factor_of(rule, weight)
    return read if factor == 1.0 else read * factor


def factor_of(rule: MergeRule, weight: Weight) -> float:
    """Return the factor on a weight's read-out by its layer."""
    return rule.layer_factor(outer_depth(weight.name) if weight.depth is None else weight.depth)


def state_square(state: Parts) -> float:
    """Return the sum of squares of all parts."""
    return sum(map(square, state.values()))


@dataclass(frozen=True)
class Stored:
    """How a piece of a tensor is stored."""

    name: str
    dtype: torch.dtype
    by: Rounding
    start: int = 0


def check_scale(scale: float) -> None:
    """Raise ModelError for a scale beyond float32."""
    if not abs(scale) <= torch.finfo(torch.float32).max:  # false for NaN
        raise ModelError(f"The scale of the merge is {scale:.4g}, which float32 cannot hold. Use a smaller parameter.")


def merged_piece(
    base: Tensor, running: Tensor, scale: float, stored: Stored, *, expert: Tensor | None = None
) -> tuple[Tensor, Kept]:
    """Return base + scale * running as stored, and the update kept.

    With `expert`, the only one so far and taken whole (scale 1), its own values are returned where running is its task
    vector: base + (expert - base) may round to a neighbour.

    Raises:
        ModelError: a value is too large for the dtype.
    """
    check_scale(scale)
    wide = base.float()
    merged = torch.add(wide, running, alpha=scale)
    if expert is not None:
        whole = expert.float()
        merged = torch.where(running == whole - wide, whole, merged)
    result = rounded(merged, stored.dtype, name=stored.name, start=stored.start, by=stored.by)
    kept = compared(result, wide, running * scale)
    if not kept.finite:
        _refuse_overflow(stored, merged)
    return result, kept


def unchanged(base: Tensor, stored: Stored) -> tuple[Tensor, Kept]:
    """Return a piece without an update as stored, and its rounding error."""
    wide = base.float()
    result = rounded(wide, stored.dtype, name=stored.name, start=stored.start, by=stored.by)
    kept = compared(result, wide, torch.zeros_like(wide))
    if not kept.finite and bool(torch.isfinite(wide).all()):
        _refuse_overflow(stored, wide)
    return result, kept if kept.finite else Kept()


def _refuse_overflow(stored: Stored, merged: Tensor) -> NoReturn:
    largest, dtype = float(merged.abs().nan_to_num().max()), str(stored.dtype).removeprefix("torch.")
    advice = "a smaller scale" if stored.dtype == torch.float32 else "dtype: float32 or bfloat16"
    raise ModelError(
        f"{stored.name}: merged values as large as {largest:.4g} do not fit {dtype}, whose largest is "
        f"{torch.finfo(stored.dtype).max:.4g}. Use {advice}. No model was written."
    )


def fold_tensor(
    how: Sequence[tuple[MergeRule, float]],
    weights: Sequence[Weight],
    piece: Piece,
    base: Tensor,
    experts: Sequence[Tensor],
) -> tuple[Parts, Norms]:
    """Fold a piece of experts in memory; return state and norms.

    `how`: rule and weight of each expert. `weights`: the model's weight as each expert meets it.
    """
    first = how[0][0]
    wide, norms = base.to(state_dtype(first)), []
    state = piece.zeros(first, weights[0], wide.device)
    for (rule, factor), weight, expert in zip(how, weights, experts, strict=True):
        change = expert.to(wide.dtype) - wide
        change = change if factor == 1.0 else change * factor
        norms.append(math.sqrt(square(change)))
        state = updated(rule, state, change, weight)
    return state, Norms(tuple(norms), math.sqrt(state_square(state)))
