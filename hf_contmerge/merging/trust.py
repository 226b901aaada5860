"""How far rounding grows in a merge by an ill-posed rule.

Some states get a shadow: after the first expert it lies NUDGE away (relative), and all later experts are folded into
it too. Its distance at the end over NUDGE is the amplification of whatever differs between two machines. A random
change of one stage alone would not do: what a stage amplifies, later ones amplify in the same directions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Weight
from hf_contmerge.merging._pieces import Parts, updated

LOG = logging.getLogger(__name__)

NUDGE = 2.0**-40
_ROUNDING = 2.0**-53
_UNSURE = 1e-5
"""An error that users are warned of. Shadows that have gone astray altogether are near it, too."""
_SHADOWS = 8


@dataclass(frozen=True)
class Trust:
    """The largest growth of rounding, of all matrices with a shadow."""

    amplification: float

    @property
    def error(self) -> float:
        """Relative error of the merge's update by float64 rounding, estimated."""
        return self.amplification * _ROUNDING

    def in_words(self) -> str:
        """Describe the amplification and the error."""
        return f"rounding grew {self.amplification:.1e} times: relative error about {self.error:.0e}"

    def warn(self, rule: object) -> None:
        """Log a warning if the result may depend on the machine."""
        if self.error >= _UNSURE:
            LOG.warning("%s: %s or more. Another machine may get another model; variant: block does not.", rule,
                        self.in_words())  # fmt: skip


@dataclass
class Shadow:
    """A state's shadow during a fold; None before the first expert."""

    rule: MergeRule
    name: str
    state: Tensor | None
    growth: float | None = None

    def fold(self, after: Parts, change: Tensor, weight: Weight) -> None:
        """Follow the fold of a change into the state `after`."""
        if self.state is not None:
            self.state = updated(self.rule, {"": self.state}, change, weight)[""]
        elif after[""].any():
            self.state = nudged(after[""], self.name)
        self.growth = None if self.state is None else growth(self.state, after[""])


def shadowed(names: Sequence[str]) -> set[str]:
    """Choose the matrices with a shadow, evenly over the model."""
    count = min(_SHADOWS, len(names))
    return {names[len(names) * i // count] for i in range(count)}


def nudged(state: Tensor, name: str) -> Tensor:
    """Return a state NUDGE away, in a direction seeded by its name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    noise = torch.randn(state.shape, dtype=state.dtype, generator=torch.Generator().manual_seed(seed)).to(state.device)
    return state + noise * (NUDGE * state.norm() / noise.norm())


def growth(shadow: Tensor, state: Tensor) -> float:
    """Return the distance of a shadow from its state, over NUDGE."""
    size = float(state.norm())
    return float((shadow - state).norm()) / size / NUDGE if size else 0.0
