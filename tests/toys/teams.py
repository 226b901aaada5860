"""Ranks without a launcher: threads of this process."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hf_contmerge.errors import ContmergeError
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.ranks import Ranks

T = TypeVar("T")


class Team:
    """Ranks that are threads of this process, on made-up hosts. What they send each other is pickled, as over gloo."""

    def __init__(self, size: int, per_host: int) -> None:
        self.size, self.per_host = size, per_host
        self._slots: list[bytes] = [b""] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = pickle.dumps(value)
        self._barrier.wait(60)
        found = [pickle.loads(slot) for slot in self._slots]
        self._barrier.wait(60)
        return found

    def run(self, do: Callable[[Crew], T], **crew: Any) -> list[T | Exception]:
        """Do something on all ranks; return the result of each, or what it raised."""

        def one(rank: int) -> T | Exception:
            try:
                return do(Crew(ranks=TeamMember(self, rank), workers=2, **crew))
            except (ContmergeError, OSError) as error:
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


class TeamMember(Ranks):
    def __init__(self, team: Team, rank: int) -> None:
        self.team, self.rank, self.size, self.per_host = team, rank, team.size, team.per_host

    def gather(self, value: T) -> list[T]:
        return self.team.exchange(self.rank, value)
