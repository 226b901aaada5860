"""What users say about a merge, in words: a rule with its parameters, a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.merge_rules import MergeRule, named_rule, rule_of


def make_rule(name: str, parameters: Mapping[str, Any], *, where: str = "") -> MergeRule:
    """Make a rule. Raises RecipeError for an unknown rule or parameter, or a value outside its range.

    `where`: the place in a recipe that asks for it.
    """
    for word, value in parameters.items():
        if value == "auto":
            raise RecipeError(
                f"{where + ': ' if where else ''}`{word}: auto` is found by scores on validation documents, which only "
                "`contmerge run` measures, in an entry of a recipe's `merge`. Give a number here."
            )
    cls = named_rule(name, where=where)
    try:
        return rule_of(cls, name, parameters)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}" if where else str(error)) from error


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return a floating dtype by its name in config.json. Raises RecipeError for any other word."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise RecipeError(unknown("dtype", name, known))
    return known[name] if name else None
