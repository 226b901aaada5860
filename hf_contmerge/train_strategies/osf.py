"""OSF: train the span of small singular values, keep the large.

Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv 2504.07097, by
peft's OSFConfig. Each stage decomposes the weights that it starts from anew, and folds its change in at the end.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_contmerge.models.loading import fold_adapter, plain_model
from hf_contmerge.models.weights import write_tensors
from hf_contmerge.train_strategies import Likelihoods, TrainStrategy
from hf_contmerge.train_strategies._ranks import is_main, sum_over_ranks

LOG = logging.getLogger(__name__)

_NAME = "default"  # peft's, of the only adapter
_FILE = "importance.safetensors"
_HIGHEST_RATE = 5e-5
_LARGEST_SHARE = 0.95
_EXAMPLES = 32
"""How many of a stage's examples the layers' importance is measured on."""


@dataclass
class Osf(TrainStrategy):
    """W = U_high S_high V_high + U_low S_low V_low; the low part is trained, U_low off U_high and V_low off V_high.

    peft projects the gradients, U_low -= U_high U_high' dU. Adam divides each element by a moment of its own, which
    turns the step out of the subspace again, so `project` does the same to U_low and V_low after each step, as the
    authors' mini_trainer does. (Weight decay shrinks them, and stays inside.) That costs two thin products for each
    factor. Embeddings, norms and the head stay unchanged; mini_trainer trains them.

    Stage t keeps the share effective_rank + growth * (t - 1), at most 0.95. Without growth, the next stage is free to
    overwrite what earlier ones put into the low part. With `adaptive`, each layer keeps mrr + I * (trr - mrr) in place
    of effective_rank. I is its importance, |mean over tokens of cos(x, W x)|, divided by its mean over the layers; the
    longer vector is cut to the other's length. Each stage measures it for the next one, after its training. A stage
    without one before keeps effective_rank: the first, and all that start from the base.

    Memory, for a square weight of which half the rank is kept: the weight, both factors of the low part with gradients
    and moments, and their start. It grows with the share that is trained: 40 bytes where a tenth is kept.
    """

    carrier = True
    bytes_per_parameter = 24
    sharded = False  # the frozen factors are found from whole weights
    opens_on_meta = True
    turn = 1

    effective_rank: int | float = 0.5
    """How many singular directions of each weight are kept, or which share of them."""
    target_modules: str | list[str] = "all-linear"
    project: bool = True
    growth: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share added by each stage after the first."""
    adaptive: bool = False
    """Whether layers keep different shares, by their importance to the stage before."""
    mrr: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The paper's minimum retention ratio: of a layer without importance."""
    trr: Annotated[float, Field(ge=0, le=1)] = 0.8
    """The paper's target retention ratio: of a layer of mean importance."""
    _importance: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        rank = self.effective_rank
        if not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
            raise ValueError(
                f"osf's effective_rank must be a number of directions from 1 on, or a share between 0 and 1; got {rank}"
            )
        if self.mrr > self.trr:
            raise ValueError(f"osf's mrr must not be larger than its trr; got {self.mrr} and {self.trr}")
        self.texts_only = self.adaptive  # pyright: ignore[reportAttributeAccessIssue]

    def warn_of_rate(self, rate: float) -> str | None:
        if rate <= _HIGHEST_RATE:
            return None
        return (
            "osf moves singular vectors, whose entries are small: a step goes up to three times as far as in full "
            f"fine-tuning, and ruins the model. Use 1e-5 to {_HIGHEST_RATE:g}, and keep 0.7 to 0.8 (effective_rank)"
        )

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        from peft import OSFConfig, get_peft_model

        importance = load_file(memory / _FILE) if self.adaptive and memory else {}
        shares = adaptive_shares({name: float(value) for name, value in importance.items()}, self.mrr, self.trr)
        linear = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
        kept = {name: self.kept(min(layer.weight.shape), shares.get(name)) for name, layer in linear}
        config = OSFConfig(
            task_type="CAUSAL_LM",
            target_modules=self.target_modules,
            rank_pattern={f"^{re.escape(name)}$": rank for name, rank in kept.items()},
        )
        with warnings.catch_warnings():  # ranks of layers that target_modules leaves out
            warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
            opened = get_peft_model(model, config)
        free = [layer.osf_svd_params[_NAME]["U_low"].shape[1] for layer in osf_layers(opened)]
        if not free:
            raise ValueError("osf finds no linear layer that peft can decompose; GPT-2's Conv1D is none to it")
        if not any(free):
            raise ValueError(f"osf keeps all directions of all layers, at effective_rank {self.effective_rank}")
        return opened

    def kept(self, size: int, share: float | None = None) -> int:
        """Return the number of directions kept of a layer's `size`.

        `share`: by its importance; None for effective_rank.
        """
        rank = self.effective_rank
        first = share * size if share is not None else rank if isinstance(rank, int) else rank * size
        grown = min(first + self.growth * (self.stage - 1) * size, max(first, _LARGEST_SHARE * size))
        return min(max(round(grown), 1), size - 1) if share is not None else min(int(grown + 1e-9), size)

    def review(self, model: nn.Module, likelihoods: Likelihoods) -> None:
        if self.adaptive:
            with _listening(model) as sums, torch.no_grad():
                for _ in likelihoods(_EXAMPLES):
                    pass
            total, tokens = sum_over_ranks(torch.stack(list(sums.values()))).cpu().unbind(1)
            self._importance = dict(zip(sums, (total / tokens.clamp(min=1)).abs(), strict=True))

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        if self._importance and is_main():
            write_tensors(out / _FILE, {name: value.clone() for name, value in self._importance.items()})

    def adjust_weights(self, model: nn.Module) -> None:
        if self.project:
            for layer in osf_layers(model):
                low = layer.osf_svd_params[_NAME]
                low["U_low"].copy_(_off(low["U_low"], layer._osf_U_high, layer._osf_U_low_init))
                low["V_low"].copy_(_off(low["V_low"].T, _turned(layer._osf_V_high), _turned(layer._osf_V_low_init)).T)

    def close(self, model: Any) -> PreTrainedModel:
        plain, self.kept_by_rounding = fold_adapter(model)
        return plain


def osf_layers(model: nn.Module) -> Iterator[Any]:
    """Yield peft's OSF layers of a model."""
    from peft.tuners.osf import OSFLayer

    return (module for module in model.modules() if isinstance(module, OSFLayer))


def adaptive_shares(importance: Mapping[str, float], mrr: float, trr: float) -> dict[str, float]:
    """Return each layer's share to keep; {} if none stands out."""
    mean = fmean(importance.values()) if importance else 0.0
    if importance and mean < 1e-6:
        LOG.warning("osf: no layer's importance is above zero, so that all keep the share effective_rank")
    return {name: mrr + value / mean * (trr - mrr) for name, value in importance.items()} if mean >= 1e-6 else {}


@contextmanager
def _listening(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Add up each layer's cosines of input and output, and tokens."""
    layers, inside = set(osf_layers(model)), plain_model(model)
    named = {name: layer for name, layer in inside.named_modules() if layer in layers}
    sums = {name: torch.zeros(2, device=layer.base_layer.weight.device) for name, layer in named.items()}

    def listen(name: str) -> Any:
        def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            bias = layer.base_layer.bias
            cosines = cosine(inputs[0], output if bias is None else output - bias)
            sums[name] += torch.stack([cosines.sum(), cosines.new_tensor(cosines.numel())])

        return note

    handles = [layer.register_forward_hook(listen(name)) for name, layer in named.items()]
    yield sums
    for handle in handles:
        handle.remove()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return cos(x, y) of each token; the longer vectors are cut."""
    size = min(x.shape[-1], y.shape[-1])
    return F.cosine_similarity(x[..., :size].float(), y[..., :size].float(), dim=-1)


def _off(low: Tensor, high: Any, start: Any) -> Tensor:
    """Return `low` (d, r) without its components along `high`.

    Where the low and the high part are all of the space, peft keeps no `high`: what is along `start` is the rest.
    """
    if _NAME in high:
        return low - high[_NAME] @ (high[_NAME].T @ low)
    return start[_NAME] @ (start[_NAME].T @ low)


def _turned(buffers: Any) -> dict[str, Tensor]:
    return {name: buffer.T for name, buffer in buffers.items()}
