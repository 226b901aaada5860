"""`contmerge schema`: the JSON schema of recipes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_contmerge.errors import ResourceError
from hf_contmerge.run.recipe.json_schema import recipe_schema
from hf_contmerge.runtime.examples import own_file
from hf_contmerge.runtime.files import write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge schema`."""
    parser.add_argument("--out", metavar="FILE", help="write it there instead of printing it")
    parser.set_defaults(do=_schema)


def _schema(args: argparse.Namespace) -> None:
    text = json.dumps(recipe_schema(own_file("docs", "recipe.md")), indent=1, ensure_ascii=False)
    if not args.out:
        print(text)
        return
    try:
        write_atomically(Path(args.out), f"{text}\n")
    except OSError as error:
        raise ResourceError(f"Cannot write {args.out}: {error.strerror}. Choose another file.") from error
