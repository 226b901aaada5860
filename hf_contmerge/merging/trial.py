"""A rule's work on a small weight, to time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Shape, Weight, inputs_shape
from hf_contmerge.merging._pieces import Piece, read_out, updated
from hf_contmerge.merging.costs import PIECE

_SIDE = 512
"""The longest side of a matrix that is tried: rules that decompose it take about 0.1 s."""


@dataclass(frozen=True)
class Trial:
    """The fold of one expert into a small weight."""

    fold: Callable[[], Tensor]
    times: float
    """How many times as long the whole weight takes."""


def trial_of(rule: MergeRule, weight: Weight, device: torch.device) -> Trial:
    """Make a fold of random values into the state before a stage.

    A matrix that the rule decomposes keeps its form, as its time grows with the third power of its sides; others keep
    some rows. `weight`: not empty.
    """
    cubic = weight.is_matrix and rule.unit == "matrix" and _decomposes_alike(rule, weight)
    shape = _small_matrix(weight.shape) if cubic else _few_rows(weight.shape)
    draw = torch.Generator(device).manual_seed(0)
    statistics = {name: _statistic(name, shape, draw) for name in rule.needs}
    small = replace(weight, shape=shape, threshold=1.0, statistics=statistics)
    state = Piece(0, math.prod(shape), shape).zeros(rule, small, device)
    for stage in range(1, weight.stage):
        state = updated(rule, state, torch.randn(shape, generator=draw, device=device), replace(small, stage=stage))
    change = torch.randn(shape, generator=draw, device=device)
    larger = math.prod(weight.shape) / math.prod(shape)
    stack = math.prod(weight.shape[:-2]) if cubic else larger
    return Trial(lambda: read_out(rule, updated(rule, state, change, small), small), stack * (larger / stack) ** 1.5)


def _decomposes_alike(rule: MergeRule, weight: Weight) -> bool:
    """Say if a rule treats a matrix like a small one.

    Rules may average wide ones.
    """
    small = replace(weight, shape=_small_matrix(weight.shape))
    form, small_form = (
        {name: len(part) - len(each.shape) for name, part in rule.parts(each).items()} for each in (weight, small)
    )
    alike = len(inputs_shape(weight.shape[-1])) == len(inputs_shape(small.shape[-1]))
    return form == small_form and (alike or "inputs" not in rule.needs)


def _small_matrix(shape: Shape) -> Shape:
    share = min(1.0, _SIDE / max(shape[-2:]))
    return tuple(max(1, round(side * share)) for side in shape[-2:])


def _few_rows(shape: Shape) -> Shape:
    row = math.prod(shape[1:])
    return (min(shape[0], max(1, PIECE // row)), *shape[1:]) if shape else shape


def _statistic(name: str, shape: Shape, draw: torch.Generator) -> Tensor:
    if name != "inputs":
        return torch.rand(shape, generator=draw, device=draw.device)
    width = shape[-1]
    inputs = torch.randn(2 * width, width, generator=draw, device=draw.device)
    return inputs.square().mean(0) if inputs_shape(width) == (width,) else inputs.T @ inputs / len(inputs)
