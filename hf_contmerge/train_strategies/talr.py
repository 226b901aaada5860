"""TALR: token-adaptive loss reweighting.

Lin et al., "SFT Doesn't Always Hurt General Capabilities", ICLR 2026, arXiv 2509.20758. The authors' program is not
public. The form p^(1/tau), the floor of 0.01, the division by the number of tokens, and tau as the median of the mean
losses of a batch's texts were read in a reproduction by others, not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from hf_contmerge.train_strategies import TrainStrategy
from hf_contmerge.train_strategies._ranks import gather_over_ranks

_LEAST = 1e-6
"""Of a tau that is found: texts that are known by heart have a loss near 0."""


@dataclass
class Talr(TrainStrategy):
    """loss = sum w_t * -log p_t / n, with w_t = max(p_t^(1 / tau), floor).

    tau is the median over a micro-batch, on all ranks, of each text's mean loss; or a number for the whole stage. In
    packed stages a row of the batch counts as a text. A large tau is plain training. tau 1 without a floor is DFT,
    `loss_type: dft`.
    """

    tau: Literal["batch"] | Annotated[float, Field(gt=0)] = "batch"
    """The loss of a token, in nats, whose weight is 1 / e."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.01

    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        tau = _median_loss(log_probs, counts) if self.tau == "batch" else self.tau
        return (log_probs / tau).exp().clamp(min=self.floor)


def _median_loss(log_probs: Tensor, counts: Tensor) -> Tensor:
    """Return the median of the rows' mean losses, over all ranks.

    1 if no token counts.
    """
    counted = counts.sum(-1)
    losses = -(log_probs * counts).sum(-1) / counted.clamp(min=1)
    found = gather_over_ranks(losses[counted > 0].float())
    return found.quantile(0.5).clamp(min=_LEAST) if len(found) else found.new_ones(())
