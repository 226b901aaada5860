"""What a stage's merge is made of, step by step: folding, writing, measuring, and training an expert once more.

Steps are carried out by all ranks together. Outputs lie in the place's scratch folders until one is published.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_contmerge.errors import ModelError
from hf_contmerge.experts import expert_sha256, open_expert
from hf_contmerge.finetune import train_expert
from hf_contmerge.merge_rules import MergeRule, Norms
from hf_contmerge.merge_stream import merge_experts
from hf_contmerge.merge_words import make_rule, merged_dtype
from hf_contmerge.merge_write import Merged, Output, write_merged
from hf_contmerge.places import ExpertPlace, MergePlace, Place, remove
from hf_contmerge.preflight import Prepared, with_replay
from hf_contmerge.recipe import Rung, Task
from hf_contmerge.run_folder import Run
from hf_contmerge.scoring import score_model
from hf_contmerge.task_scores import Scores, load_scores, write_scores
from hf_contmerge.tensor_files import Weights
from hf_contmerge.train_strategies.replay import Replay
from hf_contmerge.work_sharing import Crew, together


@dataclass(frozen=True)
class Source:
    """An expert that a merge holds."""

    stage: int
    sha256: str
    model: Path
    replayed: bool = False
    """Whether it is the one that the guard had trained again."""


@dataclass(frozen=True)
class Folded:
    """Experts in a rule's state."""

    rule_name: str
    rule: MergeRule
    sources: tuple[Source, ...]
    norms: Norms
    factor: float = 1.0
    """What the rule's own scale is multiplied by, where no parameter of the rule says so."""

    @property
    def scale(self) -> float:
        return self.rule.scale(self.norms) * self.factor if self.sources else 0.0

    def scaled(self, factor: float) -> Folded:
        """Return the same with a scale that is `factor` times this one."""
        if self.rule.tunable:  # the scale is proportional to it
            field = self.rule.tunable[0]
            return self.tuned(field, getattr(self.rule, field) * factor)
        return dataclasses.replace(self, factor=self.factor * factor)

    def tuned(self, field: str, value: float) -> Folded:
        """Return the same state read out with another value of a tunable field."""
        return dataclasses.replace(self, rule=dataclasses.replace(self.rule, **{field: value}))


@dataclass(frozen=True)
class Bench:
    """The steps of one merge entry at one stage."""

    run: Run
    ranks: Any
    prepared: Prepared
    crew: Crew
    t: int
    place: MergePlace

    @property
    def main(self) -> bool:
        return self.ranks.is_main_process

    @property
    def kind(self) -> str:
        return self.prepared.kinds[self.place.entry.name]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the merged model's weights; None: as in the base."""
        return merged_dtype(self.place.entry)

    @property
    def before(self) -> MergePlace | None:
        """The merge of the stage before."""
        return self.run.merged(self.t - 1, self.place.entry) if self.t > 1 else None

    def rule(self) -> tuple[str, MergeRule]:
        """Return the rule to fold with: the entry's, or the one that a guard has gone over to at an earlier stage."""
        on = self.before.record("merge").get("goes_on") if self.before else None
        if on:  # not the entry's own parameters any more
            return on["rule"], make_rule(on["rule"], on["parameters"], where=str(self.place.folder))
        return self.place.entry.rule, self.prepared.rules[self.place.entry.name]

    def sources_before(self) -> tuple[Source, ...]:
        """Return the experts that the merge of the stage before holds: one a stage, unless a guard left some out."""
        if not self.before:
            return ()
        kept = self.before.record("merge").get("folded")
        if kept is None:
            return tuple(self.source(i) for i in range(1, self.t))
        return tuple(self.source(part["stage"], replayed=part["replayed"]) for part in kept)

    def source(self, stage: int, *, replayed: bool = False) -> Source:
        place = self.run.merged(stage, self.place.entry).replayed if replayed else self.run.expert(stage, self.kind)
        return Source(stage, place.record("train")["model_sha256"], place.model, replayed)

    # Folding and writing

    def fold(self, sources: Sequence[Source], *, newest_only: bool, merged_out: Output | None = None) -> Folded:
        """Fold experts into a state in the scratch folder `running`.

        `newest_only`: go on from the state of the stage before, which holds all but the last. `merged_out`: where the
        merged model goes at once, if nothing is to be chosen.
        """
        refuse_twin(self.run, sources)
        name, rule = self.rule()
        before = self.before if newest_only else None
        return self._folded(name, rule, sources, before, merged_out)

    def fold_by(self, rule_name: str, parameters: Mapping[str, Any], sources: Sequence[Source]) -> Folded:
        """Fold all experts anew, by another rule."""
        rule = make_rule(rule_name, parameters, where="guard.ladder")
        return self._folded(rule_name, rule, sources, None, None)

    def _folded(
        self, name: str, rule: MergeRule, sources: Sequence[Source], before: MergePlace | None, merged: Output | None
    ) -> Folded:
        base, scratch = Weights(self.prepared.base), self._scratch("running")
        fresh = sources[-1:] if before else sources
        found = merge_experts(
            rule, base, [open_expert(s.model, base, force=True) for s in fresh],  # preflight knows its base
            crew=self.crew, running=before.running if before else None,
            earlier=before.record("merge")["norms"]["experts"] if before else (),
            running_out=scratch, merged_out=merged,
        )  # fmt: skip
        return Folded(name, rule, tuple(sources), found.norms)

    def write(self, folded: Folded) -> Path:
        """Write the merged model into the scratch folder `merged`; return that."""
        base, out = Weights(self.prepared.base), self.output()
        only = open_expert(folded.sources[0].model, base, force=True) if len(folded.sources) == 1 else None
        write_merged(
            folded.rule, base, self.place.folder / ".running", Merged(folded.norms, folded.scale), out,
            only=only, crew=self.crew,
        )  # fmt: skip
        return out.folder

    def output(self) -> Output:
        """Return where a merged model goes: an empty scratch folder."""
        entry = self.place.entry
        companions = self.prepared.given.get(self.run.recipe.tokenizer_model(self.t, entry) or "")
        return Output(self._scratch("merged"), self.dtype, entry.shard_size, companions)

    def keep_previous(self) -> Folded:
        """Put the state and the model of the stage before into the scratch folders; the base's, at the first stage."""
        running = self._scratch("running")
        name, rule = self.rule()
        if not self.before:
            nothing = Folded(name, rule, (), Norms((), 0.0))
            self.write(nothing)
            return nothing
        merged = self._scratch("merged")
        if self.main:
            for new, old in ((running, self.before.running), (merged, self.before.model)):
                shutil.copytree(old, new, copy_function=_link, dirs_exist_ok=True)
        self.crew.ranks.gather(None)
        record = self.before.record("merge")
        rule = make_rule(name, record["parameters"], where=str(self.before.folder))
        norms = Norms(tuple(record["norms"]["experts"]), record["norms"]["running"])
        return Folded(name, rule, self.sources_before(), norms, record.get("factor", 1.0))

    def _scratch(self, name: str) -> Path:
        """Return an empty scratch folder, on all ranks."""
        if self.main:
            self.place.scratch(name)
        self.crew.ranks.gather(None)
        return self.place.folder / f".{name}"

    # Measuring

    def measure(self, model: Path, tasks: Sequence[Task]) -> dict[str, Any]:
        """Return a model's scores on validation documents, on the main process; nothing on the others."""
        recipe = self.run.recipe
        _, scores = score_model(
            model, tasks, task_folder=self.run.tasks, evaluate=recipe.evaluate, ranks=self.ranks,
            base=self.prepared.base, trust_remote_code=recipe.trust_remote_code, part="validation",
        )  # fmt: skip
        return scores

    def measured(self, place: Place, model: Path, tasks: Sequence[Task]) -> Scores:
        """Return what `measure` finds of a model of the run, once: it is kept beside the model."""
        have = self._kept(place) if self.main else {}
        missing = together(self.crew.ranks, lambda: [t for t in tasks if t.name not in have], leader_only=True)
        if not missing:
            return have
        found = {**have, **self.measure(model, missing)}
        if self.main:
            self.keep(place.validation, found)
        return found

    def keep(self, place: Place, scores: Scores) -> None:
        """Write scores on validation documents into a place of their own."""
        measured_by = self.run.recipe.evaluate.measured_by()
        place.finish("score", {"tasks": write_scores(place, scores), "measured_by": measured_by})

    def _kept(self, place: Place) -> Scores:
        kept, measured_by = place.validation, self.run.recipe.evaluate.measured_by()
        same = kept.is_done("score") and kept.record("score").get("measured_by") == measured_by
        return load_scores(kept) if same else {}

    # Training once more

    def can_replay(self) -> bool:
        """Say whether the stage is trained at all, and an earlier one has data to mix in."""
        return bool(self.run.stage(self.t).dataset and any(self.run.stage(i).dataset for i in range(1, self.t)))

    def replay(self, rung: Rung) -> Source:
        """Train the stage's expert once more, with examples of the earlier stages among its own."""
        place, settings = self.place.replayed, rung.model_dump(mode="json")
        done = together(
            self.crew.ranks, lambda: place.is_done("train") and place.record("train")["rung"] == settings,
            leader_only=True,
        )  # fmt: skip
        if not done:
            self._train_again(place, rung)
        return Source(self.t, place.record("train")["model_sha256"], place.model, replayed=True)

    def _train_again(self, place: ExpertPlace, rung: Rung) -> None:
        run, stage = self.run, self.run.stage(self.t)
        memory = self.place.folder / ".replay-memory"
        if self.main:
            place.scratch("expert")
            remove(memory)
            self._remember(memory, rung)
        self.crew.ranks.gather(None)
        start = run.start_of(self.t, self.kind) or self.prepared.base
        outcome = train_expert(
            start=start, base=self.prepared.base, data=self.prepared.data[stage.name],
            train=with_replay(run.recipe.train_of(stage), rung), seed=run.recipe.seed, out=place.folder / ".expert",
            checkpoints=place.checkpoints, memory=memory, trust_remote_code=run.recipe.trust_remote_code,
        )  # fmt: skip
        if self.main:
            digest = expert_sha256(place.publish("expert"))
            place.finish("train", {**outcome, "model_sha256": digest, "rung": rung.model_dump(mode="json")})
            remove(place.checkpoints)
            remove(memory)
        self.crew.ranks.gather(None)

    def _remember(self, memory: Path, rung: Rung) -> None:
        """Write what the replay strategy would have kept of the earlier stages, beside what others have kept."""
        earlier = self.run.memory_before(self.t, self.kind)
        if earlier:
            shutil.copytree(earlier, memory, dirs_exist_ok=True)
        remove(memory / "replay")
        sizes: dict[str, Any] = {k: v for k, v in rung.parameters.items() if k == "examples"}
        chain: list[Path] = []
        for i in range(1, self.t):
            stage = self.run.stage(i)
            if stage.dataset:
                chain.append(memory / f".replay-{i}")
                chain[-1].mkdir(parents=True)
                data = self.prepared.data[stage.name].train
                Replay(**sizes).remember(nn.Module(), data, chain[-2] if len(chain) > 1 else None, chain[-1])
        chain[-1].rename(memory / "replay")
        for folder in chain[:-1]:
            remove(folder)


def refuse_twin(run: Run, sources: Sequence[Source]) -> None:
    """Raise ModelError if the newest expert has the weights of an earlier one: it must not be folded twice."""
    digests = [s.sha256 for s in sources]
    if digests[-1] in digests[:-1]:
        newest, twin = (run.stage(s.stage).name for s in (sources[-1], sources[digests.index(digests[-1])]))
        raise ModelError(
            f"The expert of stage {newest} has the same weights as that of stage {twin}, and an expert must not be "
            "folded twice. Remove the stage, or train it with other data."
        )


def _link(source: str, target: str) -> None:
    """Give a file a second name, since nothing is ever changed in place; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
