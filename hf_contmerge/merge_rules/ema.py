"""EMA: exponential moving average of the experts.

TIME, Dziadzio et al., CVPR 2025, arXiv 2412.06712.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class Ema(MergeRule):
    """S <- beta*S + (1-beta)*D;  merged = base + S.

    S = 0 at the start, which is the base itself.
    """

    reference = "https://arxiv.org/abs/2412.06712"
    start_from = "merged"
    unit = "element"
    basis_free = True
    linear = True

    beta: float = 0.5

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running.lerp(task_vector, 1.0 - self.beta)

    def scale(self, norms: Norms) -> float:
        return 1.0
