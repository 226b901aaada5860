"""Sums and roles across ranks, for strategies."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> Tensor:
    """Return the values of all ranks, perhaps of unequal counts."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = max(int(size) for size in sizes)
    padded = [torch.zeros(longest, dtype=values.dtype, device=values.device) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(values, (0, longest - len(values))))
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes, strict=True)])


def is_main() -> bool:
    """Say if this is the main process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
