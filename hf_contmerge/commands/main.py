"""The `contmerge` command.

contmerge run RECIPE [--run DIR] [--set A.B=C] [--until PHASE]    start or resume a run
contmerge new [RECIPE] [--base MODEL --stage NAME=SOURCE ...]     write a commented recipe
contmerge plan RECIPE [--run DIR] [--set A.B=C] [--json]          check a recipe; memory, disk and time of each phase
contmerge status RUN                                              show finished and remaining phases
contmerge score MODEL [--tasks A,B] [--run RUN] ...               measure a model; cached scores are instant
contmerge statistics MODEL --data FILE [--base MODEL] ...         measure an expert for merge rules with statistics
contmerge report RUN                                              write the report again, print the table
contmerge compare RUN RUN... [--out DIR]                          compare runs on the same documents
contmerge study STUDY [--plan] [--jobs N] [--part I/N]            run a recipe over orders, seeds and settings
contmerge remix RUN --want LAW=1,CODE=0.5 [--keep A,B]             weights of stages, searched after a run
contmerge redo RUN PHASE [--stage NAME]                           drop a phase and all later ones
contmerge push RUN [--merge ENTRY] [--repo-id OWNER/NAME]         push a merged model to the Hub, with its lineage
contmerge verify RUN|STATE|MODEL                                  compare all files with their records
contmerge merge init|add|export|log|drop|owners|from-recipe ...   merge without a run; see `contmerge merge --help`
contmerge yaml RECIPE OUT ...                                     mergekit-yaml, with our merge methods

With --plugin FILE.py, commands that train or merge use your own rules and strategies.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType

from hf_contmerge.commands._plugins import add_plugin_argument
from hf_contmerge.errors import SHARED, ContmergeError
from hf_contmerge.runtime.hiding import printable
from hf_contmerge.runtime.plugins import use_plugins
from hf_contmerge.runtime.refusals import explain, refusals
from hf_contmerge.runtime.stopping import Stopped, stoppable

Add = Callable[[argparse.ArgumentParser], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["yaml"]:  # mergekit parses its own options
        return _yaml(words[1:])
    return do(_parse(words))


def do(args: argparse.Namespace) -> int:
    """Run a parsed command; return its exit code."""
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


def _of(module: str, function: str = "add_arguments") -> Add:
    return lambda parser: getattr(import_module(f"hf_contmerge.commands.{module}"), function)(parser)


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
        _tell(error, str(error))
        return error.exit_code
    mergekit_yaml(args=words, prog_name="contmerge yaml")
    return 0


class _Outcome:
    code = 0


class _Printable(logging.Formatter):
    """Formats log lines without secrets and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


@contextmanager
def clear_errors() -> Iterator[_Outcome]:
    """Print user errors as one message and set their exit code.

    Other errors keep their traceback.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # dozens of bars from four libraries; our log lines report progress
    lines = logging.StreamHandler()
    lines.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    sys.excepthook = _print_traceback
    logging.getLogger("hf_contmerge").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has its own handler
    outcome = _Outcome()
    try:
        with stoppable(), refusals(Path()):
            yield outcome
    except Stopped as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"Stopped by {stop.cause}. Finished work is kept: the same command continues.", file=sys.stderr)
        outcome.code = stop.exit_code
        _wait_for_ranks()
    except ContmergeError as error:
        _tell(error, str(error))
        outcome.code = error.exit_code
    except OSError as error:
        _tell(error, f"{explain(error)}, then run the same command again: finished work is kept.")
        outcome.code = 2


def _wait_for_ranks() -> None:
    """Wait for the other ranks' own signal before our connections break."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(1)


def _tell(error: Exception, message: str) -> None:
    """Print an error on one line.

    Rank 0 prints errors raised on all ranks; other errors are printed by their own rank.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or SHARED not in getattr(error, "__notes__", ()):
        print(printable(f"Error on rank {rank}: {message}" if rank else f"Error: {message}"), file=sys.stderr)


_COMMANDS: dict[str, tuple[str, Add]] = {
    "run": ("start or resume a run", _of("run")),
    "new": ("write a commented recipe", _of("new")),
    "plan": ("check a recipe; estimate memory, disk and time", _of("plan")),
    "status": ("show finished and remaining phases", _of("run_folder", "add_status")),
    "score": ("measure a model; cached scores are instant", _of("score")),
    "statistics": ("measure an expert for merge rules with statistics", _of("statistics")),
    "report": ("write the report again, print the table", _of("run_folder", "add_report")),
    "compare": ("compare runs on the same documents", _of("run_folder", "add_compare")),
    "study": ("run a recipe over orders, seeds and settings", _of("study")),
    "remix": ("search weights of stages after a run, without training", _of("remix")),
    "redo": ("drop a phase and all later ones", _of("run_folder", "add_redo")),
    "push": ("push a merged model to the Hub, with its lineage", _of("run_folder", "add_push")),
    "verify": ("compare all files with their records; merge a model again", _of("verify")),
    "merge": ("merge without a run: init, add, export, log, drop, owners, from-recipe", _of("merge")),
    "yaml": ("mergekit-yaml, with our merge methods", lambda _: None),
}
"""Name -> (help text, function to add its arguments)."""


if __name__ == "__main__":
    sys.exit(main())
