"""What strategies say to each other across ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def is_main() -> bool:
    """Say whether this is the process that writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
