"""Stops on SIGTERM and Ctrl-C: at once, or after a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """The process was asked to stop.

    A KeyboardInterrupt, so that libraries clean up and no `except Exception` catches it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The shell's code for a signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    @property
    def cause(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


class _Process:
    """The signals of this process."""

    asked = 0
    """Number of the first signal."""
    waits = False
    """Whether a checkpoint comes first."""
    any_rank: Callable[[int], int] = staticmethod(lambda asked: asked)
    """Returns the largest of all ranks' numbers."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped on SIGTERM and Ctrl-C, in the main thread.

    Failures after a signal are reported as the stop: connections to stopped ranks break.
    """
    _Process.asked, _Process.waits = 0, False
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background jobs want it
                    before[number] = signal.signal(number, _stop)
        yield
    except Exception as error:
        if _Process.asked:
            raise Stopped(_Process.asked) from error
        raise
    finally:
        _Process.asked = 0
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end this block alone.

    Later errors are then told as what they are, not as the stop.
    """
    try:
        yield
    finally:
        if _Process.asked == signal.SIGINT:
            _Process.asked = 0


def _stop(number: int, _frame: Any) -> None:
    first, _Process.asked = not _Process.asked, _Process.asked or number
    if not (first and _Process.waits):  # the second Ctrl-C waits for nothing
        raise Stopped(number)


def share_stops(any_rank: Callable[[int], int]) -> None:
    """Set the function that returns the largest of all ranks' numbers."""
    _Process.any_rank = staticmethod(any_rank)


def asked_to_stop() -> bool:
    """Check if any rank was asked to stop; collective."""
    _Process.asked = _Process.any_rank(_Process.asked)
    return bool(_Process.asked)


@contextmanager
def stop_after_checkpoint() -> Iterator[None]:
    """Let the work inside ask `asked_to_stop`; raise Stopped at its end."""
    _Process.waits = True
    try:
        yield
    finally:
        _Process.waits = False
    if _Process.asked:
        raise Stopped(_Process.asked)
