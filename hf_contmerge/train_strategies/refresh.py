"""Refresh: unlearn a batch a little, then learn it.

Wang, Li, Shen, Wu and Huang, "A Unified and General Framework for Continual Learning", ICLR 2024, arXiv 2403.13249. The
authors take the ascent step on a copy and divide it by 1 + F / 1000, with F the Fisher information; for F below 1 that
changes less than a thousandth, and is left out here, as is their noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_contmerge.train_strategies import Gradient, TrainStrategy
from hf_contmerge.train_strategies._weights import trained


@dataclass
class Refresh(TrainStrategy):
    """W <- W + delta * |W| * G / |G| before each step, for each tensor, with G the gradient of the step's own batch.

    The step then has the gradient at the weights so moved. Twice the computation, no memory. At a learning rate of 1e-5
    a step of Adam changes a weight by about 2.5e-4 of its norm: delta 1e-5 is 4 % of that.
    """

    delta: Annotated[float, Field(ge=0)] = 1e-5

    def before_step(self, model: nn.Module, gradient: Gradient) -> None:
        slopes = gradient() if self.delta else {}
        for name, weight in trained(model):
            size = _norm(slopes[name]) if name in slopes else 0.0
            if size:
                weight.add_(slopes[name], alpha=self.delta * _norm(weight) / size)


def _norm(tensor: Tensor) -> float:
    """Return the norm of a whole tensor, sharded or not."""
    norm = torch.linalg.vector_norm(tensor.detach())
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
