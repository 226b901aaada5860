"""An lm-eval model on vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.vllm_causallms import VLLM

from hf_contmerge.run.recipe.parts import Evaluate
from hf_contmerge.scoring._texts import TextTokens

_ALL = 2**30
"""Larger than the number of requests of any task."""
_Parent: Any = VLLM  # its registration hides its type


class TextVLLM(TextTokens, _Parent):
    """VLLM with the tokens of training."""

    unused = 2  # it generates a token after each window

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each prompt."""
        return super().generate_until(self.with_examples(requests), disable_tqdm)


def load_vllm(folder: Path, dtype: str, evaluate: Evaluate) -> Any:
    """Load a model in vLLM, wrapped for lm-eval."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    gpus = max(1, torch.cuda.device_count())
    # vLLM forms batches itself. lm-eval's "auto" adds a progress bar; with bars off, vLLM divides by its time, 0.
    batch_size = _ALL if evaluate.batch_size == "auto" else evaluate.batch_size
    return TextVLLM(
        pretrained=str(folder), dtype=dtype, batch_size=batch_size,
        max_model_len=evaluate.max_length, tensor_parallel_size=gpus if evaluate.parallel == "tensor" else 1,
        gpu_memory_utilization=0.2 if current_platform.is_cpu() else 0.9,  # other processes use main memory too
    )  # fmt: skip
