"""How this process joins the others of its job: torchrun's, accelerate launch's, or a cluster's launcher."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState

from hf_contmerge.errors import ResourceError
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.device import cpu_only
from hf_contmerge.runtime.progress import progress_bar
from hf_contmerge.runtime.ranks import find_ranks

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_PATIENCE = 7200  # seconds; saving a large model takes the first rank longer than NCCL's ten minutes


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next tensors. Only for a process that is ours alone.

    On a CPU, each step of training frees and takes gigabytes. glibc gives large blocks back at once, and the kernel
    then clears each page of the next ones, which takes a third of a step. Without glibc, nothing is done. What is kept
    is below the peak, so the peak hardly grows; it does not fall before the process ends.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or none that can be opened
        set_option = ctypes.CDLL(None).mallopt
        set_option(_TRIM_THRESHOLD, -1)
        set_option(_MMAP_MAX, 0)


def join_ranks(fields: Mapping[str, Any] = MappingProxyType({})) -> tuple[PartialState, Crew]:
    """Meet the other ranks; return them as accelerate knows them, and as our own work is shared among them.

    `fields`: of the recipe's `train`; `ddp_timeout` and `deepspeed` are looked at.

    A rank that dies takes the others with it: the launcher ends those on its machine, and connections that break end
    those on others. Time limits are for machines that freeze: `ddp_timeout` of the recipe, or two hours, where ranks
    compute together, and days where they wait for the first to look things up, hash or publish.

    Raises ResourceError if DeepSpeed is asked for and not installed.
    """
    _check_deepspeed(fields)
    patience = timedelta(seconds=float(fields.get("ddp_timeout") or _PATIENCE))
    joined = PartialState(cpu=cpu_only(), timeout=patience)
    device = torch.device("cpu") if cpu_only() else torch.device(str(joined.device))
    return joined, Crew(ranks=find_ranks(), device=device, bar=progress_bar)


def leave_ranks() -> None:
    """Part from the other ranks at the end of all work: their connections' threads would abort a process that ends.

    Not after a failure, where it might wait for ranks that are gone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_deepspeed(fields: Mapping[str, Any]) -> None:
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    asked: Any = fields.get("deepspeed")
    if (launched or asked) and importlib.util.find_spec("deepspeed") is None:
        where = "the launcher (ACCELERATE_USE_DEEPSPEED)" if launched else f"train.deepspeed ({asked})"
        raise ResourceError(
            f"{where} asks for DeepSpeed, which is not installed. Install it with "
            "`pip install 'hf_contmerge[deepspeed]'`, or launch with FSDP2 (recipes/accelerate/fsdp2.yaml) or DDP."
        )
