"""Random numbers of rules: equal everywhere, in any order."""

import hashlib

import torch
from torch import Tensor

from hf_contmerge.merge_rules import Weight


def uniform(seed: int, weight: Weight, like: Tensor) -> Tensor:
    """Return numbers in [0, 1) by seed, weight and stage."""
    digest = hashlib.sha256(f"{seed}/{weight.name}/{weight.stage}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(like.shape, generator=generator).to(like.device)
