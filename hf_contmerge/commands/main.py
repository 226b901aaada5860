"""The `contmerge` command.

contmerge run RECIPE [--run DIR] [--set A.B=C] [--until PHASE]    start or resume a run
contmerge new [RECIPE] [--base MODEL --stage NAME=SOURCE ...]     write a commented recipe
contmerge plan RECIPE [--run DIR] [--set A.B=C] [--json]          check all of it; memory, disk and time of each phase
contmerge status RUN                                              what is done, what is next
contmerge score MODEL [--tasks A,B] [--run RUN] ...               measure a model; at once, where it was before
contmerge statistics MODEL --data FILE [--base MODEL] ...         what some merge rules need to know of an expert
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
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from hf_contmerge.errors import clear_errors
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import PHASES
from hf_contmerge.runtime.files import FolderLock

Add = Callable[[argparse.ArgumentParser], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["yaml"]:  # mergekit has options of its own
        return _yaml(words[1:])
    args = _parse(words)
    with clear_errors() as outcome:
        args.do(args)
    return outcome.code


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Return what the words say. Only the named command's module is loaded, for its answer may take no longer."""
    parser = argparse.ArgumentParser(
        prog="contmerge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (text, add) in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in words[:1]:
            add(command)
    return parser.parse_args(words)


def _of(module: str) -> Add:
    return lambda parser: import_module(f"hf_contmerge.commands.{module}").add_arguments(parser)


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.set_defaults(do=_status)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    parser.set_defaults(do=_report)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the first is the reference")
    parser.add_argument("--out", metavar="DIR", help="write index.html, compare.md and compare.csv there")
    parser.set_defaults(do=_compare)


def _add_redo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--stage", help="from this stage on (default: all)")
    parser.set_defaults(do=_redo)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--merge", metavar="ENTRY", help="which merge entry of the run")
    parser.add_argument("--repo-id", metavar="OWNER/NAME")
    parser.add_argument("--public", action="store_true", help="anybody may read it")
    parser.set_defaults(do=_push)


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
    from hf_contmerge.report.write import show_report, write_report

    run = Run.load(args.run)
    write_report(run)
    show_report(run, browser=args.open)


def _compare(args: argparse.Namespace) -> None:
    from hf_contmerge.report.compare import compare_runs, print_comparison, write_comparison

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
    from hf_contmerge.report.push import push_merged

    print(
        push_merged(Run.load(args.run), repo_id=args.repo_id, entry=args.merge, private=False if args.public else None)
    )


def _yaml(words: list[str]) -> int:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from hf_contmerge.merging.in_mergekit.plugin import install

    install()
    mergekit_yaml(args=words, prog_name="contmerge yaml")
    return 0


_COMMANDS: dict[str, tuple[str, Add]] = {
    "run": ("start or resume a run", _of("run")),
    "new": ("write a commented recipe", _of("new")),
    "plan": ("check a recipe; estimate memory, disk and time", _of("plan")),
    "status": ("what is done, what is next", _add_status),
    "score": ("measure a model; at once, where it was before", _of("score")),
    "statistics": ("measure an expert for merge rules that need it", _of("statistics")),
    "report": ("write the report again, print the table", _add_report),
    "compare": ("several runs side by side, on the same documents", _add_compare),
    "redo": ("drop a phase and what follows from it", _add_redo),
    "push": ("put a merged model on the Hub, with its lineage", _add_push),
    "merge": ("merge without a run: init, add, export, log, drop, owners, from-recipe", _of("merge")),
    "yaml": ("mergekit-yaml, with our merge methods", lambda _: None),
}
"""Name -> (what it does, what adds its arguments)."""


if __name__ == "__main__":
    sys.exit(main())
