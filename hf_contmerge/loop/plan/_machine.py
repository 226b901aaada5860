"""This machine's resources and speeds."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hf_contmerge.merge_rules import MergeRule, Weight
from hf_contmerge.merging.trial import trial_of
from hf_contmerge.runtime.device import cpu_only, threads
from hf_contmerge.runtime.refusals import free_bytes

Shape = tuple[int, int, int, torch.dtype]
"""A matrix product: rows, inner, columns, dtype of the factors."""

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_DISK_PROBE = 2**26
_TRIED = 8  # matrix-product shapes measured per step or batch
_SIDE = 16384  # elements; wider matrices are cut to this
_TURNS = 3  # runs of each measurement; the fastest counts, since disturbances only slow down


@dataclass(frozen=True)
class Machine:
    """The machine's resources, in bytes."""

    cores: int
    memory: int
    """Usable main memory: the machine's, or the container's limit."""
    available: int
    """Free part of `memory` now."""
    gpus: tuple[int, ...]
    """Free memory of each usable GPU."""
    disk: int
    """Free on the disk of the run folder."""


@dataclass(frozen=True)
class Speeds:
    """The machine's speeds, per second."""

    flops: dict[torch.dtype, float]
    """Floating-point operations of matrix products, by the dtype of the factors; all threads, or one GPU."""
    moved: float
    """Bytes read and written by elementwise operations; all threads, or one GPU."""
    call: float
    """Minimum seconds per operation."""
    hashed: float
    """Bytes hashed with SHA-256, one thread."""
    written: float
    """Bytes written to the run folder's disk, with fsync."""

    def products(self, work: Mapping[Shape, int]) -> float:
        """Return the seconds of matrix products.

        The shapes with most work are measured, since skinny or wide matrices can be several times slower than square
        ones. The other shapes get the average speed of the measured ones.

        Args:
            work: floating-point operations by shape.
        """
        done = seconds = 0.0
        for shape, flops in sorted(work.items(), key=lambda item: -item[1])[:_TRIED]:
            done, seconds = done + flops, seconds + flops / product_speed(shape)
        return seconds * sum(work.values()) / done if done else 0.0


def this_machine(folder: Path) -> Machine:
    """Return this machine's resources. `folder` may be missing."""
    gpus = () if cpu_only() else tuple(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    memory = psutil.virtual_memory()
    limit = min([memory.total, *_limits()])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cores, limit, min(memory.available, limit), gpus, free_bytes(folder))


def measure_speeds(folder: Path) -> Speeds:
    """Measure this machine's speeds, in about two seconds; once a disk folder."""
    return _measure_speeds(_existing(folder))


@functools.cache
def _measure_speeds(folder: Path) -> Speeds:
    device = torch.device("cpu" if cpu_only() else "cuda")
    size = 1024 if device.type == "cpu" else 8192
    flops = {d: 2 * size**3 / _product(size, d, device) for d in (torch.float32, torch.bfloat16)}
    return Speeds(flops, _moved(device), _call(device), _hashed(), _written(folder))


def _limits() -> list[int]:
    limits = [path.read_text(encoding="ascii").strip() for path in _CGROUP_LIMITS if path.is_file()]
    return [int(limit) for limit in limits if limit.isdigit()]


def _existing(folder: Path) -> Path:
    """Return the folder or its nearest existing parent."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())


def _fastest(work: Callable[[], object], *, waits: bool = False) -> float:
    """Return the seconds of the fastest run, after a warm-up.

    Other programs lengthen wall time but not processor time, so the smaller of the two counts. Where `work` waits for a
    device, wall time counts.
    """
    waits = waits or not cpu_only()
    work()
    seconds = []
    for _ in range(_TURNS):
        start, own = time.perf_counter(), time.process_time()
        work()
        if torch.cuda.is_available() and not cpu_only():
            torch.cuda.synchronize()
        on_the_clock, own = time.perf_counter() - start, time.process_time() - own
        seconds.append(on_the_clock if waits or own <= 0 else min(on_the_clock, own))
    return min(seconds)


@functools.cache
def product_speed(shape: Shape) -> float:
    """Measure operations per second of a shape.

    Large shapes are cut.
    """
    device = torch.device("cpu" if cpu_only() else "cuda")
    most = 2e9 if device.type == "cpu" else 2e12
    rows, inner, columns, dtype = shape
    inner, columns = min(inner, _SIDE), min(columns, _SIDE)
    rows = min(rows, max(64, round(most / (2 * inner * columns))))
    a, b = torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(columns, inner, dtype=dtype, device=device)
    return 2 * rows * inner * columns / _fastest(lambda: a @ b.T)


@functools.cache
def rule_seconds(rule: MergeRule, weight: Weight) -> float:
    """Measure one thread's seconds of folding an expert into a weight."""
    trial = trial_of(rule, weight, torch.device("cpu" if cpu_only() else "cuda"))
    with threads(1):
        return trial.times * _fastest(trial.fold)


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return _fastest(lambda: a @ b)


def _moved(device: torch.device) -> float:
    """Measure bytes per second of elementwise operations.

    The tensors are larger than the cache.
    """
    a, b = (torch.ones(2**22 if device.type == "cpu" else 2**27, device=device) for _ in range(2))
    return 7 * a.nbytes / _fastest(lambda: torch.nn.functional.silu(a).exp() * b)


def _call(device: torch.device, count: int = 500) -> float:
    a = torch.ones(1, device=device, requires_grad=True)

    def work() -> None:
        b = a
        for _ in range(count):
            b = b * 1.0
        b.backward()

    return _fastest(work) / (2 * count)


def _hashed() -> float:
    data = bytes(2**24)
    return len(data) / _fastest(lambda: hashlib.sha256(data).digest())


def _written(folder: Path) -> float:
    """Measure write speed with fsync; 0 if read-only."""
    if not os.access(folder, os.W_OK):
        return 0.0
    with tempfile.TemporaryFile(dir=folder) as file:

        def work() -> None:
            file.seek(0)
            file.write(bytes(_DISK_PROBE))
            file.flush()
            os.fsync(file.fileno())

        return _DISK_PROBE / _fastest(work, waits=True)
