"""Compute device and precision of this process."""

from __future__ import annotations

import os

import torch


def cpu_only() -> bool:
    """Return True without a GPU, or with ACCELERATE_USE_CPU set."""
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def bf16_pays(numel: int) -> bool:
    """Return True if bfloat16 suits `numel` parameters here.

    GPUs with bfloat16: always. Processors with bfloat16 units: from 5M parameters on; in smaller models, casts cost ten
    times their gain.
    """
    if torch.cuda.is_available() and not cpu_only():
        return torch.cuda.is_bf16_supported()
    features = torch.cpu.get_capabilities()
    return numel >= 5_000_000 and bool(features.get("avx512_bf16") or features.get("amx_bf16"))
