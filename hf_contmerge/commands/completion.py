"""`contmerge completion`: the shell's script for completing words with Tab."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from hf_contmerge.commands.parser import CommandParser

_SHELLS = ("bash", "zsh", "fish")
_PATHS = re.compile(r"(?i)\b(recipe|file|folder|run|state|model|base|expert|dir|data|out|study)")
"""Words of arguments that files and folders answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge completion`."""
    parser.add_argument("shell", choices=_SHELLS, help="the shell to complete in")
    parser.set_defaults(do=_completion)


def _completion(args: argparse.Namespace) -> None:
    print(completion_script(args.shell))


def completion_script(shell: str) -> str:
    """Return a shell's completion script.

    It lists commands, options and choices as they are now; a new version needs a new script.
    """
    import shtab

    from hf_contmerge.commands.main import every_command

    parser = every_command()
    for action in _actions(parser):
        if action.choices is None and action.nargs != 0 and _PATHS.search(_asked(action)):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell)


def _actions(parser: CommandParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)


def _asked(action: argparse.Action) -> str:
    words = action.metavar or action.dest
    return " ".join(words) if isinstance(words, tuple) else words
