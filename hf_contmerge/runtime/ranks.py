"""The processes of one job, and how they do something together."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

from hf_contmerge.errors import ContmergeError, mark_shared

T = TypeVar("T")


_PATIENCE = timedelta(days=2)
"""How long a rank waits for the others. A launcher ends them all when one dies; hashing a large model takes hours."""


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
