"""Work on many tensors, shared among the ranks of a job and the threads of a rank, at a bounded use of memory.

Each tensor is worked on by one thread, whose linear algebra has one thread too. So the result of a tensor depends
neither on how many threads and ranks there are nor on which of them it falls to, and all cores are busy although the
decomposition of a single matrix scales badly.
"""

from __future__ import annotations

import atexit
import heapq
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch

from hf_contmerge.errors import ContmergeError, mark_shared

T = TypeVar("T")

MEMORY_SHARE = 0.5
"""Of the memory that is free at the start, what the tensors in flight may take."""

_PATIENCE = timedelta(days=2)
"""How long a rank waits for the others. A launcher ends them all when one dies; hashing a large model takes hours."""


@dataclass(frozen=True)
class Job:
    """The work on one tensor."""

    name: str
    cost: float
    """Seconds, roughly: what counts is the ratio to other jobs."""
    memory: int
    """Bytes in flight while it is worked on."""
    nbytes: int
    """Bytes read and written, for the progress bar."""
    group: int = 0
    """The number of the file that it writes into; hosts share whole files."""


class Ranks(Protocol):
    """The processes of one job; the only thing that the engine knows of a launcher."""

    rank: int
    size: int
    per_host: int

    def gather(self, value: T) -> list[T]:
        """Return every rank's value on every rank, in rank order; a barrier too."""
        ...


class OneRank:
    """A process on its own."""

    rank, size, per_host = 0, 1, 1

    def gather(self, value: T) -> list[T]:
        return [value]


class LaunchedRanks:
    """The ranks that torchrun, accelerate launch or a cluster's launcher has started."""

    def __init__(self) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
            atexit.register(dist.destroy_process_group)  # its threads would abort a process that ends around them
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Lists of Python objects travel over gloo whatever backend the training uses.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.per_host = ranks_per_host(self.gather(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values


def find_ranks() -> Ranks:
    """Return the ranks of the job that this process belongs to."""
    return LaunchedRanks() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else OneRank()


def ranks_per_host(counts: Sequence[int]) -> int:
    """Return how many ranks share a host, from what each rank says; 1 where hosts have different numbers of them.

    1 is always safe: every rank then counts as a host, and writes files of its own.
    """
    return counts[0] if len(set(counts)) == 1 and len(counts) % counts[0] == 0 else 1


def together(ranks: Ranks, do: Callable[[], T], *, leader_only: bool = False) -> T:
    """Do something on all ranks, or on the first alone, and return this rank's (the first's) result everywhere.

    If it fails anywhere, every rank raises the first failure, so that no rank waits for one that is gone.
    """
    if ranks.size == 1:
        return do()
    value, failure = None, None
    try:
        if ranks.rank == 0 or not leader_only:
            value = do()
    except (ContmergeError, OSError, ValueError) as error:
        failure = error
    outcomes = ranks.gather((value if leader_only else None, failure))
    for _, error in outcomes:
        if error is not None:
            raise mark_shared(error)
    return cast(T, outcomes[0][0] if leader_only else value)


def main_first(ranks: Ranks, do: Callable[[], T]) -> T:
    """Do something on the first rank of all, then on the others, which find what it has fetched or written."""
    if ranks.size == 1:
        return do()
    found = [together(ranks, do if (ranks.rank == 0) == first else lambda: None) for first in (True, False)]
    return cast(T, found[0] if ranks.rank == 0 else found[1])


def in_turn(ranks: Ranks, do: Callable[[], T]) -> T:
    """Do something on the first rank of each host, then on the others: what it fetches or converts, they find."""
    if ranks.per_host > 1:
        first = ranks.rank % ranks.per_host == 0
        together(ranks, do if first else lambda: None)
    return together(ranks, do)


@dataclass(frozen=True)
class Crew:
    """Who works: the threads of this process, among the ranks of its job.

    `workers`: threads of this process; by default one for each of the cores that it may use, fairly divided among the
    ranks of the host. `device`: where the arithmetic is done. `progress`: called with the bytes of each finished job.
    """

    ranks: Ranks = field(default_factory=OneRank)
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bar: Callable[[Sequence[Job], str], Any] = lambda _jobs, _what: nullcontext(lambda _job: None)

    def thread_count(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or max(1, cores // self.ranks.per_host)

    def mine(self, jobs: Sequence[Job]) -> list[Job]:
        """Return this rank's share of the jobs, the costliest first."""
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
        """Do this rank's jobs; return the results of all ranks by name.

        `prefetch` is called with the jobs that come next, so that reading overlaps with computing. Raises the first
        error of any rank on all of them.
        """
        done = together(self.ranks, lambda: self._run_mine(self.mine(jobs), work, what, prefetch))
        return {name: result for part in self.ranks.gather(done) for name, result in part.items()}

    def _run_mine(
        self, jobs: Sequence[Job], work: Callable[[Job], T], what: str, prefetch: Callable[[Job], None]
    ) -> dict[str, T]:
        count = min(self.thread_count(), len(jobs))
        queue, results, errors = iter(range(len(jobs))), {}, []
        lock, room = threading.Lock(), _Room(_free_memory(self.device) / self.ranks.per_host * MEMORY_SHARE)

        def worker() -> None:
            torch.set_num_threads(1)  # a setting of each thread
            while not errors:
                with lock:
                    number = next(queue, None)
                if number is None:
                    return
                job = jobs[number]
                try:
                    for ahead in jobs[number + count : number + count + 1]:
                        prefetch(ahead)
                    with room.of(job.memory):
                        result = work(job)
                    with lock:
                        results[job.name] = result
                        advance(job)
                except BaseException as error:  # raised again below, in the thread that waits
                    errors.append(error)
                    return

        threads_before = torch.get_num_threads()
        try:
            with self.bar(jobs, what) as advance:
                threads = [threading.Thread(target=worker, daemon=True) for _ in range(count)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            torch.set_num_threads(threads_before)  # the threads' setting is in part the process's
        if errors:
            raise errors[0]
        return results


class _Room:
    """Lets threads in while their bytes fit; a single one that fits nowhere goes in alone."""

    def __init__(self, size: float) -> None:
        self._free, self._inside, self._changed = size, 0, threading.Condition()

    @contextmanager
    def of(self, need: int) -> Iterator[None]:
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
    """Divide items so that the parts cost alike: the costliest goes first, always to the part that has least so far."""
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
