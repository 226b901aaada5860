"""What ranks do together: whose result counts, who goes first, and that an error of one ends all."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from hf_contmerge.errors import DataError, RunError
from hf_contmerge.runtime.ranks import OneRank, Ranks

T = TypeVar("T")


class Thread(Ranks):
    """A rank that is a thread; all of a team share a barrier and a list."""

    def __init__(self, rank: int, size: int, per_host: int, shared: tuple[threading.Barrier, list[Any]]) -> None:
        self.rank, self.size, self.per_host = rank, size, per_host
        self._barrier, self._values = shared

    def gather(self, value: T) -> list[T]:
        self._values[self.rank] = value
        self._barrier.wait(20)
        everything = list(self._values)
        self._barrier.wait(20)
        return everything


def run(do: Callable[[Ranks], T], size: int = 4, per_host: int = 2) -> list[T | Exception]:
    shared = threading.Barrier(size), [None] * size

    def one(rank: int) -> T | Exception:
        try:
            return do(Thread(rank, size, per_host, shared))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_the_first_decides_for_all() -> None:
    called: list[int] = []

    def ask(rank: int, *, twice: int) -> int:
        called.append(rank)
        return rank + 10 * twice

    assert run(lambda ranks: ranks.first(ask, ranks.rank, twice=2)) == [20] * 4
    assert called == [0]


def test_all_keep_their_own_results() -> None:
    assert run(lambda ranks: ranks.all(lambda: ranks.rank)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("way", "leaders"), [("main_first", [0]), ("local_main_first", [0, 2])], ids=["main", "main of each host"]
)
def test_leaders_have_finished_before_the_others_begin(way: str, leaders: list[int]) -> None:
    order: list[int] = []

    def do(ranks: Ranks) -> int:
        def work() -> int:
            order.append(ranks.rank)
            return ranks.rank

        return getattr(ranks, way)(work)

    assert run(do) == [0, 1, 2, 3]
    assert sorted(order[: len(leaders)]) == leaders


def failing(ranks: Ranks, at: int, way: str) -> object:
    def work() -> None:
        if ranks.rank == at:
            raise DataError(f"rank {at}")

    return getattr(ranks, way)(work)


@pytest.mark.parametrize("way", ["all", "main_first", "local_main_first"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_error_of_one_is_raised_by_all(way: str, at: int) -> None:
    errors = run(lambda ranks: failing(ranks, at, way))
    assert [(type(e), str(e)) for e in errors] == [(DataError, f"rank {at}")] * 4


def test_the_first_error_counts() -> None:
    def do(ranks: Ranks) -> object:
        def work() -> None:
            raise RunError(str(ranks.rank))

        return ranks.all(work)

    assert [str(e) for e in run(do)] == ["0"] * 4


def test_a_process_on_its_own_needs_nobody() -> None:
    ranks = OneRank()
    assert (ranks.first(max, 1, 2), ranks.all(len, "abc"), ranks.main_first(abs, -1), ranks.is_main) == (2, 3, 1, True)
    ranks.barrier()
    with pytest.raises(KeyError):
        ranks.first({}.__getitem__, "x")
