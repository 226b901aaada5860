"""Merge entries: rules, kinds of experts, dtypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_contmerge.errors import RecipeError
from hf_contmerge.merge_rules import COMMON, MergeRule, yaml_word
from hf_contmerge.merging.merge import require_linear
from hf_contmerge.merging.rules import dtype_named, make_rule
from hf_contmerge.run.recipe.parts import Rung
from hf_contmerge.run.recipe.schema import Merge, Recipe, Train
from hf_contmerge.scoring.forgetting.search import MOST_SEARCHED


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


def kinds_of(recipe: Recipe) -> dict[str, str]:
    """Return the kinds of a recipe's experts. Raises as `make_entry_rule`."""
    return merge_kinds(recipe, {entry.name: make_entry_rule(entry) for entry in recipe.merge})


def make_entry_rule(entry: Merge) -> MergeRule:
    """Make the rule of a merge entry.

    An `auto` parameter keeps the rule's default, the start of its search.

    Raises:
        RecipeError: as `make_rule`, or `auto` for a parameter that changes the state and cannot be searched.
    """
    where = f"merge entry {entry.name}"
    rule = make_rule(entry.rule, {w: v for w, v in entry.settings().items() if v != "auto"}, where=where)
    words = [yaml_word(f) for f in rule.searchable()]
    for word in entry.auto:
        if word not in words:
            own = [w for w in words if w not in COMMON]
            known = f"`auto` is for {', '.join(own)}" if own else f"{entry.rule} has no parameter for `auto`"
            raise RecipeError(f"{where}: {word} of {entry.rule} cannot be `auto`; {known}. Set a value.")
    if len(entry.auto) > MOST_SEARCHED:
        raise RecipeError(
            f"{where}: {', '.join(entry.auto)} are `auto`, but at most {MOST_SEARCHED} can be searched together. Set a "
            f"value for {entry.auto[-1]}."
        )
    require_linear(entry.rule, rule, entry.weights.values(), where=where)
    return rule


def merged_dtype(entry: Merge) -> torch.dtype | None:
    """Return an entry's dtype (None: the base's)."""
    return dtype_named(None if entry.dtype == "auto" else entry.dtype)
