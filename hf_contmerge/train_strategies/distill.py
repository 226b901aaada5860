"""Distill: stay near the predictions of the stage's starting model.

Li and Hoiem, "Learning without Forgetting", ECCV 2016, arXiv 1606.09282; the factor T^2, which keeps the gradient's
size, as in Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_contmerge.train_strategies import Inputs, TrainStrategy
from hf_contmerge.train_strategies._weights import plain_model

_LOGITS = 2**25  # in one chunk: 128 MiB in float32


@dataclass
class Distill(TrainStrategy):
    """loss + strength * T^2 * KL(teacher || student), mean over the tokens that count; logits are divided by T first.

    The teacher is the model as the stage starts: the previous expert; in the first stage, the base itself. It reads the
    stage's own examples, so that no earlier ones are needed. The last hidden states of the student are caught on their
    way to the loss; logits exist only for the tokens that count, a chunk at a time.
    """

    bytes_per_parameter = 4  # the teacher's own weights; with adapters it shares the frozen ones, and has next to none
    sharded = False  # the teacher is whole on each rank
    texts_only = True

    strength: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    _teacher: Any = field(default=None, init=False, repr=False)
    _hidden: Tensor | None = field(default=None, init=False, repr=False)

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        self._teacher = plain_model(copy.deepcopy(model, shared)).eval().requires_grad_(False)
        _require_plain_head(self._teacher)
        plain_model(model).base_model.register_forward_hook(self._catch)
        return model

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor | None:
        assert self._hidden is not None
        counts = inputs["labels"][:, 1:] != -100
        self._teacher.to(counts.device)
        with torch.no_grad():
            output = self._teacher.base_model(**{k: v for k, v in inputs.items() if k != "labels"})
        taught, learnt = output.last_hidden_state[:, :-1][counts], self._hidden[:, :-1][counts]
        self._hidden = None
        head = plain_model(model).get_output_embeddings()
        size = max(1, _LOGITS // self._teacher.config.get_text_config().vocab_size)
        gaps = [
            checkpoint(self._gap, head, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(learnt.split(size), taught.split(size), strict=True)
        ]
        return self.strength * torch.stack(gaps).sum()

    def _gap(self, head: nn.Module, learnt: Tensor, taught: Tensor) -> Tensor:
        """Return T^2 * KL, summed over tokens, of hidden states (token, width)."""
        with torch.no_grad():
            wanted = F.log_softmax(self._teacher.get_output_embeddings()(taught).float() / self.temperature, -1)
        found = F.log_softmax(head(learnt).float() / self.temperature, -1)
        return self.temperature**2 * F.kl_div(found, wanted, reduction="sum", log_target=True)

    def _catch(self, _: nn.Module, __: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._hidden = output.last_hidden_state


def _require_plain_head(model: Any) -> None:
    """Raise ValueError for logits beyond the head's output (caps, scales)."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        found = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits, found, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
        raise ValueError(f"distill cannot work with {type(model).__name__}, which caps or scales its logits")
