"""Loads models, tokenizers and peft adapters: safetensors only, and code only with consent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.errors import ModelError
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.lora.settings import check_loadable


def load_model(folder: Path, base: Path, *, as_adapter: bool = False, **init: Any) -> Any:
    """Load a model for training or scoring.

    Args:
        folder: a whole model, or an adapter of the base.
        base: the pretrained model below an adapter.
        as_adapter: keep an adapter separate, for further training; else merge it into the base in memory.
        init: dtype and other arguments of `from_pretrained`.

    Returns:
        A PreTrainedModel with the base's tensor names; a PeftModel for an adapter kept separate.

    Raises:
        ModelError: the model needs code of its own, or the adapter is a pickle or names other code.
    """
    init = {"trust_remote_code": False, **init, "use_safetensors": True}
    whole = base if is_adapter(folder) else folder
    with code_by_consent(whole):
        model = AutoModelForCausalLM.from_pretrained(whole, **init)
    if whole == folder:
        return model
    from peft import PeftModel

    check_loadable(folder)
    opened = PeftModel.from_pretrained(model, str(folder), is_trainable=as_adapter, torch_device=str(model.device))
    if as_adapter:
        return opened
    merged = opened.merge_and_unload()
    merged.name_or_path = str(folder)
    return merged


def load_tokenizer(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer of a folder, or from the Hub. Raises ModelError if it needs code of its own."""
    with code_by_consent(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


@contextmanager
def code_by_consent(folder: Path | str) -> Iterator[None]:
    """Turn transformers' refusal of a model's own code into a ModelError."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{folder} needs Python code of its own (auto_map in its config), which runs only if you say so: read that "
            "code, then set `trust_remote_code: true` in the recipe and add `--trust-remote-code`."
        ) from error


def runs_own_code(model: Any) -> bool:
    """Say if a model in memory has code of its own, so that the user has trusted it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__module__.startswith("transformers_modules.")
