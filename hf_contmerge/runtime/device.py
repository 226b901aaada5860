"""Compute device and precision of this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def cpu_only() -> bool:
    """Return True without a GPU, or with ACCELERATE_USE_CPU set."""
    if not torch.accelerator.is_available():
        return True
    from accelerate.utils import parse_flag_from_env  # slow, and only for machines with a GPU

    return parse_flag_from_env("ACCELERATE_USE_CPU")


def free_memory() -> None:
    """Return the memory of dropped models to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bf16_pays(numel: int) -> bool:
    """Return True if bfloat16 suits `numel` parameters here.

    GPUs with bfloat16: always. Processors with bfloat16 units: from 5M parameters on; in smaller models, casts cost ten
    times their gain.
    """
    if torch.cuda.is_available() and not cpu_only():
        return torch.cuda.is_bf16_supported()
    return numel >= 5_000_000 and _has_bf16_units()


def _has_bf16_units() -> bool:
    """Return True if the processor multiplies in bfloat16."""
    asked = getattr(torch.cpu, "get_capabilities", None)
    if asked is None:  # an older torch, such as 2.9
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    features = asked()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 matrix products in float32.

    A program or a trainer (`tf32: true`) may have switched its process to TF32 or bfloat16, which have three digits.
    """
    backends: Any = torch.backends  # which type checkers know in part
    switches = backends.cuda.matmul, backends.mkldnn.matmul
    precisions = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision


def load_linear_algebra(device: torch.device) -> None:
    """Load CUDA's decompositions before threads do.

    torch loads them at the first call, and fails if two threads make it ("lazy wrapper should be called at most once").
    """
    if device.type == "cuda":
        torch.linalg.eigh(torch.ones(1, 1, device=device))
