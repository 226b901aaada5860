"""TIES: trim, elect a sign, average agreeing values.

Yadav et al., arXiv 2306.01708.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class Ties(MergeRule):
    """merged = base + lambda * disjoint mean of the trimmed D.

    Each D is trimmed to the `density` share of largest magnitudes. The disjoint mean is the mean of the values with the
    sign of their sum (positive if they cancel), per weight. The state is therefore two sums and two counts: of positive
    and of negative values.
    """

    reference = "https://arxiv.org/abs/2306.01708"
    start_from = "base"
    slots = 4
    tunable = ("lambda_",)

    density: float = 0.2
    lambda_: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(
                f"ties: density must be above 0 and at most 1 (the share of values to keep); got {self.density}"
            )

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        kept = _trimmed(task_vector, self.density)
        new = running.clone()
        new[0] += kept.clamp_min(0)
        new[1] += kept.clamp_max(0)
        new[2] += kept > 0
        new[3] += kept < 0
        return new

    def read_out(self, running: Tensor, weight: Weight) -> Tensor:
        plus, minus, many_plus, many_minus = running
        elected = plus + minus >= 0
        return torch.where(elected, plus, minus) / torch.where(elected, many_plus, many_minus).clamp_min(1)

    def scale(self, norms: Norms) -> float:
        return self.lambda_


def _trimmed(x: Tensor, density: float) -> Tensor:
    """Zero all but the largest magnitudes.

    A share `density` of the elements is kept, at least one.
    """
    size = x.abs().reshape(-1)
    if not len(size):
        return x
    count = max(1, int(density * len(size)))
    kept = size >= size.kthvalue(len(size) - count + 1).values
    if kept.sum() > count:  # equal magnitudes at the threshold: argsort's order decides, as in mergekit's `ties`
        kept = torch.zeros_like(kept).index_fill(0, size.argsort(descending=True)[:count], True)
    return torch.where(kept.reshape(x.shape), x, 0)
