"""The `contmerge` command.

contmerge run RECIPE [--run DIR] [--set A.B=C] [--until PHASE]    start or resume a run
contmerge new [RECIPE] [--base MODEL --stage NAME=SOURCE ...]     write a commented recipe
contmerge plan RECIPE [--run DIR] [--set A.B=C] [--json]          check all of it; memory, disk and time of each phase
contmerge status RUN                                              what is done, what is next
contmerge score MODEL [--tasks A,B] [--run RUN] ...               measure a model; at once, where it was before
contmerge report RUN                                              write the report again, print the table
contmerge compare RUN RUN... [--out DIR]                          several runs side by side, on the same documents
contmerge redo RUN PHASE [--stage NAME]                           drop a phase and what follows from it
contmerge push RUN [--merge ENTRY] [--repo-id OWNER/NAME]         put a merged model on the Hub, with its lineage
contmerge merge init|add|export|log|drop|owners|from-recipe ...   merge without a run; see `contmerge merge --help`
contmerge yaml RECIPE OUT ...                                     mergekit-yaml, with our merge methods
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_contmerge import new_recipe, plan, score_cli
from hf_contmerge.errors import clear_errors
from hf_contmerge.merge_cli import add_merge_command
from hf_contmerge.places import FolderLock
from hf_contmerge.recipe import PHASES
from hf_contmerge.run_folder import Run
from hf_contmerge.train import add_arguments, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["yaml"]:  # mergekit has options of its own
        return _yaml(words[1:])
    args = _parser().parse_args(words)
    with clear_errors() as outcome:
        args.do(args)
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="contmerge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="start or resume a run")
    add_arguments(run)
    run.set_defaults(do=run_command)
    new_recipe.add_arguments(commands.add_parser("new", help="write a commented recipe"))
    plan.add_arguments(commands.add_parser("plan", help="check a recipe; estimate memory, disk and time"))
    score_cli.add_arguments(commands.add_parser("score", help="measure a model; at once, where it was before"))
    for name, do, text in (
        ("status", _status, "what is done, what is next"),
        ("report", _report, "write the report again, print the table"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", metavar="RUN")
        command.set_defaults(do=do)
        if name == "report":
            command.add_argument("--open", action="store_true", help="show it in a browser")
    compare = commands.add_parser("compare", help="several runs side by side, on the same documents")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the first is the reference")
    compare.add_argument("--out", metavar="DIR", help="write index.html, compare.md and compare.csv there")
    compare.set_defaults(do=_compare)
    redo = commands.add_parser("redo", help="drop a phase and what follows from it")
    redo.add_argument("run", metavar="RUN")
    redo.add_argument("phase", choices=PHASES)
    redo.add_argument("--stage", help="from this stage on (default: all)")
    redo.set_defaults(do=_redo)
    push = commands.add_parser("push", help="put a merged model on the Hub, with its lineage")
    push.add_argument("run", metavar="RUN")
    push.add_argument("--merge", metavar="ENTRY", help="which merge entry of the run")
    push.add_argument("--repo-id", metavar="OWNER/NAME")
    push.add_argument("--public", action="store_true", help="anybody may read it")
    push.set_defaults(do=_push)
    add_merge_command(commands)
    commands.add_parser("yaml", help="mergekit-yaml, with our merge methods", add_help=False)
    return parser


def _status(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    run = Run.load(args.run)
    table = Table("stage", "what", *PHASES[:-1], title=str(run.folder))
    for t, place in run.places():
        stage = run.stage(t).name if t else "base"
        done = ["✓" if place.is_done(p) else "·" for p in PHASES[:-1]]
        table.add_row(stage, str(place.folder.relative_to(run.folder / "stages")), *done)
    Console().print(table)
    print(
        "complete"
        if run.is_complete()
        else f"unfinished: `contmerge run {run.folder / 'recipe.yml'} --run {run.folder}` goes on"
    )


def _report(args: argparse.Namespace) -> None:
    from hf_contmerge.report import show_report, write_report

    run = Run.load(args.run)
    write_report(run)
    show_report(run, browser=args.open)


def _compare(args: argparse.Namespace) -> None:
    from hf_contmerge.compare import compare_runs, print_comparison, write_comparison

    comparison = compare_runs([Run.load(folder) for folder in args.runs])
    page = write_comparison(comparison, Path(args.out)) if args.out else None
    print_comparison(comparison)
    print(f"Page: {page}" if page else "--out DIR writes this as a page, as Markdown and as CSV.")


def _redo(args: argparse.Namespace) -> None:
    run = Run.load(args.run)
    with FolderLock(run.folder):
        undone = run.redo(args.phase, stage=args.stage)
    print("\n".join(f"dropped {what}" for what in undone) or "nothing to drop")


def _push(args: argparse.Namespace) -> None:
    from hf_contmerge.publish import push_merged

    print(
        push_merged(Run.load(args.run), repo_id=args.repo_id, entry=args.merge, private=False if args.public else None)
    )


def _yaml(words: list[str]) -> int:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    import hf_contmerge.mergekit_plugin as plugin

    plugin.guard_planner()
    mergekit_yaml(args=words, prog_name="contmerge yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
