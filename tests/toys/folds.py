"""Folding experts into one weight by a rule, as merge_stream does with many, and tensors to do it with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


def draw(shape: Sequence[int], count: int, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator) for _ in range(count)]


def weight(is_matrix: bool, stage: int = 1, name: str = "w") -> Weight:
    return Weight(name, is_matrix, stage)


def zeros(rule: MergeRule, shape: Sequence[int]) -> Tensor:
    """Return the state before the first expert."""
    return torch.zeros((rule.slots, *shape) if rule.slots > 1 else tuple(shape))


def fold(rule: MergeRule, task_vectors: Sequence[Tensor], *, is_matrix: bool = True, name: str = "w") -> Tensor:
    """Return the state of one weight after the experts."""
    running = zeros(rule, task_vectors[0].shape).to(task_vectors[0].dtype)
    for stage, task_vector in enumerate(task_vectors, 1):
        running = rule.update(running, task_vector, weight(is_matrix, stage, name))
    return running


def merge(rule: MergeRule, base: Tensor, experts: Sequence[Tensor], *, is_matrix: bool = True) -> Tensor:
    """Fold experts into a model of one weight, as merge_stream does with many."""
    task_vectors = [expert - base for expert in experts]
    running = fold(rule, task_vectors, is_matrix=is_matrix)
    norms = Norms(tuple(d.norm().item() for d in task_vectors), running.norm().item())
    return base + rule.scale(norms) * rule.read_out(running, weight(is_matrix, len(experts)))
