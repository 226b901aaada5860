"""Checks that TRL's loss is the model's own.

TRL's trainers (1.16) take log-probabilities from the last hidden state and the output layer alone, with the caps and
scales that they know, and not from the model's logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.loading import plain_model

_TOKENS = 8
_SAME, _SAME_HALF = 1e-2, 3e-2
"""Largest difference of log-probabilities, as a share of the largest: rounding, in TF32 too, and in 16 bits."""


def weights_beyond_head(model: Any) -> list[str]:
    """Return the names of weights outside inner model and output layer."""
    known = {id(weight) for part in (model.base_model, model.get_output_embeddings()) for weight in part.parameters()}
    return [name for name, weight in model.named_parameters() if id(weight) not in known]


def refuse_head(kind: str, reason: str) -> ModelError:
    """Return the error of a model with more than an output layer."""
    return ModelError(
        f"{kind} cannot be trained here: {reason}, and TRL computes the loss from the last hidden state and the output "
        "layer alone. It can be merged and measured."
    )


@torch.no_grad()
def check_head(trainer: Any) -> None:
    """Raise ModelError if TRL's log-probabilities are not the model's.

    A few tokens go through both. Not for sharded weights, which are whole only inside a step.
    """
    model = plain_model(trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    if "fused_lm_head" not in inspect.signature(model.forward, follow_wrapped=False).parameters:
        return
    was_training = model.training
    model.eval()
    try:
        with trainer.accelerator.autocast():  # some kernels of attention need 16 bits
            found, own = _log_probabilities(model, getattr(trainer, "temperature", 1.0))
    finally:
        model.train(was_training)
    gap, largest = float((found - own).abs().max()), max(1.0, float(own.abs().max()))
    half = model.dtype.itemsize == 2 or trainer.accelerator.mixed_precision != "no"
    if gap > (_SAME_HALF if half else _SAME) * largest:  # not where either is not a number: others tell that
        raise refuse_head(type(model).__name__, f"its log-probability of a token is another by {gap:.3g} nats")


def _log_probabilities(model: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """Return TRL's and the model's log-probability of each token.

    `temperature`: of the answers that a trainer samples; its loss is of the same distribution.
    """
    ids = torch.arange(_TOKENS, device=model.device).unsqueeze(0)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float() / temperature
    own = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return found.float(), own
