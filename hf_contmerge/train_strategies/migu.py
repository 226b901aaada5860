"""MIGU: magnitude-based gradient updates of the rows with large outputs.

Du et al., "Unlocking Continual Learning Abilities in Language Models", EMNLP 2024 Findings, arXiv 2406.17245.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_contmerge.models.loading import plain_model
from hf_contmerge.train_strategies import TrainStrategy
from hf_contmerge.train_strategies._ranks import sum_over_ranks
from hf_contmerge.train_strategies._weights import laid_out_like


@dataclass
class Migu(TrainStrategy):
    """grad W_i <- grad W_i if n_i is among the largest of its layer, else 0;  n_i = mean |h_i| / sum_j |h_j|.

    h is what a layer says of one token: W x of a linear layer; A x for the A of a LoRA, and for its B the output of the
    whole adapted layer, W x + (alpha / r) B A x, because B x is zero at first. The mean is over all tokens of an
    optimizer step, on all ranks. The share `fraction` of each layer's rows gets its gradient; a layer without outputs
    in a step keeps it all. The rest of the model, the head included, is trained as ever. Adam's momentum moves a row on
    for some steps after it was last chosen, and weight decay moves all rows; a row never chosen stays as it is if
    `weight_decay` is 0.
    """

    carriers = ("full", "lora", "qlora", "olora", "slao")  # osf trains factors whose rows are no outputs
    opens_on_meta = True
    turn = 1

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.3
    _sums: dict[nn.Linear, Tensor] = field(default_factory=dict, init=False, repr=False)
    _counts: Tensor | None = field(default=None, init=False, repr=False)
    """Whether a token is no padding, of a micro-batch; None where all are none."""

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        for layer, watched in _watched(model):
            self._sums[layer] = torch.zeros(layer.out_features)
            watched.register_forward_hook(partial(self._note, layer))
        if not self._sums:
            raise ValueError("migu finds no linear layer that is trained")
        plain_model(model).base_model.register_forward_pre_hook(self._note_padding, with_kwargs=True)
        return model

    def adjust_gradients(self, model: nn.Module) -> None:
        device = next(model.parameters()).device  # layers that were not called have their first zeros, on the CPU
        sums = sum_over_ranks(torch.cat([own.to(device) for own in self._sums.values()]))
        for layer, own in zip(self._sums, sums.split([len(s) for s in self._sums.values()]), strict=True):
            self._sums[layer] = torch.zeros_like(own)
            if own.any():
                chosen = own.topk(max(1, round(self.fraction * len(own)))).indices
                _mask(layer, torch.zeros_like(own).index_fill_(0, chosen, 1))

    def _note_padding(self, _: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        self._counts = _real_tokens(inputs)

    def _note(self, layer: nn.Linear, watched: nn.Module, _: Any, output: Tensor) -> None:
        """Add up outputs (..., token, row) without padding, for a layer's mask."""
        if not (watched.training and torch.is_grad_enabled()):
            return
        size = output.detach().float().abs()
        size /= size.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        size = size.flatten(0, -2)  # as mixtures of experts flatten the tokens for some of their layers
        if self._counts is not None and self._counts.numel() == len(size):
            size *= self._counts.reshape(-1, 1)
        self._sums[layer] = self._sums[layer].to(size.device) + size.sum(0)


def _real_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Say of each token of a micro-batch if it is no padding.

    TRL gives blocks no mask: the positions of what fills them up are zeros at the end.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None or positions is None:
        return mask
    return positions.flip(-1).cumsum(-1).flip(-1) > 0


def _watched(model: PreTrainedModel) -> Iterator[tuple[nn.Linear, nn.Module]]:
    """Yield each layer to mask, and the module to choose its rows."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    adapted = {
        b: layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
        for b in layer.lora_B.values()
    }
    head = model.get_output_embeddings()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and layer is not head:
            yield layer, adapted.get(layer, layer)


def _mask(layer: nn.Linear, mask: Tensor) -> None:
    """Multiply the gradients of a layer's rows."""
    for weight in layer.parameters(recurse=False):
        if weight.grad is not None:
            weight.grad.mul_(laid_out_like(weight.grad, mask.view(-1, *[1] * (weight.dim() - 1))))
