"""A progress bar for work on tensors: bytes, tensors and the time left. Silent where nobody looks at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hf_contmerge.work_sharing import Job


@contextmanager
def progress_bar(jobs: Sequence[Job], what: str) -> Iterator[Callable[[Job], None]]:
    """Show how far the jobs are; yield what is to be called with each that is finished."""
    if not sys.stderr.isatty():
        yield lambda _job: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    counter = TextColumn("{task.fields[tensors]}/{task.fields[of]} tensors")
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), counter, TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        # Bytes are what the eye follows, but time goes by cost: a matrix to decompose takes longer than it weighs.
        total = sum(job.nbytes for job in jobs)
        per_cost = total / (sum(job.cost for job in jobs) or 1.0)
        task, done = progress.add_task(what, total=total, tensors=0, of=len(jobs)), [0]

        def advance(job: Job) -> None:
            done[0] += 1
            progress.update(task, advance=job.cost * per_cost, tensors=done[0])

        yield advance
