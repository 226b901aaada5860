"""A merged model's weights in memory, with each expert's share.

    base + scale * sum_i w_i read_out(S_i)      S_i: the state with expert i at weight 1 and the others at weight 0

With a linear rule this is the merge at weights w, to rounding: other weights cost one pass over the states, without the
experts and without the rule's own work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging._pieces import read_out
from hf_contmerge.merging.costs import weight_of
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge, require_linear
from hf_contmerge.merging.running import Running
from hf_contmerge.models.experts import Expert, open_expert
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew


@dataclass(frozen=True)
class MergedWeights:
    """A merged model, tensor by tensor, in float32."""

    base: Weights
    rule: MergeRule
    scale: float
    stages: int
    """Number of experts in the states."""
    states: tuple[Running, ...]
    weights: tuple[float, ...]
    """Factor on each state."""

    @classmethod
    def of(cls, merge: RunningMerge) -> MergedWeights:
        """Return the model of a merge; without experts, the base."""
        states = (Running(merge.running),) if merge.running else ()
        return cls(Weights(merge.base), merge.rule, merge.scale, len(merge.experts), states, (1.0,) * len(states))

    def at(self, weights: Sequence[float]) -> MergedWeights:
        """Return the model with other factors."""
        return replace(self, weights=tuple(weights))

    def tensor(self, name: str) -> Tensor:
        """Return a floating weight. It must not be modified."""
        wide, weight = self.base.tensor(name).float(), weight_of(self.base, name, self.stages)
        for state, factor in zip(self.states, self.weights, strict=True):
            parts = state.state(name) if factor else None
            if parts is not None:
                wide = torch.add(wide, read_out(self.rule, parts, weight), alpha=self.scale * factor)
        return wide


@dataclass(frozen=True)
class Separated:
    """Experts of a linear rule, one state each."""

    model: MergedWeights
    shares: tuple[float, ...]
    """Mean factor of each task vector in what weight 1 adds: the rule's own coefficient."""


def separated(merge: RunningMerge, experts: Sequence[FoldedExpert], scratch: Path, crew: Crew) -> Separated:
    """Fold each expert alone, at its place among the others.

    Args:
        merge: the rule and the base, without experts.
        experts: in stage order.
        scratch: an empty folder, for a state per expert.
        crew: threads and ranks that share the work.

    Raises:
        RecipeError: the rule is not linear.
        ModelError: as `RunningMerge.fold`.
    """
    require_linear(merge.rule_name, merge.rule, (0.0 for _ in experts))
    base, states, shares = Weights(merge.base), [], []
    opened = crew.ranks.all(lambda: [open_expert(e.folder, base, force=True) for e in experts])
    scale = 0.0
    for place, expert in enumerate(experts):
        alone = [replace(e, weight=float(e is expert)) for e in experts]
        folded = merge.fold(alone, scratch / f"{place}", opened=opened, crew=crew)
        scale = folded.scale
        states.append(Running(scratch / f"{place}"))
        added = MergedWeights(base, merge.rule, scale, len(experts), (states[-1],), (1.0,))
        shares.append(crew.ranks.first(_mean_factor, added, opened[place]))
    return Separated(
        MergedWeights(base, merge.rule, scale, len(experts), tuple(states), (1.0,) * len(states)), tuple(shares)
    )


def _mean_factor(merged: MergedWeights, expert: Expert) -> float:
    """Return the mean factor of an expert's task vector, by squares.

    Lengths would not tell it: rules that drop elements scale up the others, and some states hold more than changes.
    """
    common = whole = 0.0
    for name in merged.base.floating():
        stored = merged.base.tensor(name)
        wide = stored.reshape(-1).float()
        vector = expert.reader(name, stored)(0, wide.numel(), wide)
        common += float(torch.dot(merged.tensor(name).reshape(-1) - wide, vector))
        whole += float(torch.dot(vector, vector))
    return max(0.0, common / whole) if whole else 0.0
