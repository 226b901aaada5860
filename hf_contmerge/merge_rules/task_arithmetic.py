"""Task arithmetic: scaled sum of the task vectors.

Ilharco et al., ICLR 2023, arXiv 2212.04089.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class TaskArithmetic(MergeRule):
    """S <- S + D;  merged = base + lambda * S.

    Usual lambda: 0.3 for 8 experts, 0.1 for 14 and more.
    """

    reference = "https://arxiv.org/abs/2212.04089"
    start_from = "base"
    unit = "element"
    basis_free = True
    linear = True
    tunable = ("lambda_",)

    lambda_: float = 0.3

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + task_vector

    def scale(self, norms: Norms) -> float:
        return self.lambda_
