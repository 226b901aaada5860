"""A merge as a value: experts and running state.

`state.json` (state.py) and a run's `merge.json` are its two serialisations. A fold writes a new folder `running` and
returns a new value, so an older value stays valid as long as its folder exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.merge_rules import MergeRule, Norms, rule_class, rule_names, yaml_word
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.trust import Trust
from hf_contmerge.merging.write import Merged, Output, write_merged
from hf_contmerge.models.experts import Expert, expert_sha256, first_twin, open_expert, twins_refused, weighted
from hf_contmerge.models.survival import Survival
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew


@dataclass(frozen=True)
class FoldedExpert:
    """An expert of a merge."""

    stage: str
    folder: Path
    sha256: str = ""
    """Digest of its weights; may be empty if never compared."""
    norm: float = 0.0
    """Norm of its task vector, set by the fold."""
    name: str = ""
    """Its name in messages."""
    replayed: bool = False
    """Whether it was retrained with examples of earlier stages."""
    earlier: int = 0
    """The step of the checkpoint in its place; 0 for the last."""
    weight: float = 1.0
    """Its task vector is multiplied by it."""
    chosen: Mapping[str, float] = field(default_factory=dict)
    """Fields `of_newest` by their names in recipes, where a search chose other values than the rule's."""

    def deviations(self) -> dict[str, Any]:
        """Return earlier step, weight and chosen fields for records, if set."""
        values = {"earlier": self.earlier, "weight": self.weight, "chosen": dict(self.chosen)}
        plain = {"earlier": 0, "weight": 1.0, "chosen": {}}
        return {word: value for word, value in values.items() if value != plain[word]}

    def is_unchanged(self) -> bool:
        """Check the folder for the folded weights."""
        try:
            return self.folder.is_dir() and expert_sha256(self.folder) == self.sha256
        except ModelError:  # the folder now holds other files
            return False


@dataclass(frozen=True)
class RunningMerge:
    """Experts folded into one running state, in order."""

    base: Path
    rule_name: str
    rule: MergeRule
    experts: tuple[FoldedExpert, ...] = ()
    running: Path | None = None
    running_norm: float = 0.0
    factor: float = 1.0
    """Further factor on the rule's scale, for rules without a tunable field."""
    survival: Survival | None = field(default=None, compare=False)
    """What the model's file keeps of the update, if the fold wrote one."""
    trust: Trust | None = None
    """How far the result of an ill-posed rule is known."""

    @property
    def norms(self) -> Norms:
        return Norms(tuple(e.norm for e in self.experts), self.running_norm)

    @property
    def scale(self) -> float:
        return self.rule.scale(self.norms) * self.factor if self.experts else 0.0

    def scaled(self, factor: float) -> RunningMerge:
        """Return the same state with the scale times `factor`."""
        if self.rule.tunable:  # the scale is proportional to this field
            field = self.rule.tunable[0]
            return self.tuned(field, getattr(self.rule, field) * factor)
        return replace(self, factor=self.factor * factor)

    def tuned(self, field: str, value: float) -> RunningMerge:
        """Return the same state with another value of a `searchable` field.

        `update` does not read these fields.
        """
        return replace(self, rule=replace(self.rule, **{field: value}))

    def restarted(self) -> RunningMerge:
        """Return the merge before its first expert."""
        return replace(self, experts=(), running=None, running_norm=0.0, factor=1.0, trust=None)

    def fold(
        self,
        new: Sequence[FoldedExpert],
        out: Path | None,
        *,
        merged: Output | None = None,
        opened: Sequence[Expert] = (),
        crew: Crew | None = None,
    ) -> RunningMerge:
        """Fold experts in, in this order.

        Args:
            new: the experts.
            out: an empty folder for the new state; None discards the state.
            merged: output of the merged model, written in the same pass.
            opened: the same experts, if already opened.
            crew: threads and ranks that share the work.

        Raises:
            ModelError: an expert does not fit, is damaged, or duplicates another expert's weights.
        """
        crew, base = crew or Crew(), Weights(self.base)
        crew.ranks.first(refuse_twins, (*self.experts, *new), len(self.experts))
        require_linear(self.rule_name, self.rule, [e.weight for e in new])
        experts = opened or crew.ranks.all(lambda: [open_expert(e.folder, base, force=True) for e in new])
        experts = [weighted(expert, e.weight) for expert, e in zip(experts, new, strict=True)]
        outcome = merge_experts(
            self.rule, base, experts, running=self.running, earlier=self.norms.experts, running_out=out,
            merged_out=merged, rules=self._rules(new), crew=crew,
        )  # fmt: skip
        norms = zip((*self.experts, *new), outcome.norms.experts, strict=True)
        folded = tuple(replace(expert, norm=norm) for expert, norm in norms)
        if outcome.trust and crew.ranks.is_main:
            outcome.trust.warn(self.rule)
        return replace(
            self, experts=folded, running=out, running_norm=outcome.norms.running, survival=outcome.survival,
            trust=outcome.trust,
        )  # fmt: skip

    def _rules(self, new: Sequence[FoldedExpert]) -> list[MergeRule]:
        """Return each expert's rule; none if no expert has a chosen field."""
        words = {yaml_word(f): f for f in self.rule.of_newest}
        chosen = [{words[word]: value for word, value in e.chosen.items() if word in words} for e in new]
        return [replace(self.rule, **fields) for fields in chosen] if any(chosen) else []

    def export(self, out: Output, *, crew: Crew | None = None) -> Survival:
        """Write the merged model; return the survival of the update.

        A single unchanged expert at scale 1 keeps its bits.
        """
        crew, base, only = crew or Crew(), Weights(self.base), None
        if len(self.experts) == 1 and self.scale == 1.0 and crew.ranks.first(self.experts[0].is_unchanged):
            only = crew.ranks.all(open_expert, self.experts[0].folder, base, force=True)
        assert self.running, "a merge without a running state has nothing to write"
        merged = Merged(self.norms, self.scale)
        return write_merged(self.rule, base, self.running, merged, out, only=only, crew=crew)


def require_linear(name: str, rule: MergeRule, weights: Iterable[float], *, where: str = "") -> None:
    """Raise RecipeError for experts' weights with a nonlinear rule.

    Also for weights beyond float32.
    """
    others, place = [w for w in weights if w != 1.0], f"{where}: " if where else ""
    if wrong := [w for w in others if not abs(w) <= torch.finfo(torch.float32).max]:
        raise RecipeError(f"{place}a weight must be a finite number; got {wrong[0]}.")
    if others and not rule.linear:
        known = ", ".join(n for n in rule_names() if rule_class(n).linear)
        raise RecipeError(
            f"{place}{name} cannot give experts weights ({others[0]:g}): it is not linear in them. Remove the weights, "
            f"or use one of {known}."
        )


def refuse_twins(experts: Sequence[FoldedExpert], folded: int = 0) -> None:
    """Raise ModelError for experts with equal weights.

    Args:
        experts: all experts; those without a digest are compared by their files.
        folded: number of experts at the front that were checked before.
    """
    by_digest: dict[str, FoldedExpert] = {}
    for number, expert in enumerate(experts):
        twin = by_digest.setdefault(expert.sha256, expert) if expert.sha256 else expert
        if twin is not expert and number >= folded:
            raise ModelError(twins_refused(expert.name, twin.name))
    files = [expert for expert in experts[folded:] if not expert.sha256]
    pair = first_twin([expert.folder for expert in files])
    if pair:
        raise ModelError(twins_refused(*(files[i].name for i in pair)))
