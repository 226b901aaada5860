"""What users say about a merge, in words: a rule with its parameters, a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.merge_rules import MergeRule, get_rule, rule_names, yaml_word

if TYPE_CHECKING:  # merging on its own needs no recipes
    from hf_contmerge.recipe import Merge


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
    try:
        return get_rule(name, **parameters)
    except KeyError as error:
        raise RecipeError(unknown("rule", name, rule_names(), where=where)) from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}" if where else str(error)) from error


def make_entry_rule(entry: Merge) -> MergeRule:
    """Make the rule of a merge entry; an `auto` parameter has the rule's own value, from which its search starts.

    Raises RecipeError as `make_rule` does, and for `auto` where a value cannot be searched: it would change the state.
    """
    where = f"merge entry {entry.name}"
    rule = make_rule(entry.rule, {w: v for w, v in entry.parameters.items() if v != "auto"}, where=where)
    words = [yaml_word(f) for f in rule.tunable]
    for word in (w for w, v in entry.parameters.items() if v == "auto"):
        if word not in words:
            known = f"`auto` is for {', '.join(words)}" if words else f"{entry.rule} has no parameter for `auto`"
            raise RecipeError(f"{where}: {word} of {entry.rule} cannot be `auto`; {known}. Give a value.")
    return rule


def merged_dtype(entry: Merge) -> torch.dtype | None:
    """Return the dtype of an entry's merged models; None: as in the base."""
    return dtype_named(None if entry.dtype == "auto" else entry.dtype)


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return a floating dtype by its name in config.json. Raises RecipeError for any other word."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise RecipeError(unknown("dtype", name, known))
    return known[name] if name else None
