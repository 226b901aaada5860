"""SLAO: a LoRA in the directions of the last one.

Qiao and Mahdavi, "Merge before Forget: A Single LoRA Continual Learning via Continual Merging", arXiv 2512.23017.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_contmerge.models.weights import write_tensors
from hf_contmerge.train_strategies import StageSize
from hf_contmerge.train_strategies._ranks import is_main
from hf_contmerge.train_strategies.lora import Lora, trained_a, whole

_FILE = "a.safetensors"


@dataclass(init=False)
class Slao(Lora):
    """A = Q', where Q R = A_last' with a positive diagonal of R, and B = 0: the model starts unchanged.

    A_last is the A (r, in) that the stage before has ended with. In the first stage, an ordinary LoRA. Folded in at the
    end, so that what the paper carries on in B is in the weights that the next stage starts from.
    """

    def __init__(self, **config: Any) -> None:
        if "keep" in config:
            raise ValueError("slao folds each stage's LoRA into the model, so that it has no `keep`; lora has")
        super().__init__(**config)

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        opened = super().open(model, memory)
        last = load_file(memory / _FILE) if memory else {}
        for name, a in trained_a(opened):
            if name in last and a.shape[0] <= a.shape[1]:
                with torch.no_grad():
                    a.copy_(orthonormal_rows(last[name]))
        return opened

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        last = {name: whole(a) for name, a in trained_a(model)}
        if is_main():
            write_tensors(out / _FILE, last)

    def memory_bytes(self, stage: StageSize) -> int:
        return 4 * stage.lora_a


def orthonormal_rows(a: Tensor) -> Tensor:
    """Return the row basis of A (r, n), with fixed signs."""
    q, r = torch.linalg.qr(a.double().T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.to(a.dtype)
