"""O-LoRA: a LoRA per stage, orthogonal to earlier ones.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023, arXiv
2310.14152.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication
from transformers import PreTrainedModel

from hf_contmerge.models.weights import write_tensors
from hf_contmerge.train_strategies import StageSize
from hf_contmerge.train_strategies._ranks import is_main
from hf_contmerge.train_strategies.lora import Lora, trained_a, whole

_FILE = "a.safetensors"


@dataclass(init=False)
class Olora(Lora):
    """loss + strength * sum |A_old A'|, over all old A's of a layer; W <- W + (alpha / r) B A, folded in.

    The sum of absolute values is that of the authors' program, and `strength` their lambda_1. Its gradient, strength *
    sign(A A_old') A_old, is added after clipping and before the optimizer; where the product is near zero the sign
    flips, so that it stays as far from zero as a step of the learning rate reaches. Memory: r rows of each A a stage.
    """

    strength: float
    _old: dict[str, Tensor]

    def __init__(self, *, strength: float = 0.5, **config: Any) -> None:
        if strength < 0:
            raise ValueError(f"olora's strength must not be negative; got {strength}")
        if "keep" in config:
            raise ValueError("olora folds each stage's LoRA into the model, so that it has no `keep`; lora has")
        super().__init__(**config)
        self.strength, self._old = strength, {}

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        self._old = load_file(memory / _FILE) if memory else {}
        opened = super().open(model, memory)
        for number, (name, a) in enumerate(trained_a(opened)):
            if name in self._old:  # all stages have one seed, with which A would start where the first stage's did
                draw = torch.Generator().manual_seed(torch.initial_seed() + 1000 * len(self._old[name]) + number)
                fresh = torch.empty(a.shape)
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=draw)  # as peft's
                a.data.copy_(fresh)
        return opened

    def adjust_gradients(self, model: nn.Module) -> None:
        for name, a in trained_a(model):
            if name in self._old and a.grad is not None:
                old = self._old[name] = self._old[name].to(a.device)
                with implicit_replication():  # under FSDP2 each rank has some rows of A, and all of the old ones
                    pull = torch.sign(a.detach().float() @ old.T) @ old
                    a.grad.add_(pull.to(a.grad.dtype), alpha=self.strength)

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        fresh = {name: whole(a) for name, a in trained_a(model)}
        kept = {n: torch.cat([self._old[n].cpu(), a]) if n in self._old else a for n, a in fresh.items()}
        if is_main():
            write_tensors(out / _FILE, kept)

    def memory_bytes(self, stage: StageSize) -> int:
        return 4 * stage.lora_a * stage.number
