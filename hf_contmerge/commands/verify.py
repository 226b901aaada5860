"""`contmerge verify`: compare files with records, merges with parents.

    contmerge verify runs/x                            every file of a run
    contmerge verify state                             every file of a merge state
    contmerge verify merged                            a written model: its files, then the merge made again
    contmerge verify owner/model                       the same for a model that was pushed
    contmerge verify owner/model --parent law=experts/law

Exit code 0: all is as recorded. 1: something is damaged, or the model is not what its parents give.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hf_contmerge.commands._arguments import add_json_argument, print_json
from hf_contmerge.errors import DamageError, RecipeError, RunError

if TYPE_CHECKING:
    from hf_contmerge.loop.verify import Reading

_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge verify`."""
    parser.add_argument("what", metavar="RUN|STATE|MODEL", help="a folder, or owner/model[@revision] on the Hub")
    parser.add_argument(
        "--parent", action="append", default=[], metavar="NAME=MODEL", help="where the base, or a stage's expert, lies"
    )
    parser.add_argument("--files-only", action="store_true", help="do not merge a model again")
    add_json_argument(parser)
    parser.set_defaults(do=verify_command)


def verify_command(args: argparse.Namespace) -> None:
    """Read all files; print the damaged ones, and the remedy.

    Raises:
        DamageError: a file is not as recorded, or the model not what its parents give.
    """
    folder = Path(args.what)
    if (folder / "recipe.yml").is_file():
        from hf_contmerge.loop.verify import verify_run
        from hf_contmerge.run.folder import Run

        try:
            run = Run.load(folder)
        except RunError as error:  # nothing else can be read without the recipe
            raise DamageError(str(error)) from error
        _show(verify_run(run), args)
    elif (folder / "state.json").is_file():
        from hf_contmerge.loop.verify import verify_state
        from hf_contmerge.merging.state import MergeState

        _show(verify_state(MergeState(folder)), args)
    else:
        _verify_model(args, _parents(args.parent))


def _verify_model(args: argparse.Namespace, parents: dict[str, str]) -> None:
    from hf_contmerge.loop.proof import find_model, prove
    from hf_contmerge.loop.verify import verify_model

    model = find_model(args.what)
    _show(verify_model(model.folder), args)
    if not args.files_only and model.lineage:
        for line in prove(model, parents):
            if not args.json:
                print(line)


def _parents(words: list[str]) -> dict[str, str]:
    parents: dict[str, str] = {}
    for word in words:
        name, _, parents[name] = word.partition("=")
        if not parents[name]:
            raise RecipeError(f"--parent {word}: expected NAME=MODEL, as in --parent law=experts/law.")
    return parents


def _show(reading: Reading, args: argparse.Namespace) -> None:
    rest = [str(path.relative_to(reading.folder)) for path in reading.uncovered()]
    if args.json:
        damaged = [{"file": str(damage.file), "what": damage.what, "redo": damage.redo} for damage in reading.damages]
        folder = str(reading.folder)
        print_json({"folder": folder, "files": len(reading.read), "damaged": damaged, "without_record": rest})
    else:
        _tell(reading, rest)
    if reading.damages:
        raise DamageError(f"{len(reading.damages)} of {len(reading.read)} files of {reading.folder} are damaged.")


def _tell(reading: Reading, rest: list[str]) -> None:
    for damage in reading.damages:
        print(f"{damage.what} {damage.redo}")
    if rest:
        more = f" and {len(rest) - _SHOWN} more" if len(rest) > _SHOWN else ""
        print(f"Covered by no record: {', '.join(rest[:_SHOWN])}{more}.")
    if not reading.damages:
        print(f"{reading.folder}: {len(reading.read)} files are as recorded.")
