"""Lines without a terminal, and the run's position in front."""

import logging

import pytest

from hf_contmerge.runtime import progress
from hf_contmerge.runtime.progress import batch_progress, run_position, within_run


def test_batches_are_told_every_ten_seconds(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is shared out by cost: long texts come first."""
    now = iter([0.0, 4.0, 11.0, 14.0, 22.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    caplog.set_level(logging.INFO)
    with batch_progress([50, 30, 10, 5, 5], shown=True) as advance:
        for cost in (50, 30, 10, 5, 5):
            advance(cost)
    assert caplog.messages == ["  batch 2/5, 0:00:03 left", "  batch 4/5, 0:00:01 left"]


def test_other_ranks_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with batch_progress([1, 1], shown=False) as advance:
        advance(1)
    assert caplog.messages == []


def test_position_is_that_of_the_innermost_run() -> None:
    assert run_position(": ") == ""
    with within_run(lambda: "phase 1 of 3"):
        with within_run(lambda: "phase 2 of 9"):
            assert run_position(": ") == "phase 2 of 9: "
        assert run_position(": ") == "phase 1 of 3: "
    assert run_position() == ""
