"""Jobs shared among the threads of a process: each is done once, memory is bounded, errors are raised.

How ranks share them is in test_merge_ranks.py.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from hf_contmerge.errors import ModelError
from hf_contmerge.runtime.crew import MEMORY_SHARE, Crew, Job
from hf_contmerge.runtime.ranks import OneRank, find_ranks


def jobs(costs: Sequence[float], *, memory: int = 1, groups: Sequence[int] = ()) -> list[Job]:
    return [Job(f"t{i}", c, memory, 1, groups[i] if groups else 0) for i, c in enumerate(costs)]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that says how many bytes all jobs in flight may have together."""

    def allow(count: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=count / MEMORY_SHARE))

    return allow


# Threads


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_each_job_is_done_once_and_its_result_is_kept_under_its_name(workers: int) -> None:
    done: list[str] = []

    def work(job: Job) -> str:
        done.append(job.name)
        return job.name.upper()

    found = Crew(workers=workers).run(jobs([1.0, 5.0, 3.0, 2.0, 4.0]), work, what="")
    assert found == {f"t{i}": f"T{i}" for i in range(5)}
    assert sorted(done) == [f"t{i}" for i in range(5)]


def test_nothing_to_do() -> None:
    assert Crew().run([], lambda job: job.name, what="") == {}


def test_the_costliest_job_goes_first() -> None:
    started: list[str] = []
    Crew(workers=1).run(jobs([1.0, 5.0, 3.0]), lambda job: started.append(job.name), what="")
    assert started == ["t1", "t2", "t0"]


def test_threads_work_at_the_same_time() -> None:
    """Each of two jobs waits for the other one to have begun."""
    both = threading.Barrier(2)
    Crew(workers=2).run(jobs([1.0, 1.0]), lambda job: both.wait(20), what="")


def test_a_stop_between_two_starts_waits_for_the_first_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ aborts a process that ends while one of its products runs."""
    begun, done = list[threading.Thread](), list[str]()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if begun:
            raise KeyboardInterrupt
        begun.append(thread)
        start(thread)

    def work(job: Job) -> None:
        time.sleep(0.3)
        done.append(job.name)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Crew(workers=2).run(jobs([1.0] * 4), work, what="")
    assert len(done) == 1, "no job begins after a stop"
    assert not begun[0].is_alive()
    assert not begun[0].daemon


@pytest.mark.parametrize("stops", [1, 2, 3])
def test_a_signal_while_threads_work_waits_for_them(stops: int) -> None:
    """A real signal, at any moment of the wait; `Thread.join` forgets a running thread then."""
    begun, done = list[str](), list[str]()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def work(job: Job) -> None:
        begun.append(job.name)
        if len(begun) == stops:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1 if len(begun) > 1 else 0.8)
        done.append(job.name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            Crew(workers=2).run(jobs([1.0] * 9), work, what="")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done
    assert sorted(done) == sorted(begun), "a thread still works"
    assert len(begun) <= stops + 2, "a job begins after a stop"


def test_linear_algebra_has_one_thread_in_a_job_and_the_former_number_after() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = Crew(workers=2).run(jobs([1.0] * 4), lambda job: torch.get_num_threads(), what="")
        assert set(inside.values()) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_are_as_many_as_the_cores_divided_among_the_ranks_of_a_host() -> None:
    cores = len(os.sched_getaffinity(0))
    assert Crew().thread_count() == cores
    assert Crew(workers=7).thread_count() == 7
    for ranks in (2, cores, 2 * cores):
        assert Crew(ranks=SharedHost(ranks)).thread_count() == max(1, cores // ranks)


class SharedHost(OneRank):
    """A rank with others on its host."""

    def __init__(self, ranks: int) -> None:
        self.per_host = ranks


def test_what_comes_next_is_fetched_ahead() -> None:
    asked: list[str] = []
    Crew(workers=1).run(jobs([3.0, 2.0, 1.0]), lambda job: None, what="", prefetch=lambda job: asked.append(job.name))
    assert asked == ["t1", "t2"]


def test_progress_is_told_of_every_job() -> None:
    told: list[str] = []

    @contextmanager
    def bar(all_jobs: Sequence[Job], what: str) -> Iterator[Callable[[Job], None]]:
        assert (len(all_jobs), what) == (3, "merging")
        yield lambda job: told.append(job.name)

    Crew(workers=2, bar=bar).run(jobs([1.0, 2.0, 3.0]), lambda job: None, what="merging")
    assert sorted(told) == ["t0", "t1", "t2"]


# Errors


def raise_at(name: str) -> Callable[[Job], None]:
    def work(job: Job) -> None:
        if job.name == name:
            raise ModelError(f"bad {name}")

    return work


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_is_raised_and_no_further_job_begun(workers: int) -> None:
    begun: list[str] = []

    def work(job: Job) -> None:
        begun.append(job.name)
        if job.name == "t0":
            raise ModelError("bad t0")
        time.sleep(0.01)

    with pytest.raises(ModelError, match="bad t0"):
        Crew(workers=workers).run(jobs([9.0] + [1.0] * 50), work, what="")
    assert len(begun) < 25


def test_an_error_beside_the_work_is_an_error_too() -> None:
    """Else the job would be missing from the norms, and nobody would know."""
    some = jobs([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ModelError, match="bad t1"):
        Crew(workers=1).run(some, lambda job: None, what="", prefetch=raise_at("t1"))

    @contextmanager
    def bar(_jobs: Sequence[Job], _what: str) -> Iterator[Callable[[Job], None]]:
        yield raise_at("t2")

    with pytest.raises(ModelError, match="bad t2"):
        Crew(workers=2, bar=bar).run(some, lambda job: None, what="")


# Memory


def peak_of(sizes: Sequence[int], *, workers: int) -> tuple[int, int]:
    """Return the most bytes and the most jobs that were in flight at a time."""
    lock, inside, peaks = threading.Lock(), list[int](), [(0, 0)]

    def work(job: Job) -> None:
        with lock:
            inside.append(job.memory)
            peaks.append((sum(inside), len(inside)))
        time.sleep(0.003)
        with lock:
            inside.remove(job.memory)

    some = [Job(f"t{i}", float(size), size, size) for i, size in enumerate(sizes)]
    assert len(Crew(workers=workers).run(some, work, what="")) == len(sizes)
    assert not inside
    return max(b for b, _ in peaks), max(n for _, n in peaks)


def test_jobs_in_flight_fit_the_memory(memory: Callable[[int], None]) -> None:
    memory(100)
    size, count = peak_of([60, 50, 40, 40, 30, 30, 20, 10] * 3, workers=4)
    assert size <= 100
    assert count > 1


def test_a_job_that_fits_nowhere_goes_in_alone(memory: Callable[[int], None]) -> None:
    memory(100)
    size, _ = peak_of([10, 10, 250, 10, 120, 10], workers=3)
    assert size == 250


def test_with_no_memory_at_all_jobs_go_one_by_one(memory: Callable[[int], None]) -> None:
    memory(0)
    assert peak_of([10] * 6, workers=3) == (10, 1)


def test_an_error_gives_its_memory_back(memory: Callable[[int], None]) -> None:
    """Or the other threads would wait for ever."""
    memory(10)
    with pytest.raises(ModelError, match="bad t0"):
        Crew(workers=3).run(jobs([3.0, 2.0, 1.0, 1.0], memory=8), raise_at("t0"), what="")


def test_a_process_on_its_own() -> None:
    ranks = find_ranks()
    assert isinstance(ranks, OneRank)
    assert ranks.gather(7) == [7]
    assert ranks.all(lambda: 8) == 8


# The end of a process

LEFT = """
import atexit, os, pathlib

@atexit.register  # the first one is called last
def no_threads():
    os.write(1, f"left: {threads()}\\n".encode())  # in one piece

def threads():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)

import torch.distributed as dist
from hf_contmerge.runtime.ranks import find_ranks

OTHERS
kept = [find_ranks(), find_ranks()]
assert kept[1].gather(kept[0].rank) == [0, 1]
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
@pytest.mark.parametrize(
    ("others", "left"),
    [
        ("", 0),
        ("dist.init_process_group('gloo'); atexit.register(dist.destroy_process_group)", 0),
        ("dist.init_process_group('gloo')", 3),  # the default group's device and its two workers
    ],
    ids=["ours", "theirs, ended", "theirs, never ended"],
)
def test_no_thread_of_the_ranks_is_left_when_a_process_ends(others: str, left: int, tmp_path: Path) -> None:
    """Such a thread may still release a tensor of the last call, and aborts a process whose interpreter has ended.

    A default group that others made and never end keeps its threads: it may still be in use.
    """
    (tmp_path / "left.py").write_text(LEFT.replace("OTHERS", others))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "left.py")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == f"left: {left}\n" * 2


# Precision

SWITCHED = """
import torch
from hf_contmerge.runtime.crew import Crew, Job

def switches():
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]

def merge():
    inside = []
    Crew(workers=2).run([Job(str(i), 1, 1, 1) for i in range(3)], lambda _: inside.append(switches()), what="")
    assert inside == [["ieee", "ieee"]] * 3, inside

torch.backends.cuda.matmul.allow_tf32 = True
merge()
assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"
torch.backends.fp32_precision = "tf32"
merge()
assert switches() == ["tf32", "tf32"], switches()
"""


def test_products_are_exact_whatever_the_process_has_chosen() -> None:
    """A trainer with `tf32: true` switches its process, in which the loop merges next."""
    done = subprocess.run([sys.executable, "-c", SWITCHED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
