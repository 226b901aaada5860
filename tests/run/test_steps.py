"""The position of a run's phases, and the time that is left."""

from pathlib import Path

import pytest
from toys.reports import make_run

from hf_contmerge.errors import duration
from hf_contmerge.run.steps import Course, Step, run_steps, time_left

KINDS = {"magmax": "previous"}


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start at 0."""
        self.now = 0.0
        monkeypatch.setattr("hf_contmerge.run.steps.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def course(folder: Path, done: int) -> tuple[Course, list[Step], int]:
    """Return a run of three stages at its first phase that is not done."""
    run = make_run(folder, stages=3, done=done, merge=["magmax"])
    steps = list(run_steps(run, KINDS))
    first = next((i for i, step in enumerate(steps) if not step.done), len(steps))
    return Course(run, steps), steps, first


def seconds(steps: list[Step], phase: str) -> float:
    """Return the mean seconds of timed phases, of a score's task."""
    finished = [step for step in steps if step.done and step.phase == phase and step.seconds()]
    return sum(step.seconds() or 0 for step in finished) / sum(step.effort() for step in finished)


def test_position_counts_the_report_and_runs_down(tmp_path: Path, clock: Clock) -> None:
    """The phase at work has no more than its own estimate to give."""
    way, steps, first = course(tmp_path / "run", done=2)
    way.reach(first)
    scored = sum(step.effort() for step in steps[first:] if step.phase == "score")
    left = seconds(steps, "train") + seconds(steps, "merge") + scored * seconds(steps, "score")
    assert [step.phase for step in steps[first:]] == ["train", "merge", "score", "score"]
    assert way.position() == f"phase {first + 1} of {len(steps) + 1}, {duration(left)} left"
    clock.now = 60.0
    assert way.position().endswith(f", {duration(left - 60)} left")
    clock.now = 10_000.0
    assert way.position().endswith(f", {duration(left - 90)} left")


def test_phases_without_a_time_make_it_a_least_time(tmp_path: Path, clock: Clock) -> None:
    way, steps, first = course(tmp_path / "run", done=0)
    assert (first, steps[0].phase, steps[0].done) == (1, "score", True)
    way.reach(first)
    assert way.position().startswith(f"phase 2 of {len(steps) + 1}, at least ")
    left = time_left(make_run(tmp_path / "other", stages=3, done=0, merge=["magmax"]), steps)
    assert left.unmeasured == ("train", "merge")


def test_a_finished_run_has_no_time_left(tmp_path: Path, clock: Clock) -> None:
    way, steps, first = course(tmp_path / "run", done=3)
    assert first == len(steps)
    way.reach(first - 1)
    assert way.position() == f"phase {len(steps)} of {len(steps) + 1}"
