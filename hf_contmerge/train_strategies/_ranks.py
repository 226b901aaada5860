"""Sums and roles across ranks, for strategies."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def is_main() -> bool:
    """Say if this is the main process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
