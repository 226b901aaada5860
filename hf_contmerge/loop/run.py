"""The loop over stages: train, merge, score, report.

    accelerate launch hf_contmerge/train.py recipes/quickstart.yml
    accelerate launch hf_contmerge/train.py recipes/quickstart.yml --run runs/x --set merge.0.rule=ema --until merge
    accelerate launch --num_processes 8 hf_contmerge/train.py recipes/magmax-llama.yml
    torchrun --nproc-per-node 2 -- hf_contmerge/train.py recipes/quickstart.yml --run runs/x     (two CPU ranks)

The default recipe is the quickstart. The loop resumes at every phase. Every rank runs it, on one CPU or on nodes of
GPUs. Rank 0 looks up the finished phases and writes records; all ranks train and score together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import (
    IN_CONTEXT,
    JOINT,
    ORACLE,
    ROUTED,
    ExpertPlace,
    MergePlace,
    Place,
    Record,
    require_whole,
)
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.phases import PHASES, Phase
from hf_contmerge.run.recipe.schema import Recipe, Stage
from hf_contmerge.runtime.digests import changed_files, digests_of
from hf_contmerge.runtime.files import FolderLock, remove
from hf_contmerge.runtime.refusals import explain

if TYPE_CHECKING:  # these load torch, needless for a finished run
    from hf_contmerge.loop._record import Recorder
    from hf_contmerge.loop.plan.checks import Prepared
    from hf_contmerge.loop.stages import Measuring
    from hf_contmerge.loop.trackers import Trackers
    from hf_contmerge.run.scores import TaskScore
    from hf_contmerge.run.steps import Step
    from hf_contmerge.scoring.tasks import DocumentPart

T = TypeVar("T")
LOG = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    until: Phase = "report",
    trust_remote_code: bool = False,
    experts: Path | None = None,
) -> Run:
    """Run a recipe's unfinished phases; return the run.

    Args:
        recipe: the recipe.
        folder: of the run; default: the recipe's `output`, or runs/<name>.
        until: the last phase.
        trust_remote_code: allow models to run their own code, where the recipe says so too.
        experts: a folder of experts shared by the runs of a study.

    Raises:
        ContmergeError: a user error. Finished phases are kept.
    """
    from hf_contmerge.loop._record import Recorder
    from hf_contmerge.loop.plan.checks import disk_needed, prepare
    from hf_contmerge.loop.trackers import Trackers, check_trackers
    from hf_contmerge.runtime.launching import join_ranks

    check_trackers(recipe.train)
    ranks, crew = join_ranks(recipe.train.sft_fields)
    run = crew.ranks.first(Run.open, recipe, folder)
    with FolderLock(run.folder) if crew.ranks.is_main else nullcontext():
        prepared = prepare(run, crew.ranks, trust_remote_code=trust_remote_code)
        trackers = Trackers.open(run) if crew.ranks.is_main else Trackers()
        recorder = Recorder(run.folder, ranks, crew, need=partial(disk_needed, run, prepared))
        Loop(run, PHASES.index(until), prepared, recorder, trackers, experts).carry_out()
        trackers.close()
    crew.ranks.barrier()
    return run


@dataclass(frozen=True)
class Loop:
    """The phases of one run; finished ones are skipped."""

    run: Run
    last_phase: int
    prepared: Prepared
    recorder: Recorder
    trackers: Trackers
    experts: Path | None = None
    """Experts shared by the runs of a study."""
    scored: dict[str, tuple[Place, str]] = field(default_factory=dict)
    """Key of a score -> place and task."""

    def carry_out(self) -> None:
        """Train, merge, score and report, stage by stage."""
        from hf_contmerge.run.steps import Course, run_steps
        from hf_contmerge.runtime.progress import within_run

        steps = list(run_steps(self.run, self.prepared.kinds))
        course = Course(self.run, steps) if self.recorder.is_main else None
        with within_run(course.position) if course else nullcontext():
            for number, step in enumerate(steps):
                if course:
                    course.reach(number)
                self._take(step)
        if self._wanted("report") and self.recorder.is_main:
            self._report()

    def _take(self, step: Step) -> None:
        """Carry out one phase."""
        t, place = step.t, step.place
        if step.phase == "score" and place.folder.name in (ORACLE, ROUTED):
            self._route(place, step.tasks)
        elif step.phase == "score":
            self._score(step)
        elif isinstance(place, ExpertPlace):
            self._train(t, place)
        elif isinstance(place, MergePlace):
            self._merge(t, place)

    def _train(self, t: int, place: ExpertPlace) -> None:
        stage = self.run.stage(t)
        if not self._wanted("train"):
            return
        if self._from_main(lambda: place.is_done("train")):
            if self.recorder.is_main:
                remove(place.checkpoints)  # left by a kill right after writing the record
                self._follow(place, stage)
        elif stage.dataset:
            self._finetune(t, place)
        else:
            with self.recorder.phase(place, "train") as record:
                record.update(self._add_vector(t, place, stage) if stage.minus else self._give(stage))
        if self.recorder.is_main:
            self.trackers.stage_is_over(place, place.record("train").get("steps", 0))

    def _follow(self, place: ExpertPlace, stage: Stage) -> None:
        """Record the new folder of a moved expert."""
        record, folder = place.record("train"), self.prepared.given.get(stage.expert or "")
        if folder and record.get("given", str(folder)) != str(folder):
            require_whole(
                [folder / name for name in changed_files(folder, record["given_files"])], place.folder, "train"
            )
            place.finish("train", {**record, "given": str(folder)})

    def _finetune(self, t: int, place: ExpertPlace) -> None:
        from hf_contmerge.loop._job import joint_job, train_job
        from hf_contmerge.loop.inputs import check_start
        from hf_contmerge.loop.stages import train_at

        self._from_main(lambda: check_start(self.run, self.prepared.base, t, place.kind))
        if t == 1 and self.prepared.published:
            self._from_main(self.prepared.published.check)
        joint = place.kind == JOINT
        job = joint_job(self.run, self.prepared) if joint else train_job(self.run, self.prepared, t, place.kind)
        on_log = self.trackers.of(place, "train")
        if self.experts:
            from hf_contmerge.loop._shared import SharedExperts, train_once

            train_once(SharedExperts(self.experts), place, job, self.recorder, on_log=on_log)
        else:
            train_at(place, job, self.recorder, on_log=on_log)

    def _add_vector(self, t: int, place: ExpertPlace, stage: Stage) -> Record:
        """Write base + (expert - minus)."""
        from hf_contmerge.merging.stream import write_sum
        from hf_contmerge.merging.vectors import vector_record
        from hf_contmerge.models.weights import weights_sha256

        assert stage.expert
        assert stage.minus
        expert, minus = self.prepared.given[stage.expert], self.prepared.given[stage.minus]
        if not self.recorder.is_main:
            return {}
        write_sum(self.prepared.base, expert, minus, place.scratch("expert"))
        before = self.run.expert(t - 1, place.kind).model if t > 1 else None
        vector = vector_record(self.prepared.base, before, expert, minus)
        digest = weights_sha256(place.publish("expert"))
        return {"expert": stage.expert, "minus": stage.minus, "vector": vector, "model_sha256": digest}

    def _give(self, stage: Stage) -> Record:
        from hf_contmerge.models.experts import expert_sha256
        from hf_contmerge.models.identity import model_files

        assert stage.expert
        folder = self.prepared.given[stage.expert]
        if not self.recorder.is_main:
            return {}
        return {
            "expert": stage.expert, "given": str(folder), "model_sha256": expert_sha256(folder),
            "given_files": digests_of(folder, model_files(folder)),
        }  # fmt: skip

    def _merge(self, t: int, place: MergePlace) -> None:
        entry = place.entry
        starts_next = self.prepared.kinds[entry.name].startswith("merged") and t < len(self.run.recipe.stages)
        if not self._wanted("merge") and not starts_next:
            return
        if not self._from_main(lambda: place.is_done("merge")):
            from hf_contmerge.loop._job import MergeJob
            from hf_contmerge.loop._merge import merge_at

            job = MergeJob(self.run, self.prepared, self._measuring("validation"), t, place)
            self._from_main(job.check)
            record = merge_at(job)
            if self.recorder.is_main:
                self.trackers.merged(place, record)
        if self.recorder.is_main:
            from hf_contmerge.loop._earlier import drop_checkpoints

            drop_checkpoints(self.run, t, self.prepared.kinds)
        if t > 1 and self.recorder.is_main:
            self.run.merged(t - 1, entry).prune()

    def _score(self, step: Step) -> None:
        if not self._wanted("score"):
            return
        place = step.place
        model = place.model if isinstance(place, ExpertPlace | MergePlace) else self._row_0()
        from hf_contmerge.loop.stages import measure_at

        how = self._measuring("test" if self.run.recipe.tunes else "all")
        if place.folder.name == IN_CONTEXT:
            how = self._in_context(how)
        check, on_log = partial(self._check, place, model), self.trackers.of_scores(step.t, place)
        measure_at(place, model, step.tasks, how, check=check, on_log=on_log)
        if self.recorder.is_main:
            self._keep_keys(place)

    def _row_0(self) -> Path:
        """Return the model before the first stage."""
        return self.prepared.published.model if self.prepared.published else self.prepared.base

    def _check(self, place: Place, model: Path) -> None:
        """Raise an error for a changed model of a place."""
        from hf_contmerge.loop.inputs import check_model_of

        if self.prepared.published and model == self.prepared.published.model:
            self.prepared.published.check()
        else:
            check_model_of(self.run, place, model)

    def _in_context(self, how: Measuring) -> Measuring:
        from dataclasses import replace

        from hf_contmerge.scoring.in_context import InContext

        return replace(how, shown=InContext(self.run.recipe, self.prepared.data, self.prepared.base))

    def _route(self, place: Place, tasks: Sequence[Task]) -> None:
        if self._wanted("score"):
            from hf_contmerge.loop._routed import route_at

            route_at(self.run, self.prepared, place, tasks, self._measuring("all"))

    def _measuring(self, part: DocumentPart) -> Measuring:
        from dataclasses import replace

        from hf_contmerge.loop.stages import Measuring
        from hf_contmerge.scoring.cache import ScoreCache

        recipe, quiet = self.run.recipe, part == "validation"
        return Measuring(
            recipe.evaluate, self.run.tasks, self.prepared.base, replace(self.recorder, quiet=quiet), part,
            recipe.trust_remote_code,
            keep_texts=lambda place: place.folder == self.run.base.folder,  # the base has every task
            cache=None if quiet else ScoreCache.open(use=recipe.evaluate.cache, here=self._score_of),
        )  # fmt: skip

    def _score_of(self, key: str) -> TaskScore | None:
        """Return this run's score with a key.

        Equal weights may have several places.
        """
        from hf_contmerge.run.scores import load_scores

        if not self.scored:
            for _, place in self.run.places():
                self._keep_keys(place)
        place, name = self.scored.get(key, (None, ""))
        return load_scores(place).get(name) if place else None

    def _keep_keys(self, place: Place) -> None:
        """Remember the place of scores, for runs of many stages.

        Searching would grow with the cube of the stages.
        """
        for name, task in (place.record("score")["tasks"] if place.is_done("score") else {}).items():
            if key := task["details"].get("key"):
                self.scored.setdefault(key, (place, name))

    def _report(self) -> None:
        """Write report and record; an error costs the report, not the run."""
        try:
            from hf_contmerge.report.write import write_report

            picture = write_report(self.run)
            self.trackers.reported(picture)
            self.run.report.finish("report", {"recipe_sha256": self.run.recipe_sha256()})
        except Exception as error:
            cause = explain(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            LOG.warning(
                "Warning: the report was not written. %s. All other phases are done; write it with `contmerge report "
                "%s`, or run the same command again.", cause.rstrip("."), self.run.folder,
            )  # fmt: skip

    def _wanted(self, phase: Phase) -> bool:
        return PHASES.index(phase) <= self.last_phase

    def _from_main(self, ask: Callable[[], T]) -> T:
        """Broadcast rank 0's answer.

        All ranks must agree on the finished phases.
        """
        return self.recorder.crew.ranks.first(ask)
