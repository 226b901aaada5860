"""`contmerge schema`: the JSON schema of recipes."""

from __future__ import annotations

import argparse
import json

from hf_contmerge.run.recipe.json_schema import recipe_schema
from hf_contmerge.runtime.examples import own_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge schema`: none."""
    parser.set_defaults(do=_schema)


def _schema(_args: argparse.Namespace) -> None:
    print(json.dumps(recipe_schema(own_file("docs", "recipe.md")), indent=1, ensure_ascii=False))
