"""The processes of one job and their collective calls."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

from hf_contmerge.errors import ContmergeError, mark_shared

T = TypeVar("T")
P = ParamSpec("P")

_PATIENCE = timedelta(days=2)
"""Longest wait for other ranks. Launchers end all ranks when one dies; hashing a large model takes hours."""


class Ranks:
    """The processes of one job, independent of the launcher.

    A function that fails on any rank raises its error on every rank: no rank waits for one that has ended.
    """

    rank: int
    size: int
    per_host: int

    def gather(self, value: T) -> list[T]:
        """Return every rank's value on every rank, in rank order."""
        raise NotImplementedError

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' numbers."""
        return max(self.gather(value))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def first(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on rank 0; return its result on every rank."""
        return self._call(lambda: do(*args, **kwargs), main_only=True)

    def all(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on every rank; return each rank's own result."""
        return self._call(lambda: do(*args, **kwargs), main_only=False)

    def main_first(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on rank 0, then on the others.

        The others find the files fetched or written by rank 0.
        """
        return self._leader_first(self.is_main, self.size, lambda: do(*args, **kwargs))

    def local_main_first(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on each host's first rank, then on the others.

        The others find the files fetched on their host.
        """
        return self._leader_first(self.rank % self.per_host == 0, self.per_host, lambda: do(*args, **kwargs))

    def _leader_first(self, leads: bool, group: int, do: Callable[[], T]) -> T:
        if group == 1:
            return self.all(do)
        results = [self.all(do if leads == turn else lambda: None) for turn in (True, False)]
        return cast(T, results[0 if leads else 1])

    def _call(self, do: Callable[[], T], *, main_only: bool) -> T:
        if self.size == 1:
            return do()
        value, failure = None, None
        try:
            if self.is_main or not main_only:
                value = do()
        except (ContmergeError, OSError, ValueError) as error:
            failure = error
        outcomes = self.gather((value if main_only else None, failure))
        for _, error in outcomes:
            if error is not None:
                raise mark_shared(error)
        return cast(T, outcomes[0][0] if main_only else value)


class OneRank(Ranks):
    """A single process."""

    rank, size, per_host = 0, 1, 1

    def gather(self, value: T) -> list[T]:
        return [value]


class LaunchedRanks(Ranks):
    """The ranks started by torchrun, accelerate launch or a cluster's launcher."""

    def __init__(self) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
            atexit.register(dist.destroy_process_group)  # its threads would abort the exiting process
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Lists of Python objects need gloo, independent of the training's backend.
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        atexit.register(self._leave)
        self.per_host = ranks_per_host(self.gather(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def _leave(self) -> None:
        """End the group's threads.

        One that still releases a tensor would abort the exiting process. The default group is left to its owner.
        """
        import torch.distributed as dist

        group, self._group = self._group, None
        with suppress(ValueError):  # it ended with all others
            dist.destroy_process_group(group)

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def largest(self, value: int) -> int:
        import torch
        import torch.distributed as dist

        shared = torch.tensor(value)  # called after each training step: a tensor on the CPU waits for no GPU
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return int(shared)


def find_ranks() -> Ranks:
    """Return the ranks of this process's job."""
    return LaunchedRanks() if is_launched() else OneRank()


def is_launched() -> bool:
    """Say if a launcher started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def ranks_per_host(counts: Sequence[int]) -> int:
    """Return the ranks per host; 1 where hosts differ.

    `counts`: the number reported by each rank. 1 is always safe: every rank then counts as a host and writes separate
    files.
    """
    return counts[0] if len(set(counts)) == 1 and len(counts) % counts[0] == 0 else 1
