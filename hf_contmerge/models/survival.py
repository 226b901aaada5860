"""The share of an update left after rounding: sums, record, words."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)

FILE = "rounding.json"
LEAST = 0.9
"""The share of an update that should survive; below, users are warned."""

_WORST = 3  # tensors named in a record


@dataclass(frozen=True)
class Kept:
    """Squared norms of an update, its stored part and their difference."""

    update: float = 0.0
    moved: float = 0.0
    lost: float = 0.0

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
        """<stored - base, exact - base> / |exact - base|^2; 1 without update."""
        return (self.moved + self.update - self.lost) / (2 * self.update) if self.update else 1.0

    @property
    def error(self) -> float:
        """|stored - exact| / |exact - base|; 0 for no update."""
        return math.sqrt(self.lost / self.update) if self.update else 0.0


@dataclass(frozen=True)
class Survival:
    """The share of a model's update left in its file."""

    dtype: str
    """Of most weights."""
    rounding: str
    survival: float
    error: float
    nbytes: int
    worst: tuple[tuple[str, float], ...] = ()
    """The tensors that lost most, with the share that survives."""

    @classmethod
    def of(cls, tensors: Mapping[str, Kept], dtype: object, rounding: str, nbytes: int) -> Survival:
        """Sum up a model's tensors."""
        total = Kept.sum(tensors.values())
        changed = [(name, kept.survival) for name, kept in sorted(tensors.items()) if kept.update]
        worst = sorted((x for x in changed if x[1] < LEAST), key=lambda x: x[1])[:_WORST]
        word = str(dtype).removeprefix("torch.")
        by = rounding if word in ("bfloat16", "float16") else "none"
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
        """Describe dtype, rounding and survival."""
        by = "" if self.rounding == "none" else f", {self.rounding} rounding"
        return f"{self.dtype}{by}: {100 * self.survival:.1f} % of the update kept, relative error {self.error:.2g}"

    @property
    def taken(self) -> str:
        """The share lost to rounding, in words."""
        return f"rounding to {self.dtype} took {100 * min(1.0, 1.0 - self.survival):.0f} % of the update"

    def advice(self) -> str:
        """Advise on keeping more of the update."""
        other = "" if self.rounding == "stochastic" else ", `rounding: stochastic`"
        return f"`dtype: float32`{other} or a higher learning rate keeps more"

    def warn(self, model: object) -> None:
        """Warn if rounding lost more than a tenth of the update."""
        if self.lossy:
            LOG.warning("%s: rounding takes part of the update (%s). %s.", model, self.in_words(), self.advice())

    def write(self, folder: Path) -> None:
        """Write rounding.json next to a model."""
        (folder / FILE).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
