"""ASFT: anchored supervised fine-tuning, DFT's weights and a pull towards the base.

Zhu et al., arXiv 2509.23753. The divergence and its strength are those of LLaMA-Factory. DFT: Wu et al., arXiv
2508.05629, which alone is `loss_type: dft`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hf_contmerge.train_strategies.distill import Distill, Teacher


@dataclass
class Asft(Distill):
    """loss = sum (p_t * -log p_t + strength * T^2 * KL(base || model)) / n, with p_t as a weight without a gradient.

    The weight makes unlikely tokens count less, and the divergence ends the drift that this alone leads to.
    """

    strength: Annotated[float, Field(ge=0)] = 0.1
    temperature: Annotated[float, Field(gt=0)] = 1.0
    teacher: Teacher = "base"

    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        return log_probs.exp()
