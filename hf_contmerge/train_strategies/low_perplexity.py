"""Low perplexity: learn only likely tokens.

Selective token masking: Wu, Tam, Lin, Lee and Chen, "Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token
Learning", NeurIPS 2025, arXiv 2501.14315, with tokens of perplexity up to 2.5. In the authors' program the model before
training decides which tokens are masked; here the model in training does, so that tokens join as they become likely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hf_contmerge.train_strategies import TrainStrategy


@dataclass
class LowPerplexity(TrainStrategy):
    """loss = sum w_t * -log p_t / n, with w_t = 1 if p_t > threshold, else 0."""

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """1 / the largest perplexity of a token; 0 masks none."""

    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        limit = math.log(self.threshold) if self.threshold else -math.inf
        return (log_probs > limit).to(log_probs.dtype)
