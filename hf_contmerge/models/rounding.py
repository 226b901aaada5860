"""Rounds weights to 16 bits.

A bfloat16 weight has 8 significant bits. The update of a usual learning rate is smaller than half their last one, so
that rounding to the nearest value gives back the base. Stochastic rounding takes the value above or below, each with
the probability that makes the mean exact. The random bits follow from the tensor's name and the element's position:
the same bytes for any number of pieces, threads, ranks and devices.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_contmerge.models.survival import Kept

Rounding = Literal["stochastic", "nearest"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

_HALF = {torch.bfloat16: (16, 2.0**128), torch.float16: (13, 2.0**16)}
"""Bits that a float32 number loses, and the least number that the nearest value of cannot be finite."""
_LEAST_NORMAL = 2.0**-14  # of float16; below, its values are 2**-24 apart


def rounded(exact: Tensor, dtype: torch.dtype, *, name: str, start: int = 0, by: Rounding = "stochastic") -> Tensor:
    """Return float32 values in another dtype.

    Values of the dtype stay as they are. Finite values that lie next to its largest one do not become infinite.

    Args:
        exact: float32 values.
        dtype: the dtype of the result.
        name: the tensor's stored name.
        start: the place of the first element in the flat tensor.
        by: how 16-bit values are chosen.
    """
    if by == "nearest" or dtype not in _HALF or not exact.numel():
        return exact.to(dtype)
    dropped, too_large = _HALF[dtype]
    flat, top = exact.reshape(-1), torch.finfo(dtype).max
    noise = _noise(name, start, flat.numel(), flat.device)
    low, high = (float(x) for x in flat.aminmax())
    if -top <= low and high <= top:  # false for NaN
        return _drawn(flat, noise, dropped).reshape(exact.shape)
    drawn = _drawn(flat.nan_to_num().clamp(-top, top), noise, dropped)
    return torch.where(flat.abs() < too_large, drawn, flat.to(dtype)).reshape(exact.shape)


def _drawn(flat: Tensor, noise: Tensor, dropped: int) -> Tensor:
    """Round finite values in range by 16 random bits for each."""
    bits, added = flat.view(torch.int32), noise.to(torch.int32).bitwise_and_(2**dropped - 1)
    if dropped == 16:
        return added.add_(bits).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    normal = added.add_(bits).bitwise_and_(-(2**dropped)).view(torch.float32)
    steps = flat.abs() * 2.0**24
    whole = steps.floor()
    small = whole + (steps - whole > (noise.to(torch.int32).bitwise_and_(0xFFFF) + 0.5) / 2.0**16)
    small = torch.copysign(small * 2.0**-24, flat)
    return torch.where(flat.abs() < _LEAST_NORMAL, small, normal).half()


def _noise(name: str, start: int, count: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each of a tensor's elements.

    Four elements share a number of SplitMix64, seeded by the name.
    """
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
    first = start // 4
    x = torch.arange(first, (start + count + 3) // 4, dtype=torch.int64, device=device)
    x.mul_(_signed(0x9E3779B97F4A7C15)).add_(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(_signed(factor))
    x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))
    return x.view(torch.int16)[start - 4 * first :][:count]


def _signed(number: int) -> int:
    return number - 2**64


def square(tensor: Tensor) -> float:
    """Return the sum of squares in float64; finite only for finite elements."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def compared(stored: Tensor, base: Tensor, update: Tensor) -> Kept:
    """Compare a stored piece with base + update (float32)."""
    moved = stored.float() - base
    return Kept(square(update), square(moved), square(moved - update))
