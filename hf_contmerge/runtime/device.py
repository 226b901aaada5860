"""Whether this process computes on a processor or a GPU, and in which precision."""

from __future__ import annotations

import os

import torch


def cpu_only() -> bool:
    """Say whether to compute on the processor: there is nothing else, or ACCELERATE_USE_CPU asks for it."""
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def bf16_pays(numel: int) -> bool:
    """Say whether bfloat16 arithmetic is right for a model of `numel` parameters on this machine.

    GPUs that have it: always. Processors with bfloat16 units: from 5M parameters on; below, the casts cost ten times
    what they save.
    """
    if torch.cuda.is_available() and not cpu_only():
        return torch.cuda.is_bf16_supported()
    features = torch.cpu.get_capabilities()
    return numel >= 5_000_000 and bool(features.get("avx512_bf16") or features.get("amx_bf16"))
