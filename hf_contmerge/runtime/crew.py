"""Shares tensor work among ranks and threads.

Memory is bounded. One thread works on each tensor, with single-threaded linear algebra. Results therefore do not depend
on the number of ranks and threads, and all cores stay busy although the decomposition of a single matrix scales badly.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from hf_contmerge.runtime.device import exact_products, load_linear_algebra
from hf_contmerge.runtime.ranks import OneRank, Ranks, T

MEMORY_SHARE = 0.5
"""Share of the memory free at the start, for tensors in flight."""


@dataclass(frozen=True)
class Job:
    """The work on one tensor."""

    name: str
    cost: float
    """Seconds, roughly; only the ratio to other jobs counts."""
    memory: int
    """Bytes in flight during the work."""
    nbytes: int
    """Bytes read and written, for the progress bar."""
    group: int = 0
    """Number of the output file. Each file is written by one host."""


Bar = Callable[[Sequence[Job], str], AbstractContextManager[Callable[[Job], None]]]
"""Opens a progress bar for jobs; the function that it gives is called with each finished job."""


@dataclass(frozen=True)
class Crew:
    """The threads of this process, among the ranks of its job.

    Attributes:
        ranks: all processes of the job.
        workers: threads of this process; 0 for an equal share of the host's usable cores.
        device: for the arithmetic.
        bar: context manager over jobs and a title; yields the callback for each finished job.
    """

    ranks: Ranks = field(default_factory=OneRank)
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bar: Bar = lambda _jobs, _what: nullcontext(lambda _job: None)

    def thread_count(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or max(1, cores // self.ranks.per_host)

    def mine(self, jobs: Sequence[Job]) -> list[Job]:
        """Return this rank's share of the jobs, costliest first."""
        hosts = max(1, self.ranks.size // self.ranks.per_host)
        host, local = divmod(self.ranks.rank, self.ranks.per_host)
        if hosts > 1:  # two hosts must not write into the same pages of a file
            files: dict[int, float] = {}
            for job in jobs:
                files[job.group] = files.get(job.group, 0.0) + job.cost
            ours = set(_fair_shares(sorted(files), files.__getitem__, hosts)[host])
            jobs = [job for job in jobs if job.group in ours]
        return _fair_shares(jobs, lambda job: job.cost, self.ranks.per_host)[local]

    def run(
        self,
        jobs: Sequence[Job],
        work: Callable[[Job], T],
        *,
        what: str,
        prefetch: Callable[[Job], None] = lambda _job: None,
    ) -> dict[str, T]:
        """Run this rank's jobs; return the results of all ranks by name.

        `prefetch` is called with upcoming jobs, to overlap reading and computing. The first error of any rank is
        raised on all ranks.
        """
        done = self.ranks.all(lambda: self._run_mine(self.mine(jobs), work, what, prefetch))
        return {name: result for part in self.ranks.gather(done) for name, result in part.items()}

    def _run_mine(
        self, jobs: Sequence[Job], work: Callable[[Job], T], what: str, prefetch: Callable[[Job], None]
    ) -> dict[str, T]:
        count = min(self.thread_count(), len(jobs))
        queue, results, errors = iter(range(len(jobs))), {}, []
        lock, budget = threading.Lock(), _MemoryBudget(_free_memory(self.device) / self.ranks.per_host * MEMORY_SHARE)

        def work_through() -> None:
            torch.set_num_threads(1)  # the setting is per thread
            while not errors:
                with lock:
                    number = next(queue, None)
                if number is None:
                    return
                job = jobs[number]
                try:
                    for ahead in jobs[number + count : number + count + 1]:
                        prefetch(ahead)
                    with budget.reserve(job.memory):
                        result = work(job)
                    with lock:
                        results[job.name] = result
                        advance(job)
                except BaseException as error:  # raised again below, in the waiting thread
                    errors.append(error)
                    return

        threads_before = torch.get_num_threads()
        load_linear_algebra(self.device)
        try:
            with exact_products(), self.bar(jobs, what) as advance:
                threads = [_Worker(work_through) for _ in range(count)]
                try:
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.ended.wait()
                except BaseException as error:  # a stop: no thread may write once its folder is removed
                    errors.append(error)
                    for thread in threads:
                        if thread.ident is not None:  # else it has not begun, and sees the error first
                            thread.ended.wait()
        finally:
            torch.set_num_threads(threads_before)  # a thread's setting partly changes the process's
        if errors:
            raise errors[0]
        return results


class _Worker(threading.Thread):
    """A thread that can be waited for again after a signal.

    `join` cannot before Python 3.13: interrupted by an exception, it takes the running thread for ended. No daemon: C++
    aborts a process that ends while one of its products runs.
    """

    def __init__(self, do: Callable[[], None]) -> None:
        super().__init__()
        self._do, self.ended = do, threading.Event()

    def run(self) -> None:
        try:
            self._do()
        finally:
            self.ended.set()


class _MemoryBudget:
    """Admits threads while their bytes fit; an oversized job runs alone."""

    def __init__(self, size: float) -> None:
        self._free, self._inside, self._changed = size, 0, threading.Condition()

    @contextmanager
    def reserve(self, need: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: need <= self._free or not self._inside)
            self._free, self._inside = self._free - need, self._inside + 1
        try:
            yield
        finally:
            with self._changed:
                self._free, self._inside = self._free + need, self._inside - 1
                self._changed.notify_all()


def _fair_shares(items: Iterable[T], cost: Callable[[T], float], parts: int) -> list[list[T]]:
    """Divide items into parts of similar cost: greedy, costliest item first."""
    shares: list[list[T]] = [[] for _ in range(parts)]
    heap = [(0.0, part) for part in range(parts)]
    for item in sorted(items, key=cost, reverse=True):
        total, part = heapq.heappop(heap)
        shares[part].append(item)
        heapq.heappush(heap, (total + cost(item), part))
    return shares


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
