"""RandMix: each weight from a random expert.

Baseline of selecting rules in Marczak et al., ECCV 2024, arXiv 2407.06322.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merge_rules._draws import uniform


@dataclass(frozen=True)
class RandomMix(MergeRule):
    """S[j] <- D[j] with probability 1/t, else S[j];  merged = base+S.

    All t experts are equally likely. The draws depend only on `seed`, the weight's name and the stage, so they are
    equal on any machine and in any order of the weights.
    """

    reference = "https://arxiv.org/abs/2407.06322"
    start_from = "previous"
    selects = True

    seed: int = 0

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        drawn = uniform(self.seed, weight, task_vector) < 1 / weight.stage
        return torch.where(drawn, task_vector, running)

    def scale(self, norms: Norms) -> float:
        return 1.0
