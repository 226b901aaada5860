"""`contmerge report`, `compare` and `redo`: commands on run folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_contmerge.commands._arguments import add_json_argument, add_run_argument, named_run, print_json
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.phases import PHASES
from hf_contmerge.runtime.files import FolderLock


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge report`."""
    add_run_argument(parser)
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    add_json_argument(parser)
    parser.set_defaults(do=_report)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge compare`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the first is the reference")
    parser.add_argument("--out", metavar="DIR", help="write index.html, compare.md and compare.csv there")
    add_json_argument(parser)
    parser.set_defaults(do=_compare)


def add_redo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge redo`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--stage", help="from this stage on (default: all)")
    parser.set_defaults(do=_redo)


def _report(args: argparse.Namespace) -> None:
    from hf_contmerge.report.write import load_results, show_report, summary, write_report

    run = named_run(args.run)
    write_report(run)
    if args.json:
        print_json(summary(run, load_results(run)))
    else:
        show_report(run, browser=args.open)


def _compare(args: argparse.Namespace) -> None:
    from hf_contmerge.report.compare import compare_runs, comparison_json, print_comparison, write_comparison

    comparison = compare_runs([Run.load(folder) for folder in args.runs])
    page = write_comparison(comparison, Path(args.out)) if args.out else None
    if args.json:
        print_json(comparison_json(comparison))
        return
    print_comparison(comparison)
    print(f"Page: {page}" if page else "Use --out DIR to write this as a page, Markdown and CSV.")


def _redo(args: argparse.Namespace) -> None:
    run = Run.load(args.run)
    with FolderLock(run.folder):
        undone = run.redo(args.phase, stage=args.stage)
    print("\n".join(f"dropped {what}" for what in undone) or "nothing to drop")
