"""The command line's parser: suggestions, examples, 80 columns."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from hf_contmerge.errors import unknown
from hf_contmerge.runtime.hiding import printable

_WIDEST = 80


class Columns(argparse.RawDescriptionHelpFormatter):
    """Formats help in at most 80 columns."""

    def __init__(self, prog: str, **more: Any) -> None:
        width = min(_WIDEST, shutil.get_terminal_size().columns)
        super().__init__(prog, **{"max_help_position": 26, **more, "width": max(width, 40) - 1})

    def add_argument(self, action: argparse.Action) -> None:
        """Leave room for names of commands, which argparse indents afterwards."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment


class CommandParser(argparse.ArgumentParser):
    """A parser that knows an example and suggests near words.

    Its errors are one line, like those of the commands.
    """

    def __init__(self, *args: Any, example: str = "", **more: Any) -> None:
        if example:
            more["epilog"] = f"Example:\n  {example}"
        super().__init__(*args, formatter_class=Columns, **more)
        self._commands: argparse.Action | None = None

    def add_commands(self, metavar: str) -> Any:
        """Add commands; without a word, the parser prints its help."""
        commands = self.add_subparsers(required=True, metavar=metavar)
        self._commands = commands
        return commands

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all words.

        Unknown ones are refused by the parser with the known ones.
        """
        words = list(sys.argv[1:] if args is None else args)
        if self._commands and not words:
            self.print_help()
            self.exit(2)
        if not self._commands:
            self._check_options(words)
        known, extra = super().parse_known_args(words, namespace)
        if extra:
            self.error(self._unknown_option(extra[0]) if extra[0].startswith("-") else f"unexpected word {extra[0]!r}")
        return known, extra

    def _check_options(self, words: Iterable[str]) -> None:
        """Refuse misspelt options before argparse misses required ones."""
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if word.startswith("--") and not any(option.startswith(name) for option in self._option_string_actions):
                self.error(self._unknown_option(word))

    def _unknown_option(self, word: str) -> str:
        return unknown("option", word.partition("=")[0], (o for o in self._option_string_actions if o.startswith("--")))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuse empty words: as a path, one is the current folder."""
        if "" in arg_strings and action is not self._commands:
            name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            self.error(f"{name} is empty, as an unset shell variable is")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = f"value of {action.option_strings[-1]}" if action.option_strings else action.dest
            what = "command" if action is self._commands else what
            self.error(unknown(what, str(value), map(str, action.choices)))

    def error(self, message: str) -> NoReturn:
        """Print one line; exit with code 2."""
        text = f"{message[:1].upper()}{message[1:]}".rstrip(".")
        self.exit(2, printable(f"Error: {text}. See `{self.prog} --help`.\n"))
