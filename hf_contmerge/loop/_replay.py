"""Retraining of an expert with earlier stages' examples."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_contmerge.loop._entries import with_replay
from hf_contmerge.loop._job import MergeJob, train_job
from hf_contmerge.loop.inputs import check_start
from hf_contmerge.loop.stages import train_at
from hf_contmerge.merging.merge import FoldedExpert
from hf_contmerge.run.recipe.parts import Rung
from hf_contmerge.runtime.files import remove
from hf_contmerge.training.settings import make_strategies


def can_replay(job: MergeJob) -> bool:
    """Check for data of this and an earlier stage."""
    return bool(job.run.stage(job.t).dataset and any(job.run.stage(i).dataset for i in range(1, job.t)))


def replay(job: MergeJob, rung: Rung) -> FoldedExpert:
    """Retrain the stage's expert, once per rung."""
    place, settings = job.place.replayed, rung.model_dump(mode="json")
    ranks, memory = job.crew.ranks, job.place.folder / ".replay-memory"
    if not ranks.first(lambda: place.is_done("train") and place.record("train")["rung"] == settings):
        ranks.first(check_start, job.run, job.prepared.base, job.t, job.kind)
        ranks.first(_remember, job, memory, rung)
        plain = train_job(job.run, job.prepared, job.t, job.kind)
        again = replace(plain, train=with_replay(plain.train, rung), memory=memory, remembers=False, keep=0)
        train_at(place, again, replace(job.recorder, quiet=True), more={"rung": settings})
        ranks.first(remove, memory)
    ranks.first(place.check, "train", "expert")
    sha256 = ranks.first(lambda: place.record("train")["model_sha256"])
    return replace(job.expert_at(job.t, place.model, sha256), replayed=True)


def _remember(job: MergeJob, memory: Path, rung: Rung) -> None:
    """Add the replay strategy's memory of earlier stages."""
    remove(memory)
    earlier = job.run.memory_before(job.t, job.kind)
    if earlier:
        shutil.copytree(earlier, memory, dirs_exist_ok=True)
    remove(memory / "replay")
    strategies = make_strategies(with_replay(job.run.recipe.train, rung))
    if strategies.synthesis():
        return
    known: Any = nn.Module()
    known.name_or_path = str(job.prepared.base)  # whose tokenizer counts, if the memory's size is in tokens
    chain: list[Path] = []
    for i in range(1, job.t):
        stage = job.run.stage(i)
        if stage.dataset:
            chain.append(memory / f".replay-{i}")
            chain[-1].mkdir(parents=True)
            data = job.prepared.data[stage.name].train
            strategies.parts["replay"].remember(known, data, chain[-2] if len(chain) > 1 else None, chain[-1])
    chain[-1].rename(memory / "replay")
    for folder in chain[:-1]:
        remove(folder)
