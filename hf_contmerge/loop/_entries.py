"""Merge entries: rules, kinds of experts, dtypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_contmerge.errors import RecipeError
from hf_contmerge.merge_rules import MergeRule, yaml_word
from hf_contmerge.merging.rules import dtype_named, make_rule
from hf_contmerge.run.recipe.parts import Rung
from hf_contmerge.run.recipe.schema import Merge, Recipe, Train


def with_replay(train: Train, rung: Rung) -> Train:
    """Return training settings with a rung's replay added."""
    own = train.parameters_of()
    strategies = (*train.strategy, *(() if "replay" in train.strategy else ("replay",)))
    parameters = {**own, "replay": {**own.get("replay", {}), **rung.parameters}}
    return Train.model_validate({**train.model_dump(), "strategy": strategies, "parameters": parameters})


def merge_kinds(recipe: Recipe, rules: Mapping[str, MergeRule]) -> dict[str, str]:
    """Return the kind of expert per merge entry name."""
    starts = {entry.name: entry.start_from or rules[entry.name].start_from for entry in recipe.merge}
    return {name: f"merged-{name}" if start == "merged" else start for name, start in starts.items()}


def make_entry_rule(entry: Merge) -> MergeRule:
    """Make the rule of a merge entry.

    An `auto` parameter keeps the rule's default, the start of its search.

    Raises:
        RecipeError: as `make_rule`, or `auto` for a parameter that changes the state and cannot be searched.
    """
    where = f"merge entry {entry.name}"
    rule = make_rule(entry.rule, {w: v for w, v in entry.parameters.items() if v != "auto"}, where=where)
    words = [yaml_word(f) for f in rule.tunable]
    for word in (w for w, v in entry.parameters.items() if v == "auto"):
        if word not in words:
            known = f"`auto` is for {', '.join(words)}" if words else f"{entry.rule} has no parameter for `auto`"
            raise RecipeError(f"{where}: {word} of {entry.rule} cannot be `auto`; {known}. Set a value.")
    return rule


def merged_dtype(entry: Merge) -> torch.dtype | None:
    """Return an entry's dtype (None: the base's)."""
    return dtype_named(None if entry.dtype == "auto" else entry.dtype)
