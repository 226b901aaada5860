"""Writing what was trained as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_contmerge.models.folder import copy_companions
from hf_contmerge.runtime.files import remove
from hf_contmerge.train_strategies import Combined


def save_expert(trainer: Any, strategies: Combined, base: Path, out: Path) -> None:
    """Write what was trained to `out`; all ranks call this together."""
    accelerator = trainer.accelerator
    model, main = strategies.close(accelerator.unwrap_model(trainer.model)), accelerator.is_main_process
    state = None
    if trainer.is_fsdp_enabled:
        state = whole_state(model, keep=main)
    elif trainer.is_deepspeed_enabled:
        state = accelerator.get_state_dict(trainer.model)  # gathers
    if main:
        model.save_pretrained(out, state_dict=state)
        if strategies.carrier.keeps_adapter():
            remove(out / "README.md")  # peft's, with nothing filled in
        else:
            copy_companions(base, out, dtype=model.dtype)
    accelerator.wait_for_everyone()


def whole_state(model: Any, *, keep: bool) -> dict[str, Tensor]:
    """Return the weights of a model that is shared out (FSDP2), on the processor; all ranks call this together.

    `keep`: whether this rank wants them. Tied weights stay one tensor, so that they are saved once.
    """
    whole: dict[int, Tensor] = {}
    state = {}
    for name, part in model.state_dict().items():
        key = (part.to_local() if isinstance(part, DTensor) else part).data_ptr() or id(part)
        if key not in whole:
            value = part.full_tensor() if isinstance(part, DTensor) else part
            whole[key] = value.cpu() if keep else value.new_empty(0)
        state[name] = whole[key]
    return state if keep else {}
