"""Tiny LoRA adapters, as peft saves them."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model


def lora(base: Path, out: Path, *, seed: int, size: float = 0.05, **settings: Any) -> Path:
    """Save an adapter whose trainable tensors have all moved away from their start; return its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about tied tables
        config = LoraConfig(**{"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
                            | settings)  # fmt: skip
        model: Any = get_peft_model(whole(base, torch.float32), config)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=noise))
        model.save_pretrained(out)
    return out


def loaded(base: Path, adapter: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Return peft's model of a saved adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = whole(base, dtype)
        return PeftModel.from_pretrained(model, adapter, torch_device="cpu").eval()


def whole(base: Path, dtype: torch.dtype) -> Any:
    """Load a model as the class that saved it."""
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(base, dtype=dtype)
