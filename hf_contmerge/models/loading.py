"""Loads whole models and peft adapters for training and scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from hf_contmerge.models.folder import is_adapter


def load_model(folder: Path, base: Path, *, as_adapter: bool = False, **init: Any) -> Any:
    """Load a model for training or scoring.

    Args:
        folder: a whole model, or an adapter of the base.
        base: the pretrained model below an adapter.
        as_adapter: keep an adapter separate, for further training; else merge it into the base in memory.
        init: dtype and other arguments of `from_pretrained`.

    Returns:
        A PreTrainedModel with the base's tensor names; a PeftModel for an adapter kept separate.
    """
    if not is_adapter(folder):
        return AutoModelForCausalLM.from_pretrained(folder, **init)
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, **init)
    opened = PeftModel.from_pretrained(model, str(folder), is_trainable=as_adapter, torch_device=str(model.device))
    if as_adapter:
        return opened
    merged = opened.merge_and_unload()
    merged.name_or_path = str(folder)
    return merged


def runs_own_code(model: Any) -> bool:
    """Say if a model in memory has custom code: it is trusted."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__module__.startswith("transformers_modules.")
