"""`contmerge status`: finished phases, the next one, the time left."""

from __future__ import annotations

import argparse
import sys
import time

from hf_contmerge.commands._arguments import add_json_argument, add_run_argument, named_run, print_json
from hf_contmerge.commands._plugins import add_plugin_argument
from hf_contmerge.errors import duration
from hf_contmerge.loop.status import RunStatus, run_status
from hf_contmerge.run.recipe.phases import PHASES

_SECONDS_BETWEEN_LOOKS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge status`."""
    add_run_argument(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="show it again and again, until the run is complete")
    add_json_argument(how)  # pyright: ignore[reportArgumentType]
    add_plugin_argument(parser)
    parser.set_defaults(do=status_command)


def status_command(args: argparse.Namespace) -> None:
    """Print the phases of a run; with `--watch`, until it is complete."""
    status = run_status(named_run(args.run))
    if args.json:
        print_json(status.to_json())
        return
    _show(status)
    while args.watch and not status.complete:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        before, status = status, run_status(named_run(args.run))
        if status.done != before.done:
            _show(status)


def _show(status: RunStatus) -> None:
    """Print the table and a sentence; a terminal is cleared before."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if sys.stdout.isatty():
        console.clear()
    table = Table("stage", "folder", *PHASES[:-1], title=str(status.run.folder))
    for (t, folder), marks in status.marks().items():
        stage = status.run.stage(t).name if t else "base"
        table.add_row(stage, folder, *(marks.get(phase, "") for phase in PHASES[:-1]))
    console.print(table)
    print(_sentence(status))


def _sentence(status: RunStatus) -> str:
    if status.complete:
        return "complete"
    left, following = status.time_left(), status.next
    more = f"; {' and '.join(left.unmeasured)} not timed yet" if left.unmeasured else ""
    least = "at least " if left.unmeasured else "about "
    after = f"next: {following.phase} {status.folder_of(following)}" if following else "next: report"
    resume = f"unfinished: `{status.run.command}` resumes it"
    done, all_ = status.done, status.total
    return f"{done} of {all_} phases are done; {after}; {least}{duration(left.seconds)} left{more}\n{resume}"
