"""Models out of expert folders, whichever kind they are of: a whole model, or a peft adapter of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from hf_contmerge.models.folder import is_adapter


def load_model(folder: Path, base: Path, *, as_adapter: bool = False, **init: Any) -> Any:
    """Load a model for training or scoring.

    Args:
        folder: a whole model, or an adapter of the base.
        base: the pretrained model, which an adapter is loaded onto.
        as_adapter: leave an adapter as it is, to go on training it; else it is merged in, in memory.
        init: dtype and whatever else `from_pretrained` takes.

    Returns:
        A PreTrainedModel with the base's tensor names; or, of an adapter that is left as it is, a PeftModel.
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
