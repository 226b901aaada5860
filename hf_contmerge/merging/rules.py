"""Rules and dtypes by name, with errors for users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.merge_rules import MergeRule, named_rule, rule_of
from hf_contmerge.models.rounding import ROUNDINGS, Rounding


def make_rule(name: str, parameters: Mapping[str, Any], *, where: str = "") -> MergeRule:
    """Make a rule from its name and parameters.

    Args:
        name: the rule's name.
        parameters: its parameters.
        where: its place in a recipe, for messages.

    Raises:
        RecipeError: an unknown rule or parameter, or a value outside its range.
    """
    for word, value in parameters.items():
        if value == "auto":
            raise RecipeError(
                f"{where + ': ' if where else ''}`{word}: auto` needs scores on validation documents, measured only by "
                "`contmerge run` for an entry of a recipe's `merge`. Set a number here."
            )
    cls = named_rule(name, where=where)
    try:
        return rule_of(cls, name, parameters)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}" if where else str(error)) from error


def recorded_rule(name: str, parameters: Mapping[str, Any], *, where: str = "") -> MergeRule:
    """Make the rule of a record, however old.

    Parameters that the record lacks have their default at that time. Raises as `make_rule`.
    """
    return make_rule(name, {**named_rule(name, where=where).former, **parameters}, where=where)


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return a floating dtype by name.

    Raises:
        RecipeError: an unknown name.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in dtypes:
        raise RecipeError(unknown("dtype", name, dtypes))
    return dtypes[name] if name else None


def rounding_named(name: str | None) -> Rounding:
    """Return a rounding by name; None: stochastic.

    Raises:
        RecipeError: an unknown name.
    """
    if name is not None and name not in ROUNDINGS:
        raise RecipeError(unknown("rounding", name, ROUNDINGS))
    return cast(Rounding, name or ROUNDINGS[0])
