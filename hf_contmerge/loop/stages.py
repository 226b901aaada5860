"""What a stage's merge is made of, step by step: folding, writing, measuring, and training an expert once more.

Steps are carried out by all ranks together. Outputs lie in the place's scratch folders until one is published.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_contmerge.errors import ModelError, RunError
from hf_contmerge.loop._entries import merged_dtype, with_replay
from hf_contmerge.loop.plan.checks import Prepared
from hf_contmerge.merge_rules import MergeRule, Norms
from hf_contmerge.merging.rules import make_rule
from hf_contmerge.merging.state import Folded, Source
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Merged, Output, write_merged
from hf_contmerge.models.experts import expert_sha256, open_expert
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace, Place
from hf_contmerge.run.recipe.parts import Rung, Task
from hf_contmerge.run.scores import Scores, load_scores, write_scores
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.files import remove, sync_files, sync_folder, write_atomically
from hf_contmerge.scoring.score import score_model
from hf_contmerge.train_strategies.replay import Replay
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import OWN


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
        self.crew.ranks.barrier()
        record = self.before.record("merge")
        rule = make_rule(name, record["parameters"], where=str(self.before.folder))
        norms = Norms(tuple(record["norms"]["experts"]), record["norms"]["running"])
        return Folded(name, rule, self.sources_before(), norms, record.get("factor", 1.0))

    def _scratch(self, name: str) -> Path:
        """Return an empty scratch folder, on all ranks."""
        if self.main:
            self.place.scratch(name)
        self.crew.ranks.barrier()
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
        missing = self.crew.ranks.first(lambda: [t for t in tasks if t.name not in have])
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
        done = self.crew.ranks.first(lambda: place.is_done("train") and place.record("train")["rung"] == settings)
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
        self.crew.ranks.barrier()
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
        self.crew.ranks.barrier()

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


def finished(out: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of an expert that is there already; None if there is nothing. Raises RunError for another."""
    file = out / OWN / "train.json"
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        other = [word.removesuffix("_sha256") for word, value in inputs.items() if record["inputs"].get(word) != value]
        if other:
            raise RunError(
                f"{out} holds an expert that was trained otherwise: {', '.join(other)} differ (see {file}). Name "
                "another folder, or remove that one to train it anew."
            )
        return record
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and holds no expert of finetune_stage. Name a new folder, or remove that one.")
    return None


def working_folder(out: Path, inputs: Mapping[str, Any]) -> Path:
    """Return the hidden folder in which an expert is made: other settings have another, with other checkpoints."""
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return out.absolute().with_name(f".{out.name}.{key[:12]}")


def make_room(out: Path, work: Path) -> None:
    """Make the folder to train in, and clear away what trainings with other settings have left half done."""
    for path in work.parent.glob(f".{out.name}.*"):
        if path != work:
            remove(path)
    for name in ("expert", "memory"):
        remove(work / name)
    (work / "expert").mkdir(parents=True)


def publish(work: Path, out: Path, record: Mapping[str, Any]) -> None:
    """Put a trained expert in its place, with its record and the strategies' memory; remove what it was made in."""
    expert = work / "expert"
    write_atomically(expert / OWN / "train.json", json.dumps(record, indent=1) + "\n")
    if (work / "memory").is_dir():
        (work / "memory").rename(expert / OWN / "memory")
    sync_files(expert)
    remove(out)  # empty, or a link
    expert.rename(out)
    sync_folder(work.parent)
    remove(work)
