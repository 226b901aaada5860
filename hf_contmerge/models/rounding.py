"""Rounds weights to 16 bits, and measures the part of an update that is left.

A bfloat16 weight has 8 significant bits. The update of a usual learning rate is smaller than half their last one, so
that rounding to the nearest value gives back the base. Stochastic rounding takes the value above or below, each with
the probability that makes the mean exact. The random bits follow from the tensor's name and the element's position:
the same bytes for any number of pieces, threads, ranks and devices.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)

Rounding = Literal["stochastic", "nearest"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

FILE = "rounding.json"
LEAST = 0.9
"""The share of an update that should survive; below, users are warned."""

_WORST = 3  # tensors named in a record
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


@dataclass(frozen=True)
class Kept:
    """Squared norms of an update, of its stored part, and of their difference."""

    update: float = 0.0
    moved: float = 0.0
    lost: float = 0.0

    @classmethod
    def of(cls, stored: Tensor, base: Tensor, update: Tensor) -> Kept:
        """Compare a stored piece with base + update (float32)."""
        moved = stored.float() - base
        return cls(square(update), square(moved), square(moved - update))

    @classmethod
    def sum(cls, parts: Iterable[Kept]) -> Kept:
        """Add up parts; the order does not matter."""
        each = list(parts)
        return cls(*(math.fsum(getattr(k, f.name) for k in each) for f in fields(cls)))

    @property
    def finite(self) -> bool:
        return math.isfinite(self.lost)

    @property
    def survival(self) -> float:
        """<stored - base, exact - base> / |exact - base|^2; 1 for no update."""
        return (self.moved + self.update - self.lost) / (2 * self.update) if self.update else 1.0

    @property
    def error(self) -> float:
        """|stored - exact| / |exact - base|; 0 for no update."""
        return math.sqrt(self.lost / self.update) if self.update else 0.0


@dataclass(frozen=True)
class Survival:
    """The part of a model's update that is left in its file."""

    dtype: str
    """Of most weights."""
    rounding: str
    survival: float
    error: float
    nbytes: int
    worst: tuple[tuple[str, float], ...] = ()
    """The tensors that lost most, with the share that survives."""

    @classmethod
    def of(cls, tensors: Mapping[str, Kept], dtype: torch.dtype, rounding: str, nbytes: int) -> Survival:
        """Sum up a model's tensors."""
        total = Kept.sum(tensors.values())
        changed = [(name, kept.survival) for name, kept in sorted(tensors.items()) if kept.update]
        worst = sorted((x for x in changed if x[1] < LEAST), key=lambda x: x[1])[:_WORST]
        by = rounding if dtype in _HALF else "none"
        word = str(dtype).removeprefix("torch.")
        return cls(word, by, total.survival, total.error, nbytes, tuple(worst))

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Survival:
        """Return the value in a record with these fields."""
        worst = tuple((name, share) for name, share in record["worst"])
        return cls(**{**{f.name: record[f.name] for f in fields(cls)}, "worst": worst})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def lossy(self) -> bool:
        return self.survival < LEAST

    def in_words(self) -> str:
        """Describe dtype, rounding, and what is kept."""
        by = "" if self.rounding == "none" else f", {self.rounding} rounding"
        return f"{self.dtype}{by}: {100 * self.survival:.1f} % of the update kept, relative error {self.error:.2g}"

    @property
    def taken(self) -> str:
        """The share that rounding took, in words."""
        return f"rounding to {self.dtype} took {100 * min(1.0, 1.0 - self.survival):.0f} % of the update"

    def advice(self) -> str:
        """Return what keeps more of the update."""
        other = "" if self.rounding == "stochastic" else ", `rounding: stochastic`"
        return f"`dtype: float32`{other} or a higher learning rate keeps more"

    def warn(self, model: object) -> None:
        """Log a warning if rounding took more than a tenth of the update."""
        if self.lossy:
            LOG.warning("%s: rounding takes part of the update (%s). %s.", model, self.in_words(), self.advice())

    def write(self, folder: Path) -> None:
        """Write rounding.json next to a model."""
        (folder / FILE).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
