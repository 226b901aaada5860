"""EWC: elastic weight consolidation, with one running importance of each weight.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796; running as in
Schwarz et al., "Progress & Compress", ICML 2018, arXiv 1805.06370. MAS: Aljundi et al., "Memory Aware Synapses", ECCV
2018, arXiv 1711.09601.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_contmerge.models.weights import write_tensors
from hf_contmerge.train_strategies import Likelihoods, StageSize, TrainStrategy
from hf_contmerge.train_strategies._ranks import is_main, sum_over_ranks
from hf_contmerge.train_strategies._weights import Start, trained

_FILE = "fisher.safetensors"
_TOKENS = 256


@dataclass
class Ewc(TrainStrategy):
    """loss + (strength / 2) * sum F * (w - w*)^2, with w* the weights at the stage's start; none in the first stage.

    After stage t, F <- gamma * F + F_t, where F_t is the square of the gradient of one example's log likelihood (by the
    labels of the data: the empirical Fisher), summed over a seeded sample and divided by the sample's tokens: of a
    token, as the loss is. In theory strength 1 weighs old and new tokens alike; but the gradients of what has just been
    learnt are so small that it takes thousands to be felt.

    With `importance: mas`, F_t is |gradient of an example's sum of mean squared logits|, over the same sample and
    divided by all of its tokens: how much a weight matters to the outputs, right or wrong. The paper's strength is 1.
    """

    carriers = ("full",)
    bytes_per_parameter = 8
    sharded = False
    texts_only = True

    strength: Annotated[float, Field(ge=0)] = 1000.0
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    examples: Annotated[int, Field(ge=1)] = 128
    """How many of the stage's examples F_t is measured on, each by a forward and a backward pass."""
    importance: Literal["fisher", "mas"] = "fisher"
    _fisher: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _start: Start | None = field(default=None, init=False, repr=False)

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        if memory:
            self._fisher = load_file(memory / _FILE)
            self._start = Start(model, self._fisher.__contains__)
            _require_same({n: tuple(w.shape) for n, w in trained(model)}, self._fisher, memory / _FILE)
        return model

    def adjust_gradients(self, model: nn.Module) -> None:
        if not self._start:
            return
        for name, weight, moved in self._start.moved(model):
            assert weight.grad is not None
            fisher = self._fisher[name] = self._fisher[name].to(weight.device)
            weight.grad.addcmul_(fisher, moved, value=self.strength)

    def review(self, model: nn.Module, likelihoods: Likelihoods) -> None:
        self._start = None  # its memory is needed now
        weights = dict(trained(model))
        sums, tokens = {n: torch.zeros_like(w) for n, w in weights.items()}, 0
        fisher = self.importance == "fisher"
        for measured, count in likelihoods(self.examples) if fisher else self._sizes(model, likelihoods):
            gradients = torch.autograd.grad(measured, list(weights.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.addcmul_(gradient, gradient if fisher else gradient.sign())
            tokens += count
        device = next(iter(weights.values())).device
        tokens = sum_over_ranks(torch.tensor(float(tokens), device=device)).clamp(min=1)
        for name, total in sums.items():
            fresh = sum_over_ranks(total) / tokens
            old = self._fisher.get(name)
            self._fisher[name] = fresh if old is None else fresh.add_(old.to(device), alpha=self.gamma)

    def _sizes(self, model: Any, likelihoods: Likelihoods) -> Iterator[tuple[Tensor, int]]:
        """Yield each example's sum of mean squared logits, and its tokens."""
        hidden: list[Tensor] = []
        watched = model.base_model.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state[0]))
        try:
            for _ in likelihoods(self.examples):
                states = hidden.pop()
                yield size_of(model.get_output_embeddings(), states), len(states)
        finally:
            watched.remove()

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        if is_main():
            write_tensors(out / _FILE, self._fisher)

    def memory_bytes(self, stage: StageSize) -> int:
        return 4 * stage.trained


def size_of(head: nn.Module, hidden: Tensor) -> Tensor:
    """Return the mean squared logits of hidden states, summed over tokens."""

    def size(part: Tensor) -> Tensor:
        return head(part).float().square().mean(-1).sum()

    parts = hidden.split(_TOKENS)  # logits of all tokens would not fit
    return torch.stack([checkpoint(size, part, use_reentrant=False, preserve_rng_state=False) for part in parts]).sum()


def _require_same(shapes: dict[str, tuple[int, ...]], fisher: dict[str, Tensor], path: Path) -> None:
    for name, shape in shapes.items():
        found = tuple(fisher[name].shape) if name in fisher else "nothing"
        if found != shape:
            raise ValueError(f"{path} has {found} for {name}, and the model {shape}; train the earlier stages again")
