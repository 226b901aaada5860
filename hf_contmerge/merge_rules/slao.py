"""SLAO: running mean with steps of 1 / sqrt(stage).

Qiao & Mahdavi, arXiv 2512.23017.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class Slao(MergeRule):
    """S <- S + (D-S) / sqrt(t);  merged = base + S.

    The paper's time-aware scaling, applied to each expert's task vector D = BA. The paper applies it to the LoRA factor
    B and takes A from the last expert, whose training starts from the previous expert.
    """

    reference = "https://arxiv.org/abs/2512.23017"
    start_from = "previous"
    unit = "element"
    basis_free = True
    linear = True

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running.lerp(task_vector, 1.0 / math.sqrt(weight.stage))

    def scale(self, norms: Norms) -> float:
        return 1.0
