"""TALR: token-adaptive loss reweighting, with a fixed temperature.

Lin et al., "SFT Doesn't Always Hurt General Capabilities", ICLR 2026, arXiv 2509.20758. The authors' program is not
public. The form p^(1/tau), the floor of 0.01 and the division by the number of tokens were read in a reproduction by
others, not in the paper. There tau is found anew in each batch: the median of its texts' mean losses. Here it is one
number for a stage, because a batch's median would depend on the number of ranks and on gradient accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hf_contmerge.train_strategies import TrainStrategy


@dataclass
class Talr(TrainStrategy):
    """loss = sum w_t * -log p_t / n, with w_t = max(p_t^(1 / tau), floor).

    A large tau is plain training. tau 1 without a floor is DFT, `loss_type: dft`.
    """

    tau: Annotated[float, Field(gt=0)] = 1.0
    """The loss of a token, in nats, whose weight is 1 / e. Set it near the loss of the stage's texts."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.01

    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        return (log_probs / self.tau).exp().clamp(min=self.floor)
