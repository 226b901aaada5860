"""A phase at work: what is said of it, what its record tells of the machine, and what is made of its failures."""

from __future__ import annotations

import logging
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from hf_contmerge.errors import ResourceError
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, Place, Record
from hf_contmerge.run.recipe.schema import Phase
from hf_contmerge.runtime.files import remove

LOG = logging.getLogger(__name__)

_FULL = 2**24  # bytes free on a disk that is full: a little may have been given back
_NO_MEMORY = re.compile("(not enough|can't allocate|Cannot allocate) memory")  # torch's, on a processor


@contextmanager
def recorded_phase(run: Run, place: Place, phase: Phase, *, main: bool) -> Iterator[Record]:
    """Say what begins, let the caller fill the record, and write it as the last thing, if this is the `main` process.

    Raises ResourceError if the disk or the memory is full.
    """
    name = place.folder.relative_to(run.folder / "stages")
    if main:
        LOG.info("%s %s ...", phase, name)
    record: Record = {}
    start = time.monotonic()
    try:
        yield record
    except (OSError, RuntimeError, SafetensorError, MemoryError) as error:  # libraries say "full" in many ways
        raise _explained(error, f"{phase} {name}", run) or error from error
    if main:
        record["seconds"] = round(time.monotonic() - start, 1)
        record["peak_memory_bytes"] = peak_memory()
        place.finish(phase, record)
        if isinstance(place, ExpertPlace) and phase == "train":
            remove(place.checkpoints)
        LOG.info("%s %s: %.0f s", phase, name, record["seconds"])


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had at once.

    Linux's ru_maxrss begins at the mark of whoever started the process, so its own page of the kernel is asked first.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # another system
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _explained(error: Exception, what: str, run: Run) -> ResourceError | None:
    kept = "What is done is kept"
    if shutil.disk_usage(run.folder).free < _FULL:
        return ResourceError(
            f"The disk of {run.folder} is full ({what}). {kept}: free some room and give the same command again."
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error)):
        return ResourceError(
            f"Out of memory ({what}): {str(error).splitlines()[0] if str(error) else 'no more was to be had'} {kept}. "
            "Use smaller batches (`per_device_train_batch_size`, `max_length`, `evaluate.batch_size`), "
            "`strategy: lora`, or more ranks with FSDP2."
        )
    return None
