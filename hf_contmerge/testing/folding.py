"""Folds tensors by a rule as merges do, for its checks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, State, Weight

Check = Callable[[MergeRule], None]

SHAPES = (((), False), ((7,), False), ((5, 7), False), ((5, 7), True), ((3, 7, 5), False), ((3, 7, 5), True))
"""Shape of a weight, and whether it is a linear map."""


def draw(shape: Sequence[int], count: int, *, seed: int = 0) -> list[Tensor]:
    """Return tensors of normal noise."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator) for _ in range(count)]


def weight(is_matrix: bool, stage: int = 1, name: str = "w", shape: Sequence[int] = ()) -> Weight:
    """Return a weight as rules see it."""
    return Weight(name, is_matrix, stage, tuple(shape))


def zeros(rule: MergeRule, shape: Sequence[int], *, is_matrix: bool = True) -> Any:
    """Return the first state: a tensor, or named parts."""
    parts = {name: torch.zeros(part) for name, part in rule.parts(weight(is_matrix, shape=shape)).items()}
    return parts[""] if list(parts) == [""] else parts


def fold(rule: MergeRule, task_vectors: Sequence[Tensor], *, is_matrix: bool = True, name: str = "w") -> Any:
    """Return the state of one weight after the experts."""
    shape, dtype = task_vectors[0].shape, task_vectors[0].dtype
    running = on_parts(lambda part: part.to(dtype), zeros(rule, shape, is_matrix=is_matrix))
    for stage, task_vector in enumerate(task_vectors, 1):
        running = rule.update(running, task_vector, weight(is_matrix, stage, name, shape))
    return running


def on_parts(do: Callable[[Tensor], Tensor], state: State) -> Any:
    """Return a state with a function applied to each of its tensors."""
    return do(state) if isinstance(state, Tensor) else {name: do(part) for name, part in state.items()}


def flat(state: State) -> Tensor:
    """Return a state as one tensor: of parts, their elements in order."""
    return state if isinstance(state, Tensor) else torch.cat([part.reshape(-1) for part in state.values()])


def change(rule: MergeRule, task_vectors: Sequence[Tensor], *, is_matrix: bool = True) -> Tensor:
    """Return merged - base of a model of one weight."""
    running = fold(rule, task_vectors, is_matrix=is_matrix)
    norms = Norms(tuple(d.double().norm().item() for d in task_vectors), flat(running).double().norm().item())
    last = weight(is_matrix, len(task_vectors), shape=task_vectors[0].shape)
    return rule.scale(norms) * rule.read_out(running, last)


def merge(rule: MergeRule, base: Tensor, experts: Sequence[Tensor], *, is_matrix: bool = True) -> Tensor:
    """Fold experts into a model of one weight."""
    return base + change(rule, [expert - base for expert in experts], is_matrix=is_matrix)


@dataclass(frozen=True)
class Case:
    """A rule at work on one weight."""

    rule: MergeRule
    shape: tuple[int, ...]
    is_matrix: bool

    def __str__(self) -> str:
        return f"{self.rule}, {'matrix' if self.is_matrix else 'weight'} of shape {self.shape}"

    def fold(self, task_vectors: Sequence[Tensor]) -> Any:
        return fold(self.rule, task_vectors, is_matrix=self.is_matrix)

    def weight(self, stage: int) -> Weight:
        return weight(self.is_matrix, stage, shape=self.shape)


def on_each_weight(check: Callable[[Case], None]) -> Check:
    """Return a check of a rule on weights of all kinds."""

    @functools.wraps(check)
    def on_all(rule: MergeRule) -> None:
        for shape, is_matrix in SHAPES:
            check(Case(rule, shape, is_matrix))

    return on_all


def require(holds: bool, who: object, what: str) -> None:
    """Raise AssertionError for a broken promise."""
    if not holds:
        raise AssertionError(f"{who}: {what}")


def require_equal(found: State, wanted: State, who: object, what: str, *, atol: float = 0.0) -> None:
    """Raise AssertionError for different states."""
    torch.testing.assert_close(flat(found), flat(wanted), rtol=0, atol=atol, msg=lambda text: f"{who}: {what}. {text}")
