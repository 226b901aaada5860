"""Stitch: the largest changes of each expert, averaged where they overlap.

The form without data of Localize-and-Stitch, He et al., TMLR 2025, arXiv 2408.13656.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class Stitch(MergeRule):
    """merged = base + lambda * (sum of kept D) / (number of experts that kept the element).

    Of each D, the `sparsity` share of largest magnitudes over the whole model is kept. The threshold is read off
    a histogram with 2^16 bins, which puts it up to 0.4 % too low. Embeddings and heads keep the base's values, as
    in the paper, unless `embeddings` is true. The state is a sum and a count.
    """

    reference = "https://arxiv.org/abs/2408.13656"
    start_from = "base"
    slots = 2
    tunable = ("lambda_",)

    sparsity: float = 0.1
    lambda_: float = 1.0
    embeddings: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sparsity <= 1:
            raise ValueError(
                f"stitch: sparsity must be above 0 and at most 1 (the share of elements to keep); got {self.sparsity}"
            )

    def share_kept(self, weight: Weight) -> float | None:
        table = len(weight.shape) == 2 and not weight.is_matrix and weight.depth is None
        return None if table and not self.embeddings else self.sparsity

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        if self.share_kept(weight) is None:
            return running
        size, threshold = task_vector.abs(), weight.threshold
        if threshold is None:  # of this weight alone
            threshold = self._smallest_kept(size.reshape(-1))
        kept = size >= threshold if self.sparsity == 1 else (size >= threshold) & (size > 0)
        return torch.stack([running[0] + torch.where(kept, task_vector, 0), running[1] + kept])

    def _smallest_kept(self, size: Tensor) -> float:
        count = max(1, int(self.sparsity * len(size)))
        return float(size.kthvalue(len(size) - count + 1).values) if len(size) else 0.0

    def read_out(self, running: Tensor, weight: Weight) -> Tensor:
        total, count = running
        return total / count.clamp_min(1)

    def scale(self, norms: Norms) -> float:
        return self.lambda_
