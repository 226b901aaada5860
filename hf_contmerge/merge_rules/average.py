"""Average: the mean of the experts.

SWA in the OPCM paper.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class Average(MergeRule):
    """S <- S + D;  merged = base + S / t.

    The result is the mean of the t experts.
    """

    reference = "https://arxiv.org/abs/2203.05482"
    start_from = "previous"
    unit = "element"
    basis_free = True
    linear = True

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + task_vector

    def scale(self, norms: Norms) -> float:
        return 1.0 / len(norms.experts)
