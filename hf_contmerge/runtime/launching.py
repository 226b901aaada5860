"""Joins the ranks of torchrun, accelerate launch or a cluster's launcher."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from hf_contmerge.errors import ResourceError
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.device import cpu_only
from hf_contmerge.runtime.progress import progress_bar
from hf_contmerge.runtime.ranks import find_ranks
from hf_contmerge.runtime.stopping import share_stops

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_PATIENCE = 7200  # seconds; rank 0 may need more than NCCL's ten minutes to save a large model


def keep_freed_memory() -> None:
    """Keep freed memory for the process's next tensors.

    Only for our own processes, never from a library call. On a CPU, each training step frees and allocates gigabytes;
    glibc returns large blocks at once, and the kernel then clears each page of the next ones: a third of a step. The
    kept memory is below the peak, so the peak hardly grows, but it does not fall before the process ends. No effect
    without glibc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or none to open
        set_option = ctypes.CDLL(None).mallopt
        set_option(_TRIM_THRESHOLD, -1)
        set_option(_MMAP_MAX, 0)


def join_ranks(fields: Mapping[str, Any] = MappingProxyType({})) -> tuple[PartialState, Crew]:
    """Join the other ranks; return accelerate's state and our crew.

    A dead rank ends all others: its launcher ends the ranks on its machine, broken connections end those elsewhere.
    Time limits are for frozen machines: the recipe's `ddp_timeout` or two hours where ranks compute together, two days
    where they wait for rank 0 to look up, hash or publish files.

    Args:
        fields: the recipe's `train`; only `ddp_timeout` and `deepspeed` are read.

    Raises:
        ResourceError: DeepSpeed is requested but not installed.
    """
    _check_deepspeed(fields)
    patience = timedelta(seconds=float(fields.get("ddp_timeout") or _PATIENCE))
    joined = PartialState(cpu=cpu_only(), timeout=patience)
    device = torch.device("cpu") if cpu_only() else torch.device(str(joined.device))
    crew = Crew(ranks=find_ranks(), device=device, bar=progress_bar)
    share_stops(crew.ranks.largest)
    return joined, crew


def leave_ranks() -> None:
    """Disconnect from the other ranks, after all work.

    The threads of open connections would abort the exiting process. Not for use after a failure: it might wait for
    ranks that have ended.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launcher_uses(plugin: Literal["FSDP", "DEEPSPEED"]) -> bool:
    """Return True if `accelerate launch` asked for a plugin."""
    return parse_flag_from_env(f"ACCELERATE_USE_{plugin}")


def _check_deepspeed(fields: Mapping[str, Any]) -> None:
    launched = launcher_uses("DEEPSPEED")
    asked: Any = fields.get("deepspeed")
    if (launched or asked) and importlib.util.find_spec("deepspeed") is None:
        where = "the launcher (ACCELERATE_USE_DEEPSPEED)" if launched else f"train.deepspeed ({asked})"
        raise ResourceError(
            f"{where} asks for DeepSpeed, which is not installed. Install it with "
            "`pip install 'hf_contmerge[deepspeed]'`, or launch with FSDP2 (recipes/accelerate/fsdp2.yaml) or DDP."
        )
