"""DARE: drop elements of each task vector at random, rescale the rest.

Yu et al., ICML 2024, arXiv 2311.03099.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merge_rules._draws import uniform


@dataclass(frozen=True)
class Dare(MergeRule):
    """S <- S + D*m / (1-p), m = 1 with probability 1-p, else 0;  merged = base + lambda*S.

    The mean over draws is task arithmetic. The draws depend only on `seed`, the weight's name and the stage, so they
    are equal on any machine and in any order of the weights. `p` and `lambda` are MergeBench's.
    """

    reference = "https://arxiv.org/abs/2311.03099"
    start_from = "base"
    linear = True
    tunable = ("lambda_",)

    p: float = 0.9
    lambda_: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"dare: p must be at least 0 and below 1 (the share of elements to drop); got {self.p}")

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        kept = uniform(self.seed, weight, task_vector) >= self.p
        return running + torch.where(kept, task_vector, 0) / (1 - self.p)

    def scale(self, norms: Norms) -> float:
        return self.lambda_
