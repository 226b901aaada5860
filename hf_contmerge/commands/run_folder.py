"""`contmerge status`, `report`, `compare`, `redo` and `push`: commands on run folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_contmerge.commands._plugins import add_plugin_argument
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.phases import PHASES
from hf_contmerge.runtime.files import FolderLock


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge status`."""
    parser.add_argument("run", metavar="RUN")
    parser.set_defaults(do=_status)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge report`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    parser.set_defaults(do=_report)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge compare`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the first is the reference")
    parser.add_argument("--out", metavar="DIR", help="write index.html, compare.md and compare.csv there")
    parser.set_defaults(do=_compare)


def add_redo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge redo`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--stage", help="from this stage on (default: all)")
    parser.set_defaults(do=_redo)


def add_push(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge push`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--merge", metavar="ENTRY", help="merge entry of the run")
    parser.add_argument("--repo-id", metavar="OWNER/NAME")
    parser.add_argument("--public", action="store_true", help="make the repository public")
    add_plugin_argument(parser)
    parser.set_defaults(do=_push)


def _status(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    run = Run.load(args.run)
    table = Table("stage", "folder", *PHASES[:-1], title=str(run.folder))
    for t, place in run.places():
        stage = run.stage(t).name if t else "base"
        done = ["✓" if place.is_done(p) else "·" for p in PHASES[:-1]]
        table.add_row(stage, str(place.folder.relative_to(run.folder / "stages")), *done)
    Console().print(table)
    print(
        "complete"
        if run.is_complete()
        else f"unfinished: `contmerge run {run.folder / 'recipe.yml'} --run {run.folder}` resumes it"
    )


def _report(args: argparse.Namespace) -> None:
    from hf_contmerge.report.write import show_report, write_report

    run = Run.load(args.run)
    write_report(run)
    show_report(run, browser=args.open)


def _compare(args: argparse.Namespace) -> None:
    from hf_contmerge.report.compare import compare_runs, print_comparison, write_comparison

    comparison = compare_runs([Run.load(folder) for folder in args.runs])
    page = write_comparison(comparison, Path(args.out)) if args.out else None
    print_comparison(comparison)
    print(f"Page: {page}" if page else "Use --out DIR to write this as a page, Markdown and CSV.")


def _redo(args: argparse.Namespace) -> None:
    run = Run.load(args.run)
    with FolderLock(run.folder):
        undone = run.redo(args.phase, stage=args.stage)
    print("\n".join(f"dropped {what}" for what in undone) or "nothing to drop")


def _push(args: argparse.Namespace) -> None:
    from hf_contmerge.report.push import push_merged

    run = Run.load(args.run)
    run.require_same_plugins()
    print(push_merged(run, repo_id=args.repo_id, entry=args.merge, private=False if args.public else None))
