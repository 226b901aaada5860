"""LoRA: train low-rank additions to the linear layers, and fold them in at the end.

Hu et al., ICLR 2022, arXiv 2106.09685.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_contmerge.train_strategies import TrainStrategy


@dataclass(init=False)
class Lora(TrainStrategy):
    """W <- W + (alpha / r) B A. Parameters: any field of peft's LoraConfig, by its own name."""

    carrier = True
    bytes_per_parameter = 5

    config: dict[str, Any]

    def __init__(self, **config: Any) -> None:
        from peft import LoraConfig

        chosen = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
        LoraConfig(**chosen)  # says at once what it does not know
        self.config = chosen

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(**self.config))

    def close(self, model: Any) -> PreTrainedModel:
        return model.merge_and_unload()
