"""`contmerge example`: recipes and launcher configurations to start from."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from hf_contmerge.commands._arguments import add_json_argument, print_json
from hf_contmerge.commands.parser import CommandParser
from hf_contmerge.errors import RecipeError, ResourceError, shell_word
from hf_contmerge.runtime.examples import Example, examples, find_example
from hf_contmerge.runtime.files import write_atomically

_NEXT = {
    "recipe": "contmerge plan {file}",
    "mergekit": "contmerge merge from-recipe {file} merged",
    "launcher": "contmerge run RECIPE --config-file {file}",
}


def add_arguments(parser: CommandParser) -> None:
    """Add the commands of `contmerge example`."""
    kinds = parser.add_commands("WHAT")
    text = "list recipes and accelerate configurations"
    listed = kinds.add_parser("list", help=text, description=text, example="contmerge example list")
    add_json_argument(listed)
    listed.set_defaults(do=_list)
    text = "copy one into a folder, to be changed there"
    copied = kinds.add_parser("copy", help=text, description=text, example="contmerge example copy finance")
    copied.add_argument("name", metavar="NAME", help="as listed, such as finance or accelerate/fsdp2")
    copied.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="where to (default: here)")
    copied.add_argument("--force", action="store_true", help="overwrite a file of that name")
    copied.set_defaults(do=_copy)


def _list(args: argparse.Namespace) -> None:
    every = examples().values()
    if args.json:
        print_json([{"name": e.name, "kind": e.kind, "about": e.sentence(), "file": str(e.file)} for e in every])
        return
    for example in every:
        print(f"{example.name:22s} {textwrap.shorten(example.sentence(), 56, placeholder=' ...')}")


def _copy(args: argparse.Namespace) -> None:
    example = find_example(args.name)
    out = Path(args.folder) / example.file.name
    if out.exists() and not args.force:
        raise RecipeError(f"{out} exists. Choose another folder, or overwrite it with --force.")
    _write(out, example)
    print(f"Wrote {out}. Next: {_NEXT[example.kind].format(file=shell_word(out))}")


def _write(out: Path, example: Example) -> None:
    try:
        write_atomically(out, example.text())
    except OSError as error:
        raise ResourceError(f"Cannot write {out}: {error.strerror}. Choose another folder.") from error
