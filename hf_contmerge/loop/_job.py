"""Jobs of a run: a stage's training, its merges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_contmerge.loop._entries import merged_dtype
from hf_contmerge.loop._record import Recorder
from hf_contmerge.loop.inputs import check_same_base
from hf_contmerge.loop.stages import Measuring
from hf_contmerge.merge_rules import MergeRule, yaml_word
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge
from hf_contmerge.merging.rules import make_rule, recorded_rule
from hf_contmerge.merging.trust import Trust
from hf_contmerge.merging.write import Output
from hf_contmerge.models.survival import Survival
from hf_contmerge.models.tokenizer import UNCHANGED
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace, Record, newest, one_a_stage
from hf_contmerge.runtime.files import link_files
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.joint import joint_data, joint_train

if TYPE_CHECKING:
    from hf_contmerge.loop.plan.checks import Prepared
    from hf_contmerge.runtime.crew import Crew


def train_job(run: Run, prepared: Prepared, t: int, kind: str) -> TrainJob:
    """Return the training job of stage t's expert."""
    stage, recipe = run.stage(t), run.recipe
    alone = run.expert(t, kind).alone(t)
    return TrainJob(
        start=run.start_of(t, kind) or prepared.start(t), base=prepared.base, data=prepared.data[stage.name],
        train=recipe.train_of(stage), seed=recipe.seed, memory=run.memory_before(t, kind), remembers=not alone,
        trust_remote_code=recipe.trust_remote_code, stage=1 if alone else t,
        keep=recipe.guard.checkpoints if recipe.guard else 0, others=tuple(prepared.data.values()),
    )  # fmt: skip


def joint_job(run: Run, prepared: Prepared) -> TrainJob:
    """Return the training job of the expert on all stages at once."""
    recipe, kind = run.recipe, next(iter(prepared.kinds.values()))
    steps = sum(run.expert(t, kind).record("train")["steps"] for t in run.stage_numbers())
    return TrainJob(
        start=prepared.base, base=prepared.base, data=joint_data(prepared.data, seed=recipe.seed),
        train=joint_train(recipe, steps), seed=recipe.seed, remembers=False,
        trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip


@dataclass(frozen=True)
class MergeJob:
    """One merge entry at one stage of a run."""

    run: Run
    prepared: Prepared
    measuring: Measuring
    """For validation documents."""
    t: int
    place: MergePlace

    @property
    def recorder(self) -> Recorder:
        return self.measuring.recorder

    @property
    def crew(self) -> Crew:
        return self.recorder.crew

    @property
    def kind(self) -> str:
        return self.prepared.kinds[self.place.entry.name]

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the merged weights (None: the base's)."""
        return merged_dtype(self.place.entry)

    @property
    def place_before(self) -> MergePlace | None:
        return self.run.merged(self.t - 1, self.place.entry) if self.t > 1 else None

    def rule(self) -> tuple[str, MergeRule]:
        """Return the entry's rule, or a guard's earlier choice."""
        entry, where = self.place.entry, str(self.place.folder)
        record = self.place_before.record("merge") if self.place_before else {}
        if not record and self.prepared.published:
            record = {"parameters": self.prepared.published.log.parameters}
        if chosen := record.get("goes_on"):
            return chosen["rule"], recorded_rule(chosen["rule"], chosen["parameters"], where=where)
        rule = self.prepared.rules[entry.name]
        if record:  # a default may have changed since
            named = {*entry.settings(), *map(yaml_word, rule.searchable())}
            recorded = recorded_rule(entry.rule, record["parameters"], where=where).parameters()
            kept = {word: value for word, value in recorded.items() if word not in named}
            rule = make_rule(entry.rule, {**rule.parameters(), **kept}, where=where)
        return entry.rule, rule

    def previous(self) -> RunningMerge:
        """Return the previous stage's merge, empty at stage 1."""
        name, rule = self.rule()
        if not self.place_before:
            return self._before(name, rule)
        record, norms = self.place_before.record("merge"), self.place_before.record("merge")["norms"]
        experts = [self._expert(part) for part in self._parts_before()]
        folded = [replace(e, norm=norm) for e, norm in zip(experts, norms["experts"], strict=True)]
        rule = recorded_rule(name, record["parameters"], where=str(self.place_before.folder))
        return RunningMerge(
            self.prepared.base, name, rule, (*self._before(name, rule).experts, *folded), self.place_before.running,
            norms["running"], record.get("factor", 1.0), trust=_trust(record),
        )  # fmt: skip

    def _before(self, name: str, rule: MergeRule) -> RunningMerge:
        """Return the merge before stage 1: published, or empty."""
        published, base = self.prepared.published, self.prepared.base
        return published.merge(base, name, rule) if published else RunningMerge(base, name, rule)

    def start(self) -> RunningMerge:
        """Return the merge to fold into, with factor 1."""
        return replace(self.previous(), rule=self.rule()[1], factor=1.0)

    def newest(self) -> FoldedExpert:
        """Return the stage's expert."""
        return self._expert(newest(self.t))

    def _parts_before(self) -> list[dict[str, Any]]:
        """Return the experts of the previous stage's merge, as in merge.json."""
        return self.place_before.folded(self.t - 1) if self.place_before else []

    def _place_of(self, part: dict[str, Any]) -> ExpertPlace:
        merged = self.run.merged(part["stage"], self.place.entry)
        if step := part.get("earlier"):
            return merged.earlier_at(step)
        return merged.replayed if part["replayed"] else self.run.expert(part["stage"], self.kind)

    def _expert(self, part: dict[str, Any]) -> FoldedExpert:
        """Return an expert from its entry in merge.json."""
        place = self._place_of(part)
        sha256 = place.record("train")["model_sha256"]
        expert = self.expert_at(part["stage"], place.model, sha256)
        chosen, weight = part.get("chosen", {}), part.get("weight", expert.weight)
        return replace(expert, replayed=part["replayed"], earlier=part.get("earlier", 0), chosen=chosen, weight=weight)

    def expert_at(self, t: int, model: Path, sha256: str) -> FoldedExpert:
        stage = self.run.stage(t).name
        weight = self.place.entry.weights.get(stage, 1.0)
        if weight != 1.0 and not self.rule()[1].linear:  # a guard chose another rule
            weight = 1.0
        return FoldedExpert(stage, model, sha256, name=f"Stage {stage}", weight=weight)

    def parts(self, merge: RunningMerge) -> list[dict[str, Any]]:
        """Return a merge's experts of the run, as in merge.json."""
        number = {stage.name: t for t, stage in enumerate(self.run.recipe.stages, 1)}
        return [{"stage": number[e.stage], "replayed": e.replayed, **e.deviations()} for e in self.own(merge)]

    def own(self, merge: RunningMerge) -> tuple[FoldedExpert, ...]:
        """Return a merge's experts without those of a published merge."""
        return merge.experts[len(self.prepared.published.experts()) if self.prepared.published else 0 :]

    def holds_one_a_stage(self, merge: RunningMerge) -> bool:
        return self.parts(merge) == one_a_stage(self.t)

    def check(self) -> None:
        """Read base, state and experts; raise an error for changed ones."""
        check_same_base(self.run, self.prepared.base)
        for part in (*self._parts_before(), newest(self.t)):
            self._place_of(part).check("train", "expert")
        if self.place_before:
            self.place_before.check("merge", "running", "merged")
        elif self.prepared.published:
            self.prepared.published.check()

    # Folders

    def scratch(self, name: str) -> Path:
        """Return a new scratch folder's path on all ranks."""
        return self.crew.ranks.first(self.place.scratch, name)

    def output(self) -> Output:
        """Return the merged model's folder and settings."""
        entry = self.place.entry
        companions = self.prepared.given.get(self.run.recipe.tokenizer_model(self.t, entry) or "")
        if not companions and not entry.tokenizer_from and self.prepared.published:
            companions = self.prepared.published.model
        change = UNCHANGED if entry.tokenizer_from else self.prepared.change
        return Output(self.scratch("merged"), self.dtype, entry.shard_size, companions, change, entry.rounding)

    def keep_previous(self) -> RunningMerge:
        """Copy the previous state and model to scratch.

        At stage 1, the base is written.
        """
        running, before = self.scratch("running"), self.place_before
        merge = replace(self.previous(), running=running)
        if not before:
            return replace(merge, survival=merge.export(self.output(), crew=self.crew))
        merged = self.scratch("merged")

        def copy() -> None:
            link_files(before.running, running)
            link_files(before.model, merged)

        self.crew.ranks.first(copy)
        stored = self.crew.ranks.first(lambda: before.record("merge").get("stored"))
        return replace(merge, survival=Survival.read(stored) if stored else None)


def _trust(record: Record) -> Trust | None:
    return Trust(record["amplification"]) if "amplification" in record else None
