"""QLoRA: a LoRA on a 4-bit copy, folded into the full model.

Dettmers et al., NeurIPS 2023, arXiv 2305.14314. Not tried by the project's own tests, which have no CUDA.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hf_contmerge.errors import ResourceError
from hf_contmerge.models.loading import runs_own_code
from hf_contmerge.models.lora.settings import CONFIG
from hf_contmerge.train_strategies.lora import Lora


@dataclass(init=False)
class Qlora(Lora):
    """W <- W + (alpha / r) B A, with B and A trained against 4-bit W.

    The model in float stays in main memory (4 bytes a parameter there), so that what is saved has its names and shapes.
    """

    bytes_per_parameter = 2
    sharded = False

    _float: Any

    def __init__(self, **config: Any) -> None:
        lacks = [
            *(["CUDA"] if not torch.cuda.is_available() else []),
            *(["the package bitsandbytes"] if not importlib.util.find_spec("bitsandbytes") else []),
        ]
        if lacks:
            raise ResourceError(
                f"train.strategy: qlora needs {' and '.join(lacks)}, which this machine lacks. Use `strategy: lora`, "
                "which is the same without quantising, or a machine with an NVIDIA GPU (pip install bitsandbytes)."
            )
        super().__init__(**config)

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        import peft

        if model.device.type == "meta":  # tried before a run, with nothing to quantise
            return super().open(model, memory)
        start = str(model.name_or_path)
        if (Path(start) / CONFIG).is_file():
            raise ValueError(f"{start}, where the stage starts, is an adapter: use `keep: true`, or lora")
        opened = super().open(model, memory)  # on the float model: its settings, and in later stages its values
        config, self._float = opened.peft_config["default"], opened
        bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )  # fmt: skip
        small = AutoModelForCausalLM.from_pretrained(
            start,
            quantization_config=bits,
            device_map={"": torch.cuda.current_device()},
            trust_remote_code=runs_own_code(model),
            use_safetensors=True,
        )
        trained = peft.PeftModel(peft.prepare_model_for_kbit_training(small), config)
        peft.set_peft_model_state_dict(trained, peft.get_peft_model_state_dict(opened))
        return trained

    def close(self, model: Any) -> PreTrainedModel:
        import peft

        peft.set_peft_model_state_dict(self._float, peft.get_peft_model_state_dict(model))
        return super().close(self._float)
