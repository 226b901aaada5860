"""A stage's experts at earlier steps, for the guard."""

from __future__ import annotations

from dataclasses import replace

from hf_contmerge.loop._job import MergeJob, train_job
from hf_contmerge.merging.merge import FoldedExpert
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.runtime.files import remove
from hf_contmerge.training.finetune import earlier_experts, expert_at_checkpoint


def earlier_steps(job: MergeJob) -> list[int]:
    """Return the steps with a kept checkpoint, the latest first."""
    folder = job.run.expert(job.t, job.kind).earlier
    return job.crew.ranks.first(earlier_experts, folder)


def expert_at(job: MergeJob, step: int) -> FoldedExpert:
    """Return the stage's expert at an earlier step; written once."""
    place, ranks = job.place.earlier_at(step), job.crew.ranks
    if not ranks.first(place.is_done, "train"):
        checkpoint = job.run.expert(job.t, job.kind).earlier / f"checkpoint-{step}"
        scratch = ranks.first(place.scratch, "expert")
        with replace(job.recorder, quiet=True).phase(place, "train") as record:
            plain = train_job(job.run, job.prepared, job.t, job.kind)
            record.update(expert_at_checkpoint(plain, checkpoint, scratch))
            if job.recorder.is_main:
                record["model_sha256"] = expert_sha256(place.publish("expert"))
    ranks.first(place.check, "train", "expert")
    sha256 = ranks.first(lambda: place.record("train")["model_sha256"])
    return replace(job.expert_at(job.t, place.model, sha256), earlier=step)


def drop_earlier(job: MergeJob, *, but: int = 0) -> None:
    """Remove the experts of earlier steps, but one (0: none)."""
    kept = job.place.earlier_at(but).folder
    for folder in [*kept.parent.glob("*")] if but else [kept.parent]:
        if folder != kept:
            remove(folder)


def drop_checkpoints(run: Run, t: int, kinds: dict[str, str]) -> None:
    """Remove a stage's kept checkpoints after all its merges."""
    for kind in set(kinds.values()):
        merges = [run.merged(t, entry) for entry in run.recipe.merge if kinds[entry.name] == kind]
        if all(place.is_done("merge") for place in merges):
            remove(run.expert(t, kind).earlier)
