"""mergekit recipes of our rules, read and written: the same merge by this engine and by the stock `mergekit-yaml`.

What this engine would do otherwise than mergekit is refused, with what does it. The weights are the same to the last
bit; for task_arithmetic and ties, which are mergekit's own there, to float32 rounding, and for adapters, which mergekit
first merges into a model of the base's dtype, to that rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_contmerge.errors import RecipeError
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging.in_mergekit.recipe import MERGEKITS_OWN, MergekitRecipe
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge
from hf_contmerge.merging.rules import dtype_named, make_rule
from hf_contmerge.merging.write import Output
from hf_contmerge.models.config import tokens_of
from hf_contmerge.models.experts import Expert, check_mergeable, open_expert
from hf_contmerge.models.folder import is_adapter, resolve_model
from hf_contmerge.models.weights import SHARD_SIZE, Weights
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.files import new_folder


def carry_out(
    recipe: MergekitRecipe,
    out: Path,
    *,
    shard_size: int = SHARD_SIZE,
    crew: Crew | None = None,
    force: bool = False,
) -> RunningMerge:
    """Merge as a recipe says, in one pass, without a running state that stays; return the merge.

    Raises ModelError or RecipeError before anything is written.
    """
    crew, rule = crew or Crew(), make_rule(recipe.rule, recipe.parameters)
    folder = resolve_model(recipe.base)
    check_mergeable(folder)
    base = Weights(folder)
    folders = [resolve_model(m, adapters=True) for m in recipe.models]
    listed = [FoldedExpert("", f, name=name) for f, name in zip(folders, recipe.models, strict=True)]
    names = {recipe.base, str(folder.resolve())}
    experts = [open_expert(f, base, base_names=names, force=force) for f in folders]
    dtype = _written_dtype(recipe, base, experts)
    companions = resolve_model(recipe.tokenizer_from) if recipe.tokenizer_from else None
    if companions:
        _require_same_tokens(companions, base, [folder, *(f for f in folders if not is_adapter(f))])
    merge = RunningMerge(folder, recipe.rule, rule)
    with new_folder(out, crew.ranks) as scratch:
        output = Output(scratch, dtype, shard_size, companions)
        return merge.fold(listed, None, merged=output, opened=experts, crew=crew)


def mergekit_yaml(
    rule_name: str,
    rule: MergeRule,
    *,
    base: Path,
    experts: Sequence[Path],
    dtype: torch.dtype | None,
    scale: float | None = None,
) -> str:
    """Return the recipe with which the stock `mergekit-yaml` makes the same merge from the experts.

    `scale`: in place of the rule's own.

    Where an expert is an adapter, `mergekit-yaml` needs `--lora-merge-cache`.
    """
    parameters = {**rule.parameters(), **MERGEKITS_OWN.get(rule_name, {})}
    if scale is not None:
        parameters["scale"] = scale
    recipe = {
        "merge_method": rule_name,
        "base_model": _spelled(base),
        "models": [{"model": _spelled(base, e) if is_adapter(e) else _spelled(e)} for e in experts],
        **({"parameters": parameters} if parameters else {}),
        "dtype": "float32",
        "out_dtype": str(dtype or base_dtype(base)).removeprefix("torch."),
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def base_dtype(base: Path) -> torch.dtype:
    """Return the dtype of most of a model's weights."""
    weights = Weights(base)
    counts: dict[torch.dtype, int] = {}
    for name in weights.floating():
        counts[weights.dtype(name)] = counts.get(weights.dtype(name), 0) + torch.Size(weights.shape(name)).numel()
    return max(counts, key=lambda d: counts[d])


def _written_dtype(recipe: MergekitRecipe, base: Weights, experts: Sequence[Expert]) -> torch.dtype | None:
    """Return the dtype of the merged weights (None: each as in the base).

    Raises RecipeError where mergekit would round more than once, to `dtype` (by default the widest of a tensor's
    inputs) and to `out_dtype`: here the arithmetic is float32, and rounded once.
    """
    asked, out = dtype_named(recipe.dtype), dtype_named(recipe.out_dtype)
    cure = "Set `dtype: float32`, and `out_dtype` to what shall be written."
    if asked == torch.float32:
        return out or asked
    sources = [base, *(Weights(e.folder) for e in experts if e.kind == "model")]
    found: dict[torch.dtype, str] = {}
    as_base = True
    for name in base.floating():
        widest = base.dtype(name)
        for source in sources:
            if asked and source.dtype(name) != asked:
                raise RecipeError(
                    f"`dtype: {recipe.dtype}` would round {name} of {source.folder} ({source.dtype(name)}) before it "
                    f"is merged. {cure}"
                )
            widest = torch.promote_types(widest, source.dtype(name))
        found[widest] = name
        as_base = as_base and widest == base.dtype(name)
    halves = [d for d in found if d.itemsize < torch.float32.itemsize]
    if halves and recipe.rule in MERGEKITS_OWN:
        raise RecipeError(f"mergekit's own {recipe.rule} would compute {found[halves[0]]} in {halves[0]}. {cure}")
    if out and any(d != out for d in halves):
        raise RecipeError(f"{found[halves[0]]} would be rounded to {halves[0]} before it is written as {out}. {cure}")
    if out or as_base:
        return out
    if len(found) > 1:
        raise RecipeError(f"The merged weights would be of {len(found)} dtypes, not the base's own. {cure}")
    return next(iter(found))


def _require_same_tokens(source: Path, base: Weights, folders: Sequence[Path]) -> None:
    """Refuse a tokenizer with which mergekit would cut or reorder the vocabulary tables' rows."""
    tokens = tokens_of(source)
    cure = "Leave the tokenizer setting out: the base's is copied then. Or use `mergekit-yaml`."
    if tokens is None:
        raise RecipeError(f"{source} has no tokenizer.json, so that its tokens cannot be compared. {cure}")
    if set(tokens.values()) != set(range(base.vocabulary or 0)):
        raise RecipeError(
            f"The tokenizer of {source} has {len(tokens)} tokens, the tables of {base.folder} have {base.vocabulary} "
            f"rows: mergekit would resize them. {cure}"
        )
    for folder in folders:
        theirs = tokens_of(folder)
        if theirs is None and not (folder / "tokenizer_config.json").is_file():
            continue  # mergekit takes it to be the base's
        if theirs != tokens:
            raise RecipeError(f"The tokenizers of {source} and {folder} differ: mergekit would reorder rows. {cure}")


def _spelled(model: Path, adapter: Path | None = None) -> Any:
    """Return how mergekit is to be told of a folder, whatever signs its name holds."""
    if any(sign in f"{model}{adapter or ''}" for sign in "+@"):
        return {"model": {"path": str(model)}, **({"lora": {"path": str(adapter)}} if adapter else {})}
    return f"{model}+{adapter}" if adapter else str(model)
