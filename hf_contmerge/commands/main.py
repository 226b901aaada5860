"""The `contmerge` command.

contmerge run RECIPE [--run DIR] [--set A.B=C] [--until PHASE]    start or resume a run
contmerge new [RECIPE] [--base MODEL --stage NAME=SOURCE ...]     write a commented recipe
contmerge plan RECIPE [--run DIR] [--set A.B=C] [--json]          check a recipe; memory, disk and time of each phase
contmerge status RUN                                              show finished and remaining phases
contmerge score MODEL [--tasks A,B] [--run RUN] ...               measure a model; cached scores are instant
contmerge statistics MODEL --data FILE [--base MODEL] ...         measure an expert for merge rules with statistics
contmerge report RUN                                              write the report again, print the table
contmerge compare RUN RUN... [--out DIR]                          compare runs on the same documents
contmerge redo RUN PHASE [--stage NAME]                           drop a phase and all later ones
contmerge push RUN [--merge ENTRY] [--repo-id OWNER/NAME]         push a merged model to the Hub, with its lineage
contmerge merge init|add|export|log|drop|owners|from-recipe ...   merge without a run; see `contmerge merge --help`
contmerge yaml RECIPE OUT ...                                     mergekit-yaml, with our merge methods

With --plugin FILE.py, commands that train or merge use your own rules and strategies.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from hf_contmerge.commands._plugins import add_plugin_argument
from hf_contmerge.errors import SHARED, ContmergeError
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.phases import PHASES
from hf_contmerge.runtime.files import FolderLock
from hf_contmerge.runtime.plugins import use_plugins

Add = Callable[[argparse.ArgumentParser], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["yaml"]:  # mergekit parses its own options
        return _yaml(words[1:])
    args = _parse(words)
    with clear_errors() as outcome:
        use_plugins(args.plugin)
        args.do(args)
    return outcome.code


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments.

    Only the module of the named command is imported, to keep start-up short.
    """
    parser = argparse.ArgumentParser(
        prog="contmerge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(plugin=[])
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


def _yaml(words: list[str]) -> int:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from hf_contmerge.merging.in_mergekit.plugin import install

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_plugin_argument(parser)
    args, words = parser.parse_known_args(words)
    try:
        use_plugins(args.plugin)
        install()
    except ContmergeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    mergekit_yaml(args=words, prog_name="contmerge yaml")
    return 0


class _Outcome:
    code = 0


@contextmanager
def clear_errors() -> Iterator[_Outcome]:
    """Print user errors as one message and set their exit code.

    Other errors keep their traceback.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # dozens of bars from four libraries; our log lines report progress
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_contmerge").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has its own handler
    outcome = _Outcome()
    try:
        yield outcome
    except ContmergeError as error:
        _tell(error, str(error))
        outcome.code = error.exit_code
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EROFS: "the disk is read-only",
            errno.EACCES: "no permission",
        }
        if error.errno not in reasons:
            raise
        _tell(
            error,
            f"cannot write {error.filename or 'the run folder'}: {reasons[error.errno]}. Finished work is kept: fix "
            "this and run the same command again.",
        )
        outcome.code = 2


def _tell(error: Exception, message: str) -> None:
    """Print an error on one line.

    Rank 0 prints errors raised on all ranks; other errors are printed by their own rank.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or SHARED not in getattr(error, "__notes__", ()):
        print(f"Error on rank {rank}: {message}" if rank else f"Error: {message}", file=sys.stderr)


_COMMANDS: dict[str, tuple[str, Add]] = {
    "run": ("start or resume a run", _of("run")),
    "new": ("write a commented recipe", _of("new")),
    "plan": ("check a recipe; estimate memory, disk and time", _of("plan")),
    "status": ("show finished and remaining phases", _add_status),
    "score": ("measure a model; cached scores are instant", _of("score")),
    "statistics": ("measure an expert for merge rules with statistics", _of("statistics")),
    "report": ("write the report again, print the table", _add_report),
    "compare": ("compare runs on the same documents", _add_compare),
    "redo": ("drop a phase and all later ones", _add_redo),
    "push": ("push a merged model to the Hub, with its lineage", _add_push),
    "merge": ("merge without a run: init, add, export, log, drop, owners, from-recipe", _of("merge")),
    "yaml": ("mergekit-yaml, with our merge methods", lambda _: None),
}
"""Name -> (help text, function to add its arguments)."""


if __name__ == "__main__":
    sys.exit(main())
