"""One phase at one place: train or measure.

All ranks call each function. Finished phases are not repeated; interrupted phases resume.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_contmerge.errors import RunError
from hf_contmerge.loop._record import Recorder
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.statistics import statistics_digest
from hf_contmerge.run.places import ExpertPlace, Place, Record
from hf_contmerge.run.recipe.changes import flat_fields
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.recipe.phases import use_of
from hf_contmerge.run.scores import Scores, load_scores, scored_tasks, write_scores
from hf_contmerge.runtime.files import make_folder, remove
from hf_contmerge.runtime.records import read_record, write_record
from hf_contmerge.scoring.cache import ScoreCache
from hf_contmerge.scoring.in_context import InContext
from hf_contmerge.scoring.keys import SCORES_VERSION, DocumentPart, ModelKey
from hf_contmerge.scoring.score import score_model
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.synthesis import synthesis_record, with_synthesis

OnLog = Callable[[int, Mapping[str, float]], None]


Check = Callable[[], None]


def _no_check() -> None:
    return None


def _no_log(_step: int, _point: Mapping[str, float]) -> None:
    return None


def train_at(
    place: ExpertPlace, job: TrainJob, recorder: Recorder, *, on_log: OnLog = _no_log, more: Mapping[str, Any] = {}
) -> Record:
    """Train an expert at a place; resume checkpoints.

    Args:
        place: output folder for `expert`, `memory` and `synthesised` (if the strategies ask for them), train.json.
        job: model, data and settings.
        recorder: writer of the record.
        on_log: callback for each point of the loss curve.
        more: further fields of the record.

    Returns:
        The record.
    """
    scratch = {name: place.folder / f".{name}" for name in ("expert", "memory")}
    with recorder.phase(place, "train") as record:
        recorder.crew.ranks.first(_clear, place, scratch["memory"])
        recorder.crew.ranks.first(_begin, place, job)
        job = with_synthesis(job, place.synthesised, recorder.crew.ranks)
        outcome = train_expert(
            job, scratch["expert"], checkpoints=place.checkpoints,
            memory_out=scratch["memory"] if job.remembers else None, earlier=place.earlier, on_log=on_log,
        )  # fmt: skip
        settings = job.train.model_dump(mode="json")
        record.update({"start": str(job.start), "settings": settings, "seed": job.seed, **outcome})
        record.update({**synthesis_record(job), **more})
        if recorder.is_main:
            if scratch["memory"].exists():
                place.publish("memory")
            expert = place.publish("expert")
            record["model_sha256"] = expert_sha256(expert)
            if digest := statistics_digest(expert):
                record["statistics_sha256"] = digest
    return record


def _clear(place: ExpertPlace, memory: Path) -> None:
    place.scratch("expert")
    remove(memory)


def _begin(place: ExpertPlace, job: TrainJob) -> None:
    """Note a training's data and settings; compare those of its checkpoints.

    Raises RunError where they differ: half of the expert would be of the old ones, and its record of the new.
    """
    file, settings = place.checkpoints / "begun.json", job.settings()
    fields = dict(flat_fields({"train": settings.pop("train")}))
    start = {} if job.start == job.base else {"start_sha256": expert_sha256(job.start)}
    facts = {**start, **settings, **{field: value for field, value in fields.items() if use_of(field).undoes}}
    facts = json.loads(json.dumps(facts))
    if file.exists() and any(place.checkpoints.glob("checkpoint-*")):
        before = read_record(file, f"Remove {place.folder} to begin the training again.")["job"]
        other = [name.removesuffix("_sha256") for name in facts | before if facts.get(name) != before.get(name)]
        if other:
            raise RunError(
                f"The training in {place.folder} was begun with other values of {', '.join(other)}, and it cannot go "
                "on with these. Put the old ones back, or remove this folder to begin the training again."
            )
    make_folder(place.checkpoints)
    write_record(file, {"job": facts})


@dataclass(frozen=True)
class Measuring:
    """Settings for measuring all models of a comparison."""

    evaluate: Evaluate
    task_folder: Path
    base: Path
    recorder: Recorder
    part: DocumentPart = "all"
    trust_remote_code: bool = False
    keep_texts: Callable[[Place], bool] = lambda _place: False
    """Whether a place stores the documents' texts with the scores."""
    cache: ScoreCache | None = None
    """None: the machine's cache, unless `evaluate` disables it."""
    shown: InContext | None = None
    """Training examples in front of the questions."""

    def measure(self, model: Path, tasks: Sequence[Task]) -> tuple[ModelKey, Scores]:
        """Return a model's digest and dtype, and rank 0's scores."""
        return score_model(
            model, tasks, task_folder=self.task_folder, evaluate=self.evaluate, ranks=self.recorder.crew.ranks,
            base=self.base, cache=self.cache, trust_remote_code=self.trust_remote_code, part=self.part,
            shown=self.shown,
        )  # fmt: skip


def measure_at(
    place: Place,
    model: Path,
    tasks: Sequence[Task],
    how: Measuring,
    *,
    check: Check = _no_check,
    on_log: OnLog = _no_log,
) -> None:
    """Measure a place's missing tasks and store their scores.

    `check`: called on rank 0 before; raises an error for a model that is not as recorded.
    """
    recorder = how.recorder
    have = recorder.crew.ranks.first(_names_at, place, how)
    missing = [task for task in tasks if task.name not in have]
    if not missing:
        return
    recorder.crew.ranks.first(check)
    with recorder.phase(place, "score") as record:
        scored, scores = how.measure(model, missing)
        if recorder.is_main:
            keep_scores(record, place, {**(load_scores(place) if have else {}), **scores}, how)
            record |= {"scored_sha256": scored.sha256, "scored_in": scored.dtype}
        on_log(len(have), {f"{name}/{s.metric}": s.value for name, s in scores.items()})


def keep_scores(record: Record, place: Place, scores: Scores, how: Measuring) -> None:
    """Write a place's scores and list them in its record."""
    record["tasks"] = write_scores(place, scores, texts=how.keep_texts(place))
    record["measured_by"] = _measured_by(how)


def _names_at(place: Place, how: Measuring) -> set[str]:
    """Return a place's tasks scored with these settings."""
    if not place.is_done("score"):
        return set()
    by = place.record("score").get("measured_by")
    return set(scored_tasks(place)) if by in (None, _measured_by(how)) else set()


def _measured_by(how: Measuring) -> dict[str, Any]:
    """Return the settings behind a score, and the version of our numbers."""
    shown = {"shots": how.shown.shots} if how.shown else {}
    return {**how.evaluate.measured_by(), "version": SCORES_VERSION, **shown}
