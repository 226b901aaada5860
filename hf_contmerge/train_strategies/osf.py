"""OSF: train the span of small singular values, keep the large.

Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv 2504.07097, by
peft's OSFConfig. Each stage decomposes the weights that it starts from anew, and folds its change in at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_contmerge.train_strategies import TrainStrategy

_NAME = "default"  # peft's, of the only adapter


@dataclass
class Osf(TrainStrategy):
    """W = U_high S_high V_high + U_low S_low V_low; the low part is trained, U_low off U_high and V_low off V_high.

    peft projects the gradients, U_low -= U_high U_high' dU. Adam divides each element by a moment of its own, which
    turns the step out of the subspace again, so `project` does the same to U_low and V_low after each step. (Weight
    decay shrinks them, and stays inside.) That costs two thin products for each factor.

    Memory, for a square weight of which half the rank is kept: the weight, both factors of the low part with gradients
    and moments, and their start. It grows with the share that is trained: 40 bytes where a tenth is kept.
    """

    carrier = True
    bytes_per_parameter = 24
    sharded = False  # the frozen factors are found from whole weights

    effective_rank: int | float = 0.5
    """How many singular directions of each weight are kept, or which share of them."""
    target_modules: str | list[str] = "all-linear"
    project: bool = True

    def __post_init__(self) -> None:
        rank = self.effective_rank
        if not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
            raise ValueError(
                f"osf's effective_rank must be a number of directions from 1 on, or a share between 0 and 1; got {rank}"
            )

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        from peft import OSFConfig, get_peft_model

        config = OSFConfig(
            task_type="CAUSAL_LM", effective_rank=self.effective_rank, target_modules=self.target_modules
        )
        return get_peft_model(model, config)

    def adjust_weights(self, model: nn.Module) -> None:
        if self.project:
            for layer in osf_layers(model):
                low = layer.osf_svd_params[_NAME]
                low["U_low"].copy_(_off(low["U_low"], layer._osf_U_high, layer._osf_U_low_init))
                low["V_low"].copy_(_off(low["V_low"].T, _turned(layer._osf_V_high), _turned(layer._osf_V_low_init)).T)

    def close(self, model: Any) -> PreTrainedModel:
        return model.merge_and_unload()


def osf_layers(model: nn.Module) -> Iterator[Any]:
    """Yield peft's OSF layers of a model."""
    from peft.tuners.osf import OSFLayer

    return (module for module in model.modules() if isinstance(module, OSFLayer))


def _off(low: Tensor, high: Any, start: Any) -> Tensor:
    """Return `low` (d, r) without its components along `high`.

    Where the low and the high part are all of the space, peft keeps no `high`: what is along `start` is the rest.
    """
    if _NAME in high:
        return low - high[_NAME] @ (high[_NAME].T @ low)
    return start[_NAME] @ (start[_NAME].T @ low)


def _turned(buffers: Any) -> dict[str, Tensor]:
    return {name: buffer.T for name, buffer in buffers.items()}
