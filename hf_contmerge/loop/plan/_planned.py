"""Inputs of the estimates: the checked run and its host."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_contmerge.loop.plan._dry_step import Work
from hf_contmerge.loop.plan._machine import Machine, Speeds
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.models.experts import stored_weights
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.training.data import StageData
from hf_contmerge.training.tokenizer import stage_tokenizer

_HELD_BY_MALLOC = 1.2
"""Resident memory over peak live bytes of a step on a CPU: the allocator keeps freed blocks of a few megabytes.
Measured: 1.24 in two runs of a model of 19M parameters, full and lora."""


class Cost(NamedTuple):
    """Cost of a phase."""

    memory: int
    """Bytes of main memory, of all processes of this machine."""
    vram: int
    """Bytes of each GPU's memory."""
    seconds: float


@dataclass(frozen=True, eq=False)  # hashed by identity: the key of cached dry runs
class PlannedRun:
    """A checked run, ready for estimates."""

    run: Run
    base: Path
    """Folder with config, tokenizer and headers; weights may be missing."""
    rules: Mapping[str, MergeRule]
    kinds: Mapping[str, str]
    given: Mapping[str, Path]
    data: Mapping[str, StageData]
    tasks: Path
    """Folder of the tasks made from datasets."""

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @functools.cached_property
    def weights(self) -> Weights:
        return Weights(self.base)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return stage_tokenizer(self.base, self.recipe.train, trust_remote_code=self.recipe.trust_remote_code)

    def expert_dtype(self, t: int) -> torch.dtype:
        """Return the dtype of stage t's expert."""
        stage = self.run.stage(t)
        if stage.expert and not stage.minus:
            given = stored_weights(self.given[stage.expert])
            return given.dtype(given.floating()[0])
        return torch.float32


@dataclass(frozen=True)
class Host:
    """The machine and the processes of the job."""

    machine: Machine
    speeds: Speeds
    start: int
    """Bytes of a process with loaded libraries."""
    processes: int
    """Processes on this machine, each with a full model (DDP)."""

    def memory(self, nbytes: int) -> int:
        """Return the bytes of all processes with `nbytes` each."""
        return self.processes * (self.start + nbytes)

    def computing(self, work: Work) -> float:
        """Return the seconds of a step's operations."""
        speeds = self.speeds
        others = sum(n / speeds.flops.get(d, speeds.flops[torch.float32]) for d, n in work.flops.items())
        return speeds.products(work.products) + others + work.moved / speeds.moved + work.calls * speeds.call

    def loading(self, nbytes: int) -> float:
        """Return the seconds of reading weights into memory."""
        return 2 * nbytes / self.speeds.moved * self.machine.cores

    def hashing(self, nbytes: int) -> float:
        """Return the seconds of a digest, on all cores."""
        return nbytes / (self.speeds.hashed * self.machine.cores)

    def writing(self, nbytes: int) -> float:
        """Return the seconds of writing to the run folder's disk."""
        return nbytes / self.speeds.written if self.speeds.written else 0.0

    def saving(self, nbytes: int) -> float:
        """Return the seconds of writing a model with its digest."""
        return self.writing(nbytes) + self.hashing(nbytes)


def resident(nbytes: int) -> int:
    """Return the resident bytes of a step on a CPU."""
    return round(nbytes * _HELD_BY_MALLOC)
