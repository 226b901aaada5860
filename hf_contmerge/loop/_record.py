"""Execution of a phase: record, log lines, errors."""

from __future__ import annotations

import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from hf_contmerge.errors import ContmergeError, FullDiskError, ResourceError, in_place_of, size
from hf_contmerge.run.places import ExpertPlace, Place, Record
from hf_contmerge.run.recipe.phases import Phase
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.files import remove
from hf_contmerge.runtime.progress import run_position
from hf_contmerge.runtime.refusals import FULL, explain, free_bytes, refusals

LOG = logging.getLogger(__name__)

_NO_MEMORY = re.compile("(not enough|can't allocate|Cannot allocate) memory")  # torch's messages on a CPU


@dataclass(frozen=True)
class Recorder:
    """Writes each phase's record: time, memory, device."""

    folder: Path
    """Folder of the run or state. Places are named relative to it; its disk is checked."""
    ranks: PartialState
    crew: Crew
    quiet: bool = False
    """Log nothing."""
    need: Callable[[], int] | None = None
    """Returns the bytes that the unfinished phases will write, for the message on a full disk."""

    @property
    def is_main(self) -> bool:
        return self.crew.ranks.is_main

    @contextmanager
    def phase(self, place: Place, phase: Phase) -> Iterator[Record]:
        """Yield a phase's record; write it at the end.

        All ranks wait for the record.

        Raises:
            ResourceError: the disk refuses a file, or the memory is full.
        """
        what = f"{phase} {str(place.folder.relative_to(self.folder)).removeprefix('stages/')}"
        self._log("%s%s ...", run_position(": "), what)
        record: Record = {}
        start = time.monotonic()
        try:
            with refusals(place.folder):
                yield record
                if self.is_main:
                    self._finish(place, phase, record, time.monotonic() - start)
        except (OSError, RuntimeError, MemoryError, FullDiskError) as error:
            raise self._explained(error, what) or error from error
        if self.is_main:
            self._log("%s: %.0f s", what, record["seconds"])
        self.crew.ranks.barrier()

    def _finish(self, place: Place, phase: Phase, record: Record, seconds: float) -> None:
        record["seconds"] = round(seconds, 1)
        record["peak_memory_bytes"] = peak_memory()
        record["device"], record["processes"] = str(self.ranks.device), self.ranks.num_processes
        place.finish(phase, record)
        if isinstance(place, ExpertPlace) and phase == "train":
            remove(place.checkpoints)

    def _explained(self, error: Exception, what: str) -> ContmergeError | None:
        if isinstance(error, FullDiskError):
            return in_place_of(error, FullDiskError(f"{what}: {error}{self._room()}"))
        if isinstance(error, OSError) and error.errno is not None:
            again = "then rerun the command: finished phases are kept"
            room = self._room() if error.errno in FULL else ""
            return in_place_of(error, ResourceError(f"{what}: {explain(error)}, {again}.{room}"))
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error)):
            return in_place_of(error, _no_memory(error, what))
        return None

    def _room(self) -> str:
        if not self.need:
            return ""
        free = f"{size(free_bytes(self.folder))} of its disk are free"
        return f" The unfinished phases need about {size(self.need())} in {self.folder}; {free}."

    def _log(self, text: str, *values: object) -> None:
        if self.is_main and not self.quiet:
            LOG.info(text, *values)


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes.

    Linux's ru_maxrss inherits the parent's peak, so /proc/self/status is read first.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # another system
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _no_memory(error: Exception, what: str) -> ResourceError:
    return ResourceError(
        f"Out of memory ({what}): {str(error).splitlines()[0] if str(error) else 'allocation failed.'} Finished phases "
        "are kept. Use smaller batches (`per_device_train_batch_size`, `max_length`, `evaluate.batch_size`), "
        "`strategy: lora`, or more ranks with FSDP2."
    )
