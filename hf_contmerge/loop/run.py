"""The loop: for each stage train, merge, score; then report. Resumable at every phase, on one CPU or on nodes of GPUs.

    accelerate launch hf_contmerge/train.py recipes/quickstart.yml
    accelerate launch hf_contmerge/train.py recipes/quickstart.yml --run runs/x --set merge.0.rule=ema --until merge
    accelerate launch --num_processes 8 hf_contmerge/train.py recipes/magmax-llama.yml
    torchrun --nproc-per-node 2 -- hf_contmerge/train.py recipes/quickstart.yml --run runs/x     (two CPU ranks)

Without a recipe it runs the quickstart. Every rank runs this same loop; the main process decides what is done and
writes records, all ranks train and score together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace, Place
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.schema import PHASES, Phase, Recipe, Stage
from hf_contmerge.runtime.files import FolderLock, remove

T = TypeVar("T")


def run_recipe(recipe: Recipe, folder: str | Path | None = None, *, until: Phase = "report") -> Run:
    """Carry out a recipe as far as it has not been done yet; return its run.

    Raises ContmergeError, with all that is done kept, for whatever a user can mend.
    """
    from hf_contmerge.loop.plan.checks import prepare
    from hf_contmerge.loop.trackers import Trackers, check_trackers
    from hf_contmerge.runtime.launching import join_ranks

    check_trackers(recipe.train)
    ranks, crew = join_ranks(recipe.train.sft_fields)
    run = crew.ranks.first(Run.open, recipe, folder)
    with FolderLock(run.folder) if ranks.is_main_process else nullcontext():
        prepared = prepare(run, crew.ranks)
        trackers = Trackers.open(run) if ranks.is_main_process else Trackers()
        loop = Loop(run, ranks, PHASES.index(until), prepared, crew, trackers)
        loop.carry_out()
        trackers.close()
    crew.ranks.barrier()
    return run


@dataclass(frozen=True)
class Loop:
    """The phases of one run, in order. Each asks its record whether it is done."""

    run: Run
    ranks: Any
    last_phase: int
    prepared: Any
    crew: Any
    trackers: Any

    def carry_out(self) -> None:
        """Train, merge and score, stage after stage; report after each."""
        from hf_contmerge.run.steps import run_steps

        for t, steps in groupby(run_steps(self.run, self.prepared.kinds), key=lambda step: step.t):
            for step in steps:
                place = step.place
                if step.phase == "score":
                    model = place.model if isinstance(place, ExpertPlace | MergePlace) else self.prepared.base
                    self._score(place, model, step.tasks)
                elif isinstance(place, ExpertPlace):
                    self._train(t, place)
                elif isinstance(place, MergePlace):
                    self._merge(t, place)
            if t:
                self._report()
        self._finish()

    def _finish(self) -> None:
        """Record that all is done, if it is."""
        if self._wanted("report") and self.ranks.is_main_process:
            self.run.report.finish("report", {"recipe_sha256": self.run.recipe_sha256()})

    def _train(self, t: int, place: ExpertPlace) -> None:
        stage = self.run.stage(t)
        if not self._wanted("train"):
            return
        if self._done(place, "train"):
            if self.ranks.is_main_process:
                remove(place.checkpoints)  # left by a kill right after the record
        else:
            with self._phase("train", place) as record:
                if stage.dataset:
                    record.update(self._finetune(t, place, stage))
                elif stage.minus:
                    record.update(self._add_vector(t, place, stage))
                else:
                    record.update(self._give(stage))
        if self.ranks.is_main_process:
            self.trackers.stage_is_over(place, place.record("train").get("steps", 0))

    def _finetune(self, t: int, place: ExpertPlace, stage: Stage) -> dict[str, Any]:
        from hf_contmerge.models.experts import expert_sha256
        from hf_contmerge.training.finetune import train_expert

        start = self.run.start_of(t, place.kind) or self.prepared.base
        recipe, train = self.run.recipe, self.run.recipe.train_of(stage)
        if self.ranks.is_main_process:
            place.scratch("expert")
            remove(place.folder / ".memory")
        self.crew.ranks.barrier()
        memory = self.run.memory_before(t, place.kind)
        alone = place.kind == "base" and t > 1  # an independent expert: nobody learns on from it
        outcome = train_expert(
            start=start, base=self.prepared.base, data=self.prepared.data[stage.name], train=train,
            seed=recipe.seed, out=place.folder / ".expert", checkpoints=place.checkpoints,
            memory=memory, memory_out=None if alone else place.folder / ".memory",
            trust_remote_code=recipe.trust_remote_code,
            on_log=self.trackers.of(place, "train"),
        )  # fmt: skip
        if self.ranks.is_main_process:
            if (place.folder / ".memory").exists():
                place.publish("memory")
            place.publish("expert")
            outcome["model_sha256"] = expert_sha256(place.folder / "expert")
        return {
            "start": str(start),
            "settings": train.model_dump(mode="json"),
            "seed": recipe.seed,
            **outcome,
        }

    def _add_vector(self, t: int, place: ExpertPlace, stage: Stage) -> dict[str, Any]:
        """Write base + (expert - minus), the model whose task vector is the difference of the two."""
        from hf_contmerge.merging.stream import write_sum
        from hf_contmerge.merging.vectors import vector_record
        from hf_contmerge.models.weights import weights_sha256

        assert stage.expert
        assert stage.minus
        expert, minus = self.prepared.given[stage.expert], self.prepared.given[stage.minus]
        if not self.ranks.is_main_process:
            return {}
        write_sum(self.prepared.base, expert, minus, place.scratch("expert"))
        before = self.run.expert(t - 1, place.kind).model if t > 1 else None
        vector = vector_record(self.prepared.base, before, expert, minus)
        digest = weights_sha256(place.publish("expert"))
        return {"expert": stage.expert, "minus": stage.minus, "vector": vector, "model_sha256": digest}

    def _give(self, stage: Stage) -> dict[str, Any]:
        from hf_contmerge.models.experts import expert_sha256

        assert stage.expert
        folder = self.prepared.given[stage.expert]
        return {"expert": stage.expert, "given": str(folder), "model_sha256": expert_sha256(folder)}

    def _merge(self, t: int, place: MergePlace) -> None:
        entry = place.entry
        starts_next = self.prepared.kinds[entry.name].startswith("merged") and t < len(self.run.recipe.stages)
        if not self._wanted("merge") and not starts_next:
            return
        if not self._done(place, "merge"):
            from hf_contmerge.loop._merge import merge_stage_of
            from hf_contmerge.loop.stages import Bench

            with self._phase("merge", place) as record:
                record.update(merge_stage_of(Bench(self.run, self.ranks, self.prepared, self.crew, t, place)))
                if self.ranks.is_main_process:
                    self.trackers.merged(place, record)
        if t > 1 and self.ranks.is_main_process:
            self.run.merged(t - 1, entry).prune()

    def _score(self, place: Place, model: Path, tasks: Sequence[Task]) -> None:
        from hf_contmerge.run.scores import load_scores, scored_tasks, write_scores

        have = scored_tasks(place)
        missing = [task for task in tasks if task.name not in have]
        if not self._wanted("score") or not self._from_main(lambda: missing):
            return
        from hf_contmerge.scoring.cache import ScoreCache
        from hf_contmerge.scoring.score import score_model

        recipe = self.run.recipe
        with self._phase("score", place) as record:
            digest, scores = score_model(
                model, missing, task_folder=self.run.tasks, evaluate=recipe.evaluate, ranks=self.ranks,
                base=self.prepared.base, cache=ScoreCache.open(use=recipe.evaluate.cache, here=self._score_of),
                trust_remote_code=recipe.trust_remote_code, part="test" if recipe.tunes else "all",
            )  # fmt: skip
            if self.ranks.is_main_process:
                record["scored_sha256"] = digest
                whole = {**load_scores(place), **scores}
                # The base has every task, so it alone keeps the texts.
                record["tasks"] = write_scores(place, whole, texts=place.folder == self.run.base.folder)
            self.trackers.of(place, "score")(len(have), {f"{n}/{s.metric}": s.value for n, s in scores.items()})

    def _score_of(self, key: str) -> Any:
        """Return what this run has measured under a key: the very same weights may have another name in it."""
        from hf_contmerge.run.scores import load_scores

        for _, place in self.run.places():
            tasks = place.record("score")["tasks"] if place.is_done("score") else {}
            for name, task in tasks.items():
                if task["details"].get("key") == key:
                    return load_scores(place)[name]
        return None

    def _report(self) -> None:
        if self._wanted("report") and self.ranks.is_main_process:
            from hf_contmerge.report.write import write_report

            write_report(self.run)

    def _wanted(self, phase: Phase) -> bool:
        return PHASES.index(phase) <= self.last_phase

    def _done(self, place: Place, phase: Phase) -> bool:
        return self._from_main(lambda: place.is_done(phase))

    def _from_main(self, ask: Callable[[], T]) -> T:
        """Return the main process's answer on all ranks: they must never disagree on what is done."""

        return self.crew.ranks.first(ask)

    @contextmanager
    def _phase(self, phase: Phase, place: Place) -> Iterator[dict[str, Any]]:
        """Let the caller fill the record of a phase, write it as the last thing, and wait for all ranks."""
        from hf_contmerge.loop._record import recorded_phase

        with recorded_phase(self.run, place, phase, main=self.ranks.is_main_process) as record:
            yield record
            record["device"], record["processes"] = str(self.ranks.device), self.ranks.num_processes
        self.crew.ranks.barrier()
