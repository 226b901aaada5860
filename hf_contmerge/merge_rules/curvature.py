"""Curvature: a mean weighted by Fisher or Adam's second moments.

Fisher merging, Matena & Raffel, NeurIPS 2022, arXiv 2111.09832; OTA, arXiv 2509.11167.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight


@dataclass(frozen=True)
class Curvature(MergeRule):
    """N <- N + P*D, Q <- Q + P;  merged = base + N / (Q + eps), with P = v^power.

    v is the expert's `importance`: the diagonal of the empirical Fisher information, or Adam's second moments at the
    end of its training (OTA: `{importance: adam, power: 0.5}`; Fisher merging has power 1). A weight without statistics
    is averaged. `density` below 1 first keeps that share of D, by the size of v*D^2. The order does not matter.
    """

    reference = "https://arxiv.org/abs/2509.11167"
    start_from = "base"
    slots = 2

    importance: Literal["fisher", "adam"] = "fisher"
    power: float = 0.5
    density: float = 1.0
    eps: float = 1e-26

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(
                f"curvature: density must be above 0 and at most 1 (the share of values to keep); got {self.density}"
            )
        if self.power < 0:
            raise ValueError(f"curvature: power must be 0 or more (0 is the mean); got {self.power}")
        if self.eps <= 0:
            raise ValueError(f"curvature: eps must be above 0; got {self.eps}")

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.importance,)

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        found = weight.statistics.get(self.importance)
        v = torch.ones_like(task_vector) if found is None else found.to(task_vector.dtype)
        p = v.pow(self.power)
        return torch.stack([running[0] + p * self._pruned(task_vector, v), running[1] + p])

    def read_out(self, running: Tensor, weight: Weight) -> Tensor:
        return running[0] / (running[1] + self.eps)

    def scale(self, norms: Norms) -> float:
        return 1.0

    def _pruned(self, d: Tensor, v: Tensor) -> Tensor:
        if self.density == 1 or not d.numel():
            return d
        size = (v.sqrt() * d.abs()).reshape(-1)  # its square may be below float32
        count = max(1, int(self.density * len(size)))
        kept = size >= size.kthvalue(len(size) - count + 1).values
        return torch.where(kept.reshape(d.shape), d, 0)
