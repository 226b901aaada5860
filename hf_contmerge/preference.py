"""Preference pairs: direct preference optimisation through TRL's DPOTrainer.

Rafailov et al., NeurIPS 2023, arXiv 2305.18290.
The model that the stage starts from is the reference. Under LoRA, TRL keeps a frozen copy of the adapter for it, which
goes when training ends; else a second model of the same size is held, in the dtype of the first.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hf_contmerge.corpus_forms import Form
from hf_contmerge.loaded_model import load_model

_REFERENCE = "ref"  # TRL's name of the copy


def trl_classes(form: Form) -> tuple[type, type]:
    """Return TRL's trainer for examples of a form, and its config."""
    if form == "preference":
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        return DPOTrainer, DPOConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    return SFTTrainer, SFTConfig


def config_fields(form: Form) -> dict[str, Any]:
    """Return the fields of the config for examples of a form, with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(trl_classes(form)[1])}


def reference_model(form: Form, opened: Any, start: Path, base: Path, **init: Any) -> dict[str, Any]:
    """Return the argument of the trainer that says what the reference is, or none where none is needed.

    Args:
        form: of the examples.
        opened: what is trained.
        start: the model that the stage starts from, or an adapter of the base.
        base: the pretrained model.
        init: as `load_model` takes it.
    """
    from peft import LoraConfig, PeftModel

    if form != "preference":
        return {}
    if isinstance(opened, PeftModel) and isinstance(opened.peft_config["default"], LoraConfig):
        return {}
    return {"ref_model": load_model(start, base, **init)}


def drop_reference(model: Any) -> None:
    """Remove the adapter that TRL has added to be the reference, before the model is looked at or saved."""
    if _REFERENCE in getattr(model, "peft_config", {}):
        model.delete_adapter(_REFERENCE)
