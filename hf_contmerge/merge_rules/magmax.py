"""MagMax: the largest change of each weight.

Marczak et al., ECCV 2024, arXiv 2407.06322.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class Magmax(MergeRule):
    """S[j] <- D[j] if |D[j]|>=|S[j]| else S[j];  merged = base + lambda*S.

    `lambda` is 0.5 in all of the authors' scripts, also after the first stage. Experts come from sequential
    fine-tuning, so D_t contains D_{t-1}. At equal magnitudes the later stage wins.
    """

    reference = "https://arxiv.org/abs/2407.06322"
    start_from = "previous"
    unit = "element"
    selects = True
    tunable = ("lambda_",)

    lambda_: float = 0.5

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return torch.where(task_vector.abs() >= running.abs(), task_vector, running)

    def scale(self, norms: Norms) -> float:
        return self.lambda_
