"""Writes trained models as model folders."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.models.folder import copy_companions
from hf_contmerge.models.survival import Kept, Survival
from hf_contmerge.models.tokenizer import TokenizerChange, copy_tokenizer
from hf_contmerge.models.weights import main_dtype
from hf_contmerge.run.places import Place
from hf_contmerge.runtime.files import remove
from hf_contmerge.runtime.ranks import Ranks
from hf_contmerge.train_strategies import Combined

LOG = logging.getLogger(__name__)


def save_expert(trainer: Any, strategies: Combined, base: Path, out: Path, change: TokenizerChange) -> dict[str, Any]:
    """Write a trainer's model to `out`, on all ranks.

    Returns:
        For the record: dtypes of training and file, and what the file keeps where it was rounded.
    """
    accelerator = trainer.accelerator
    trained = trained_dtype(accelerator.unwrap_model(trainer.model))
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
            if change:
                copy_tokenizer(base, out)
        else:
            copy_companions(base, out, dtype=model.dtype)
        change.write(out)
    accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled and trained.itemsize == 2:
        LOG.warning("DeepSpeed hands out %s for its float32 weights; what that drops is not measured.", trained)
    return {"trained_in": _word(trained), **_stored(model, strategies.carrier.kept_by_rounding)}


def trained_dtype(model: Any) -> torch.dtype:
    """Return the dtype of most trained weights."""
    return main_dtype((name, p.shape, p.dtype) for name, p in model.named_parameters() if p.requires_grad)


def _stored(model: Any, kept: Mapping[str, Kept] | None) -> dict[str, Any]:
    """Return the survival of an expert's update in rounded files."""
    if not kept:
        return {}
    weights = [(name, p.shape, p.dtype) for name, p in model.named_parameters()]
    if overflown := [name for name, each in kept.items() if not each.finite]:
        raise ModelError(
            f"{overflown[0]}: trained values do not fit {_word(main_dtype(weights))}, or training has diverged. "
            "Use float32 weights (no `model_init_kwargs.dtype`), or a lower learning rate. No expert was written."
        )
    nbytes = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in weights)
    survival = Survival.of(kept, main_dtype(weights), "stochastic", nbytes)
    survival.warn("expert")
    return {"stored": survival.to_json()}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def whole_state(model: Any, *, keep: bool) -> dict[str, Tensor]:
    """Return an FSDP2 model's whole weights on the CPU; collective.

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


def write_expert(place: Place, model: Any, processing: Any, base: Path, ranks: Ranks) -> Path:
    """Write a model in memory to a place's `expert`; collective.

    Args:
        place: gets the folder.
        model: a whole model, or a PeftModel, of which the active adapter is written.
        processing: its tokenizer or processor; the base's files are copied where it has none.
        base: the pretrained model.
        ranks: of the job.
    """
    scratch = ranks.first(place.scratch, "expert")
    if hasattr(model, "peft_config"):
        written = write_adapter(model, scratch, ranks)
        if written != scratch:
            ranks.first(_lift, written, scratch)
        if hasattr(processing, "save_pretrained"):
            ranks.first(processing.save_pretrained, scratch)
    else:
        _write_model(model, processing, base, scratch, ranks)
    return ranks.first(place.publish, "expert")


def _write_model(model: Any, processing: Any, base: Path, folder: Path, ranks: Ranks) -> None:
    state = _whole_if_shared(model, ranks)

    def write() -> None:
        model.save_pretrained(folder, state_dict=state)
        if hasattr(processing, "save_pretrained"):
            processing.save_pretrained(folder)
        else:
            copy_companions(base, folder, dtype=model.dtype)

    ranks.first(write)


def write_adapter(model: Any, folder: Path, ranks: Ranks) -> Path:
    """Write the active adapter; return its folder, a subfolder for named ones."""
    state, name = _whole_if_shared(model, ranks), model.active_adapter
    ranks.first(lambda: model.save_pretrained(folder, state_dict=state, selected_adapters=[name]))
    return folder if name == "default" else folder / name


def _lift(inner: Path, folder: Path) -> None:
    """Move the files of a subfolder into its parent."""
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


def _whole_if_shared(model: Any, ranks: Ranks) -> dict[str, Tensor] | None:
    """Return an FSDP2 model's whole weights; None for an unsharded one."""
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        return whole_state(model, keep=ranks.is_main)
    return None


def refuse_shared_weights() -> None:
    """Raise RecipeError where no rank can put the whole weights together."""
    shared = AcceleratorState._shared_state  # to make an AcceleratorState resets what it says of FSDP (accelerate 1.15)
    kind = shared.get("distributed_type", DistributedType.NO)
    version = getattr(shared.get("fsdp_plugin"), "fsdp_version", 2)
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and version < 2
    ):
        name = "FSDP1" if kind == DistributedType.FSDP else kind.value
        raise RecipeError(
            f"{name} keeps the weights to itself while it trains, so that they cannot be merged here. Launch with "
            "FSDP2 or DDP; or train without this callback, save the model, and give its folder to merge_stage."
        )
