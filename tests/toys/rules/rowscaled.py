"""A rule with parts of their own shapes, and one for each layer's depth."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Shape, Weight


@dataclass(frozen=True)
class Rowscaled(MergeRule):
    """S <- S + D, m <- m + mean of D^2 over each row of a matrix;  merged = base + gain * (1 + depth) * S / (1 + m)."""

    reference = "https://example.org/rowscaled"
    start_from = "base"
    unit = "matrix"
    tunable = ("gain",)

    gain: float = 0.5

    def parts(self, weight: Weight) -> Mapping[str, Shape]:
        rows = {"moment": weight.shape[:-1]} if weight.is_matrix else {}
        return {"sum": weight.shape, **rows}

    def update(self, running: Mapping[str, Tensor], task_vector: Tensor, weight: Weight) -> Mapping[str, Tensor]:
        new = {"sum": running["sum"] + task_vector}
        return {**new, "moment": running["moment"] + task_vector.square().mean(-1)} if weight.is_matrix else new

    def read_out(self, running: Mapping[str, Tensor], weight: Weight) -> Tensor:
        total = running["sum"] * (1 + (weight.depth or 0.0))
        return total / (1 + running["moment"].unsqueeze(-1)) if weight.is_matrix else total

    def scale(self, norms: Norms) -> float:
        return self.gain
