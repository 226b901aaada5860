"""Experts shared by a study's runs: equal jobs are trained once.

    experts/<digest of the job>/  expert/ memory/ train.json

A run that needs an expert for the first time trains it and links its files here. Other runs link them from here. Each
file is one on the disk, however many runs have it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_contmerge.errors import RunError
from hf_contmerge.loop._record import Recorder
from hf_contmerge.loop.stages import OnLog, train_at
from hf_contmerge.run.places import ExpertPlace, Record
from hf_contmerge.runtime.digests import digests_below
from hf_contmerge.runtime.files import FOREVER, FolderLock, link_files, remove
from hf_contmerge.runtime.ranks import Ranks
from hf_contmerge.training.job import TrainJob, rows_sha256

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedExperts:
    """A folder of trained experts by the digest of their jobs."""

    folder: Path

    @contextmanager
    def claimed(self, job: TrainJob, ranks: Ranks) -> Iterator[ExpertPlace]:
        """Yield the place of a job's expert; equal jobs wait."""
        with ExitStack() as held:

            def claim() -> ExpertPlace:
                place = ExpertPlace(self.folder / _digest(job), "shared")
                place.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FolderLock(place.folder, wait=FOREVER))
                return place

            yield ranks.first(claim)


def train_once(shared: SharedExperts, place: ExpertPlace, job: TrainJob, recorder: Recorder, *, on_log: OnLog) -> None:
    """Train an expert, or link an equal job's, on all ranks."""
    ranks = recorder.crew.ranks
    with shared.claimed(job, ranks) as store:
        if ranks.first(_is_whole, store):
            ranks.first(_link, store, place, {"start": str(job.start), "shared": store.folder.name})
            LOG.info("train %s: linked, trained before in this study", place.folder.parent.parent.name)
        else:
            more = {"examples_sha256": rows_sha256(job.data.train)}  # a study must not mix two states of its data
            train_at(place, job, recorder, on_log=on_log, more=more)
            ranks.first(_link, place, store, {})


def _is_whole(store: ExpertPlace) -> bool:
    """Return True for an undamaged stored expert; drop a damaged one."""
    try:
        whole = store.is_done("train") and not store.damaged("train")
    except RunError:
        whole = False
    if not whole:
        store.undo("train")
    return whole


def _link(source: ExpertPlace, target: ExpertPlace, more: Record) -> None:
    """Link an expert's files and copy its record."""
    for name in ("expert", "memory", "earlier", "synthesised"):
        if (source.folder / name).is_dir():
            link_files(source.folder / name, target.scratch(name))
            target.publish(name)
    target.finish("train", {**source.record("train"), **more})
    remove(target.checkpoints)  # of a training that was stopped before another run had done it


def _digest(job: TrainJob) -> str:
    """Return the digest of a job's inputs."""
    remembering = job.make(job.train).overriding("remember") if job.remembers else []
    inputs: dict[str, Any] = {
        **job.inputs(), "stage": job.stage, "memory": digests_below(job.memory) if job.memory else None,
        "remembering": remembering, **({"keep": job.keep} if job.keep else {}),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]
