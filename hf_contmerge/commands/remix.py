"""`contmerge remix`: weights of stages, searched after a run without training.

contmerge remix runs/x --want law=1,medicine=0.5 --keep general
contmerge remix runs/x --want law=1,medicine=0,code=2 --keep general,medicine --tries 32 --out mixes/law
torchrun --nproc-per-node 2 --no-python contmerge remix runs/x --want law=1,code=1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_contmerge.commands._arguments import add_cpu_argument, compute_on, words_of
from hf_contmerge.commands._plugins import add_plugin_argument, add_trust_argument
from hf_contmerge.errors import RecipeError
from hf_contmerge.run.folder import Run
from hf_contmerge.runtime.files import FolderLock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge remix`."""
    parser.add_argument("run", metavar="RUN", help="a run folder with trained experts")
    parser.add_argument(
        "--want", required=True, metavar="STAGE=W,...", help="stages to mix, and how much the learning of each counts"
    )
    parser.add_argument(
        "--keep",
        metavar="A,B",
        help="tasks that must not fall below the base: general, stages, tasks, or nothing (default: general)",
    )
    by = parser.add_mutually_exclusive_group()
    by.add_argument("--merge", metavar="ENTRY", help="merge entry of the run (default: the first linear rule)")
    by.add_argument("--rule", metavar="RULE", help="another linear rule, with its defaults")
    parser.add_argument("--tries", type=int, default=64, metavar="N", help="candidates to measure (default: 64)")
    parser.add_argument("-o", "--out", metavar="OUT", help="a new folder (default: RUN/remix/<what is wanted>)")
    add_cpu_argument(parser)
    add_plugin_argument(parser)
    add_trust_argument(parser)
    parser.set_defaults(do=remix_command)


def remix_command(args: argparse.Namespace) -> None:
    """Search weights, write the merge, print the front."""
    compute_on(cpu=args.cpu)
    run, want = Run.load(args.run), _wanted(args.want)
    from contextlib import nullcontext

    from hf_contmerge.loop.remix import Remix, Wish, remix
    from hf_contmerge.runtime.launching import join_ranks, keep_freed_memory, leave_ranks

    keep = None if args.keep is None else tuple(words_of(args.keep))
    wish = Wish(want, keep, args.merge, args.rule, args.tries)
    keep_freed_memory()
    _, crew = join_ranks()
    with FolderLock(run.folder) if crew.ranks.is_main else nullcontext():
        found = crew.ranks.main_first(Remix.find, run, wish, crew, trust_remote_code=args.trust_remote_code)
        out = Path(args.out) if args.out else run.folder / "remix" / found.wish.folder_name()
        record = remix(found, out)
        if crew.ranks.is_main and run.is_complete() and run.folder in out.parents:
            from hf_contmerge.report.write import write_report

            write_report(run)
    leave_ranks()
    if crew.ranks.is_main:
        _show(record, out)


def _wanted(text: str) -> dict[str, float]:
    """Return stage -> weight of `law=1,medicine=0.5`."""
    want: dict[str, float] = {}
    for word in words_of(text):
        stage, equals, number = word.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError as error:
            raise RecipeError(f"--want {word}: expected STAGE=NUMBER, as in --want law=1,medicine=0.5.") from error
        if stage in want:
            raise RecipeError(f"--want names {stage} twice.")
        want[stage] = weight
    return want


def _show(record: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console, stages = Console(), record["stages"]
    shown = sorted((t for t in record["tries"] if t["front"] or t["taken"]), key=lambda t: -t["learning"]["mean"])
    table = Table(*stages, "learning", "worst kept", "", title="The front, on validation documents")
    for row in shown:
        learning, worst = row["learning"], min(row["kept"], key=lambda s: s["mean"], default=None)
        marks = ["chosen"] * row["taken"] + ["loses"] * (not row["keeps"])
        table.add_row(
            *(f"{w:.3g}" for w in row["weights"]), _interval(learning, 100, "%"), _change(worst), ", ".join(marks)
        )
    console.print(table)
    for name, shifts in record["test"].items():
        table = Table("tasks", "against the base", title=f"{name}, on documents that decided nothing")
        for shift in shifts:
            table.add_row(shift["group"], _change(shift, named=False))
        console.print(table)
    many, trained = len(record["tries"]), record["trained_seconds"]
    took = f"{many} candidates in {record['search_seconds']:.0f} s, without training"
    if trained:
        took += f"; a stage of this run took {sum(trained) / len(trained):.0f} s"
    print(f"{took}.\nModel:   {out / 'merged'}\nState:   {out / 'state'}\nPicture: {out / 'front.png'}")


def _change(shift: dict[str, Any] | None, *, named: bool = True) -> str:
    """Return a change of a group of tasks in words."""
    if shift is None:
        return ""
    words = _interval(shift, 100, "points") if shift["block"] == "accuracy" else _interval(shift, 1, "nats")
    return f"{shift['group']} {words}" if named else words


def _interval(change: dict[str, Any], factor: float, unit: str) -> str:
    digits = 0 if unit == "%" else 1 if unit == "points" else 3
    numbers = f"{factor * change['mean']:+.{digits}f} {unit}"
    if change["low"] is None or change["high"] is None:
        return numbers
    return f"{numbers} ({factor * change['low']:+.{digits}f} to {factor * change['high']:+.{digits}f})"
