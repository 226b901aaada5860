"""EAFT: entropy-adaptive fine-tuning; confident contradictions count less.

arXiv 2601.02151. The authors take the entropy of the 20 likeliest tokens, scaled to sum to 1, by its maximum ln 20 (as
the number 3 in their program). TRL gives the entropy of the whole vocabulary: about the same where few tokens are
likely, and larger elsewhere, where the weight is 1 here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.train_strategies import TrainStrategy

_LARGEST = math.log(20)


@dataclass
class Eaft(TrainStrategy):
    """loss = sum w_t * -log p_t / n, with w_t = min(H_t / ln 20, 1) and H_t the entropy of the prediction in nats.

    A token that contradicts a confident model (small H_t, large loss) changes it most and teaches it least.
    """

    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        return (entropy / _LARGEST).clamp(max=1.0)
