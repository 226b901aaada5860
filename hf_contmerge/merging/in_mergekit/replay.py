"""Execution and writing of mergekit recipes.

Recipes with another result in this engine than in `mergekit-yaml` are refused. Weights are equal to the last bit, with
two exceptions: task_arithmetic and ties, mergekit's own methods there, are equal to float32 rounding; adapters, which
mergekit first merges into a model of the base's dtype, are equal to the rounding of that dtype.
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
from hf_contmerge.models.layout import weights_like
from hf_contmerge.models.rounding import Rounding
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
    """Merge by a recipe, in one pass.

    Raises:
        ModelError: a model is missing, damaged or does not fit. Nothing is written.
        RecipeError: mergekit's result would differ. Nothing is written.
    """
    crew, rule = crew or Crew(), make_rule(recipe.rule, recipe.parameters)
    folder = resolve_model(recipe.base)
    check_mergeable(folder)
    base = Weights(folder)
    folders = [resolve_model(m, adapters=True) for m in recipe.models]
    weights, chosen = recipe.weights or [1.0] * len(folders), recipe.chosen or [{}] * len(folders)
    listed = [
        FoldedExpert("", f, name=name, weight=weight, chosen=own)
        for f, name, weight, own in zip(folders, recipe.models, weights, chosen, strict=True)
    ]
    names = {recipe.base, str(folder.resolve())}
    companions = resolve_model(recipe.tokenizer_from) if recipe.tokenizer_from else None
    if companions:
        _require_same_tokens(companions, base, [folder, *(f for f in folders if not is_adapter(f))])
    experts = [open_expert(f, base, base_names=names, force=force) for f in folders]
    dtype = _written_dtype(recipe, base, experts)
    merge = RunningMerge(folder, recipe.rule, rule)
    with new_folder(out, crew.ranks) as scratch:
        output = Output(scratch, dtype, shard_size, companions, rounding=recipe.rounding)
        merged = merge.fold(listed, None, merged=output, opened=experts, crew=crew)
        assert merged.survival
        crew.ranks.first(merged.survival.write, scratch)
    if crew.ranks.is_main:
        merged.survival.warn(out)
    return merged


def mergekit_yaml(
    rule_name: str,
    rule: MergeRule,
    *,
    base: Path,
    experts: Sequence[Path | FoldedExpert],
    dtype: torch.dtype | None,
    rounding: Rounding = "stochastic",
    scale: float | None = None,
) -> str:
    """Return the same merge's recipe for `mergekit-yaml`.

    For adapters, `mergekit-yaml` needs `--lora-merge-cache`.

    Args:
        rule_name: the rule's name.
        rule: the rule.
        base: folder of the base.
        experts: the experts, or their folders.
        dtype: dtype of the merged weights (None: most of the base's weights).
        rounding: of merged weights with 16 bits. mergekit's own methods ignore it.
        scale: replaces the rule's scale.
    """
    parameters = {**rule.parameters(), **MERGEKITS_OWN.get(rule_name, {})}
    if scale is not None:
        parameters["scale"] = scale
    stored = dtype or Weights(base).main_dtype
    if stored != torch.float32 and (rule_name in MERGEKITS_OWN or rounding != "stochastic"):
        parameters["rounding"] = rounding
    folded = [e if isinstance(e, FoldedExpert) else FoldedExpert("", e) for e in experts]
    recipe = {
        "merge_method": rule_name,
        "base_model": _spelled(base),
        "models": [_listed(base, expert) for expert in folded],
        **({"parameters": parameters} if parameters else {}),
        "dtype": "float32",
        "out_dtype": str(stored).removeprefix("torch."),
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def _listed(base: Path, expert: FoldedExpert) -> dict[str, Any]:
    """Return an expert's entry, with its weight and chosen coefficients."""
    own = {**expert.chosen, **({} if expert.weight == 1.0 else {"weight": expert.weight})}
    model = _spelled(base, expert.folder) if is_adapter(expert.folder) else _spelled(expert.folder)
    return {"model": model, **({"parameters": own} if own else {})}


def _written_dtype(recipe: MergekitRecipe, base: Weights, experts: Sequence[Expert]) -> torch.dtype | None:
    """Return the merged dtype (None: the base's dtypes).

    Our rules read experts as they are stored, compute in float32 and round once, under mergekit too. mergekit's own
    methods round to `dtype` (default: the widest of a tensor's inputs) and again to `out_dtype`.

    Raises:
        RecipeError: mergekit would round more than once.
    """
    asked, out = dtype_named(recipe.dtype), dtype_named(recipe.out_dtype)
    cure = "Set `dtype: float32`, and `out_dtype` to the dtype of the merged model."
    if asked == torch.float32 or ((asked or out) and recipe.rule not in MERGEKITS_OWN):
        return out or asked
    sources = [base, *(weights_like(base, e.folder) for e in experts if e.kind == "model")]
    tensors: dict[torch.dtype, str] = {}
    as_base = True
    for name in base.floating():
        widest = base.dtype(name)
        for source in sources:
            if asked and source.dtype(name) != asked:
                raise RecipeError(
                    f"`dtype: {recipe.dtype}` would round {name} of {source.folder} ({source.dtype(name)}) before the "
                    f"merge. {cure}"
                )
            widest = torch.promote_types(widest, source.dtype(name))
        tensors[widest] = name
        as_base = as_base and widest == base.dtype(name)
    halves = [d for d in tensors if d.itemsize < torch.float32.itemsize]
    if halves and recipe.rule in MERGEKITS_OWN:
        raise RecipeError(f"mergekit's own {recipe.rule} would compute {tensors[halves[0]]} in {halves[0]}. {cure}")
    if out or as_base:
        return out
    if len(tensors) > 1:
        raise RecipeError(f"The merged weights would have {len(tensors)} dtypes, other than the base's. {cure}")
    return next(iter(tensors))


def _require_same_tokens(source: Path, base: Weights, folders: Sequence[Path]) -> None:
    """Raise RecipeError if mergekit would change vocabulary rows."""
    tokens = tokens_of(source)
    cure = "Remove the tokenizer setting to copy the base's tokenizer, or use `mergekit-yaml`."
    if tokens is None:
        raise RecipeError(f"{source} has no tokenizer.json, so its tokens cannot be compared. {cure}")
    if set(tokens.values()) != set(range(base.vocabulary or 0)):
        raise RecipeError(
            f"The tokenizer of {source} has {len(tokens)} tokens, the tables of {base.folder} have {base.vocabulary} "
            f"rows: mergekit would resize them. {cure}"
        )
    for folder in folders:
        theirs = tokens_of(folder)
        if theirs is None and not (folder / "tokenizer_config.json").is_file():
            continue  # mergekit assumes the base's tokenizer
        if theirs != tokens:
            raise RecipeError(f"The tokenizers of {source} and {folder} differ: mergekit would reorder rows. {cure}")


def _spelled(model: Path, adapter: Path | None = None) -> Any:
    """Return a model reference, safe for + and @."""
    if any(sign in f"{model}{adapter or ''}" for sign in "+@"):
        return {"model": {"path": str(model)}, **({"lora": {"path": str(adapter)}} if adapter else {})}
    return f"{model}+{adapter}" if adapter else str(model)
