"""This machine: what it has, and how fast it is, by a calibration of about two seconds."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hf_contmerge.runtime.device import cpu_only

Shape = tuple[int, int, int, torch.dtype]
"""Of a matrix product: (rows, inner, columns) and the dtype of the factors."""

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_DISK_PROBE = 2**26
_TRIED = 8  # shapes of matrix products, of a step or a batch
_SIDE = 16384  # elements; of a wider matrix, as many are tried
_TURNS = 3  # of each measurement; the fastest counts, for what disturbs only ever slows down


@dataclass(frozen=True)
class Machine:
    """What there is. Bytes."""

    cores: int
    memory: int
    """Main memory that a process may use: the machine's, or the container's limit."""
    available: int
    """How much of it is free now."""
    gpus: tuple[int, ...]
    """Free memory of each GPU that will be used."""
    disk: int
    """Free on the disk of the run folder."""


@dataclass(frozen=True)
class Speeds:
    """What it does in a second. It was measured on a machine as quiet as processor seconds tell."""

    flops: dict[torch.dtype, float]
    """Of matrix products, by the dtype of the factors; all threads, or one GPU."""
    moved: float
    """Bytes read and written by operations on elements; all threads, or one GPU."""
    call: float
    """Seconds that an operation costs at least."""
    decomposed: float
    """Operations of a float64 symmetric eigendecomposition, one thread; counted as merge_tensor.job_of does."""
    hashed: float
    """Bytes of SHA-256, one thread."""
    written: float
    """Bytes to the disk of the run folder, with fsync."""

    def products(self, work: Mapping[Shape, int]) -> float:
        """Return the seconds of matrix products: shapes that make up most of the work are tried, for a skinny matrix
        or a wide one can be several times slower than a square one. The others go as fast as those on average.

        `work`: floating-point operations by shape.
        """
        done = seconds = 0.0
        for shape, flops in sorted(work.items(), key=lambda item: -item[1])[:_TRIED]:
            done, seconds = done + flops, seconds + flops / product_speed(shape)
        return seconds * sum(work.values()) / done if done else 0.0


def this_machine(folder: Path) -> Machine:
    """Look at the machine. `folder`: the run's, which need not exist yet."""
    there = _existing(folder)
    gpus = () if cpu_only() else tuple(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    memory = psutil.virtual_memory()
    limit = min([memory.total, *_limits()])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cores, limit, min(memory.available, limit), gpus, shutil.disk_usage(there).free)


def measure_speeds(folder: Path) -> Speeds:
    """Measure the machine where the run will compute and write; about two seconds."""
    device = torch.device("cpu" if cpu_only() else "cuda")
    size = 1024 if device.type == "cpu" else 8192
    flops = {d: 2 * size**3 / _product(size, d, device) for d in (torch.float32, torch.bfloat16)}
    return Speeds(flops, _moved(device), _call(device), _decomposed(), _hashed(), _written(_existing(folder)))


def _limits() -> list[int]:
    words = [path.read_text(encoding="ascii").strip() for path in _CGROUP_LIMITS if path.is_file()]
    return [int(word) for word in words if word.isdigit()]


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())


def _fastest(work: Callable[[], object], *, waits: bool = False) -> float:
    """Return the seconds of the fastest of a few turns, after one to warm up.

    Other programs make a turn longer on the clock, not in processor seconds, so that the smaller of the two counts;
    but where `work` waits for a device, the clock.
    """
    waits = waits or not cpu_only()
    work()
    found = []
    for _ in range(_TURNS):
        start, own = time.perf_counter(), time.process_time()
        work()
        if torch.cuda.is_available() and not cpu_only():
            torch.cuda.synchronize()
        on_the_clock, own = time.perf_counter() - start, time.process_time() - own
        found.append(on_the_clock if waits or own <= 0 else min(on_the_clock, own))
    return min(found)


@functools.cache
def product_speed(shape: Shape) -> float:
    """Measure the floating-point operations a second of products of a shape; of larger ones, of a part of them."""
    device = torch.device("cpu" if cpu_only() else "cuda")
    most = 2e9 if device.type == "cpu" else 2e12
    rows, inner, columns, dtype = shape
    inner, columns = min(inner, _SIDE), min(columns, _SIDE)
    rows = min(rows, max(64, round(most / (2 * inner * columns))))
    a, b = torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(columns, inner, dtype=dtype, device=device)
    return 2 * rows * inner * columns / _fastest(lambda: a @ b.T)


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return _fastest(lambda: a @ b)


def _moved(device: torch.device) -> float:
    """Time a mixture of what elements go through: an activation and a product, on tensors beyond the cache."""
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


def _decomposed(size: int = 384) -> float:
    draw = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _fastest(lambda: torch.linalg.eigh(draw @ draw.T))
    finally:
        torch.set_num_threads(threads)
    return (6 + 30) * size**3 / seconds


def _hashed() -> float:
    data = bytes(2**24)
    return len(data) / _fastest(lambda: hashlib.sha256(data).digest())


def _written(folder: Path) -> float:
    """Time a file that is written and synced. A folder that cannot be written is told of elsewhere: 0 then."""
    if not os.access(folder, os.W_OK):
        return 0.0
    with tempfile.TemporaryFile(dir=folder) as file:

        def work() -> None:
            file.seek(0)
            file.write(bytes(_DISK_PROBE))
            file.flush()
            os.fsync(file.fileno())

        return _DISK_PROBE / _fastest(work, waits=True)
