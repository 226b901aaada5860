"""Blend: shares of the merge and of each expert.

The schedules that TIME compares are points of it: Dziadzio et al., CVPR 2025, arXiv 2412.06712.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class Blend(MergeRule):
    """S <- keep*S + take*D;  merged = base + S.

    Other rules are points (keep, take) of it: average ((t-1)/t, 1/t), ema (beta, 1-beta), task_arithmetic (1, lambda),
    slao (1-1/sqrt(t), 1/sqrt(t)). With `auto`, each stage has its own values.
    """

    reference = "https://arxiv.org/abs/2412.06712"
    start_from = "base"
    unit = "element"
    basis_free = True
    linear = True
    of_newest: ClassVar[Mapping[str, int]] = {"keep": 2, "take": 1}

    keep: float = 1.0
    take: float = 0.5

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return self.keep * running + self.take * task_vector

    def scale(self, norms: Norms) -> float:
        return 1.0
