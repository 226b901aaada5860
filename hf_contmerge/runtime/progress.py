"""Progress bars for training, merging and scoring; log lines without a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

from hf_contmerge.runtime.crew import Job

if TYPE_CHECKING:
    from rich.progress import Progress

LOG = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10


_POSITIONS: list[Callable[[], str]] = [str]
"""The last one belongs to the run that this process works on."""


@contextmanager
def within_run(position: Callable[[], str]) -> Iterator[None]:
    """Name the run's position in front of all bars.

    `position`: returns "phase 7 of 19, 12 min left".
    """
    _POSITIONS.append(position)
    try:
        yield
    finally:
        _POSITIONS.pop()


def run_position(after: str = "") -> str:
    """Return the run's position, followed by `after`; nothing outside a run."""
    position = _POSITIONS[-1]()
    return position + after if position else ""


@contextmanager
def progress_bar(jobs: Sequence[Job], what: str) -> Iterator[Callable[[Job], None]]:
    """Show a bar on a terminal; yield a callback for finished jobs."""
    if not sys.stderr.isatty():
        yield lambda _job: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    counter = TextColumn("{task.fields[tensors]}/{task.fields[of]} tensors")
    columns = (TextColumn(_TITLE), BarColumn(), DownloadColumn(), counter, TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        # Shown in bytes but advanced by cost: decomposing a matrix takes longer than its bytes suggest.
        total = sum(job.nbytes for job in jobs)
        per_cost = total / (sum(job.cost for job in jobs) or 1.0)
        run = run_position(": ")
        task, done = progress.add_task(what, total=total, tensors=0, of=len(jobs), run=run), [0]

        def advance(job: Job) -> None:
            done[0] += 1
            progress.update(task, advance=job.cost * per_cost, tensors=done[0], run=run_position(": "))

        yield advance


class StepProgress:
    """Training progress: a bar on a terminal, else periodic log lines."""

    def __init__(self, total: int, step: int, tokens: int) -> None:
        """Start at `step` of `total`; `step` and `tokens` are nonzero after resuming."""
        self._total, self._first = total, step
        self._began = self._last_line = time.monotonic()
        self._tokens, self._bar = tokens, _step_bar() if sys.stderr.isatty() else None
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("train", total=total, completed=step, status="", run=run_position(": "))

    def step(self, number: int) -> None:
        """Advance the bar to step `number`."""
        if self._bar:
            self._bar.update(self._task, completed=number, run=run_position(": "))

    def tell(self, number: int, loss: float, tokens: int) -> None:
        """Report a loss.

        `tokens`: tokens trained on so far by all ranks; 0 if not counted.
        """
        now = time.monotonic()
        speed = (tokens - self._tokens) / max(now - self._began, 1e-9)
        status = f"loss {loss:.4g}" + (f", {speed:,.0f} tokens/s" if tokens > self._tokens else "")
        if self._bar:
            self._bar.update(self._task, status=status)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or number >= self._total:
            self._last_line = now
            left = (now - self._began) / max(number - self._first, 1) * (self._total - number)
            rest = f", {timedelta(seconds=round(left))} left" if number < self._total else ""
            LOG.info("  step %d/%d: %s%s", number, self._total, status, rest)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


@contextmanager
def batch_progress(costs: Sequence[int], *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show the progress of scoring; yield a callback for finished batches."""
    if not shown:
        yield lambda _cost: None
        return
    began = last = time.monotonic()
    total, done, batches = sum(costs), 0, 0
    bar = _step_bar() if sys.stderr.isatty() else None
    task = bar.add_task("score", total=len(costs), status="batches", run=run_position(": ")) if bar else None

    def advance(cost: int) -> None:
        nonlocal done, batches, last
        done, batches, now = done + cost, batches + 1, time.monotonic()
        if bar and task is not None:  # by cost: long texts come first
            bar.update(task, completed=len(costs) * done / total, run=run_position(": "))
        elif now - last >= _SECONDS_BETWEEN_LINES and done < total:
            last, left = now, (now - began) / done * (total - done)
            LOG.info("  batch %d/%d, %s left", batches, len(costs), timedelta(seconds=round(left)))

    with bar or nullcontext():
        yield advance


_TITLE = "{task.fields[run]}{task.description}"


def _step_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(_TITLE), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
