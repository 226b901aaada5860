"""The `contmerge` command: `contmerge --help` lists its commands.

With --plugin FILE.py, commands that train or merge use your own rules and strategies.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_contmerge import __version__
from hf_contmerge.commands._plugins import add_plugin_argument
from hf_contmerge.commands.parser import CommandParser
from hf_contmerge.errors import SHARED, ContmergeError
from hf_contmerge.runtime.hiding import printable
from hf_contmerge.runtime.plugins import use_plugins
from hf_contmerge.runtime.ranks import is_launched
from hf_contmerge.runtime.refusals import explain, refusals
from hf_contmerge.runtime.stopping import Stopped, stoppable

Add = Callable[[Any], None]
_PIPE = 141
"""The shell's code for a program whose reader has ended: 128 and SIGPIPE."""

_WHAT = """Continual merging of language models: train, merge, measure, again and again.
`contmerge COMMAND --help` shows the options of a command, and an example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["yaml"]:  # mergekit parses its own options
        return _yaml(words[1:])
    return do(_parse(words), again=shlex.join(["contmerge", *words]))


def do(args: argparse.Namespace, *, again: str = "the same command") -> int:
    """Run a parsed command; return its exit code.

    `again`: the command that continues after a stop.
    """
    with clear_errors(again) as outcome:
        use_plugins(args.plugin)
        args.do(args)
    return outcome.code


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments.

    Only the module of the named command is imported, to keep start-up short.
    """
    if words[:1] == ["merge"]:
        from hf_contmerge.commands.merge import spelt_out

        words = ["merge", *spelt_out(list(words[1:]))]
    return make_parser(words[:1]).parse_args(words)


def make_parser(names: Sequence[str]) -> CommandParser:
    """Return the parser; of its commands, the named ones are complete."""
    parser = CommandParser(prog="contmerge", description=_WHAT, example="contmerge run mine.yml")
    parser.add_argument("--version", action="version", version=f"contmerge {__version__}")
    parser.set_defaults(plugin=[])
    commands = parser.add_commands("COMMAND")
    for name, (text, example, add) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", example=example)
        if name in names:
            add(command)
    return parser


def every_command() -> CommandParser:
    """Return the parser with all commands complete."""
    return make_parser(list(_COMMANDS))


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
def clear_errors(again: str = "the same command") -> Iterator[_Outcome]:
    """Print user errors as one message and set their exit code.

    Other errors keep their traceback. `again`: as in `do`.
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
            sys.stdout.flush()
    except Stopped as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(printable(f"Stopped by {stop.cause}. Finished work is kept; continue with: {again}"), file=sys.stderr)
        outcome.code = stop.exit_code
        _wait_for_ranks()
    except ContmergeError as error:
        _tell(error, str(error))
        outcome.code = error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            outcome.code = _PIPE
        else:
            _tell(error, f"{explain(error)}, then run the same command again: finished work is kept.")
            outcome.code = 2


def _reader_left() -> bool:
    """Check if the reader of our output has ended, as `head` does.

    What is still to be written then goes nowhere, also at the end of Python.
    """
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # a notebook or a test keeps what is printed
        return False
    watched = select.poll()
    watched.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True


def _wait_for_ranks() -> None:
    """Wait for the other ranks' own signal before our connections break."""
    if is_launched():
        time.sleep(1)


def _tell(error: Exception, message: str) -> None:
    """Print an error on one line.

    Rank 0 prints errors raised on all ranks; other errors are printed by their own rank.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or SHARED not in getattr(error, "__notes__", ()):
        print(printable(f"Error on rank {rank}: {message}" if rank else f"Error: {message}"), file=sys.stderr)


_COMMANDS: dict[str, tuple[str, str, Add]] = {
    "run": (
        "start or resume a run",
        "contmerge run mine.yml --run runs/second --set train.max_steps=100",
        _of("run"),
    ),
    "new": (
        "write a commented recipe",
        "contmerge new mine.yml --base Qwen/Qwen3-0.6B --stage law=data/law.jsonl",
        _of("new"),
    ),
    "example": (
        "list and copy recipes to start from",
        "contmerge example copy finance",
        _of("example"),
    ),
    "plan": (
        "check a recipe; estimate memory, disk and time",
        "contmerge plan mine.yml --processes 8",
        _of("plan"),
    ),
    "status": (
        "show finished phases, the next one, and the time left",
        "contmerge status runs/mine --watch",
        _of("status"),
    ),
    "score": (
        "measure a model; cached scores are instant",
        "contmerge score owner/model --tasks arc_easy,piqa --limit 200",
        _of("score"),
    ),
    "gate": (
        "compare a candidate with a model; exit 3 on a proven loss",
        "contmerge gate owner/model runs/mine --tasks arc_easy --max-loss 0.01",
        _of("gate"),
    ),
    "chat": (
        "talk to a model, or to two side by side",
        "contmerge chat runs/mine --against Qwen/Qwen3-0.6B",
        _of("chat"),
    ),
    "statistics": (
        "measure an expert for merge rules with statistics",
        "contmerge statistics experts/law --data law.jsonl",
        _of("statistics"),
    ),
    "report": (
        "write the report again, print the table",
        "contmerge report runs/mine --open",
        _of("run_folder", "add_report"),
    ),
    "compare": (
        "compare runs on the same documents",
        "contmerge compare runs/a runs/b --out comparison",
        _of("run_folder", "add_compare"),
    ),
    "study": (
        "run a recipe over orders, seeds and settings",
        "contmerge study study.yml --jobs 2",
        _of("study"),
    ),
    "remix": (
        "search weights of stages after a run, without training",
        "contmerge remix runs/law-then-code --want law=1,code=0.5 --keep hellaswag",
        _of("remix"),
    ),
    "redo": (
        "drop a phase and all later ones",
        "contmerge redo runs/mine merge --stage medicine",
        _of("run_folder", "add_redo"),
    ),
    "push": (
        "push a run, state, model or expert to the Hub, with its lineage",
        "contmerge push runs/mine --merge magmax --repo-id me/mine --dry-run",
        _of("push"),
    ),
    "verify": (
        "compare all files with their records; merge a model again",
        "contmerge verify me/mine --parent law=experts/law",
        _of("verify"),
    ),
    "merge": (
        "merge models without a run, at once or one after another",
        "contmerge merge Qwen/Qwen3-0.6B owner/law owner/code --rule magmax -o merged",
        _of("merge"),
    ),
    "export": (
        "write a model as a GGUF file, with an Ollama Modelfile",
        "contmerge export runs/mine out --gguf --quantise q4_k_m",
        _of("export"),
    ),
    "extract-lora": (
        "write the difference of two models as a LoRA adapter",
        "contmerge extract-lora owner/law --base Qwen/Qwen3-0.6B --rank 32 -o law-lora",
        _of("extract"),
    ),
    "schema": (
        "print the JSON schema of recipes, for editors",
        "contmerge schema --out contmerge.schema.json",
        _of("schema"),
    ),
    "completion": (
        "print a script for completing commands with Tab",
        "contmerge completion bash",
        _of("completion"),
    ),
    "doctor": (
        "check this machine and the installed packages",
        "contmerge doctor",
        _of("doctor"),
    ),
    "yaml": (
        "mergekit-yaml, with our merge methods",
        "contmerge yaml recipes/magmax.yml out",
        lambda _: None,
    ),
}
"""Name -> (help text, example, function to add its arguments)."""


if __name__ == "__main__":
    sys.exit(main())
