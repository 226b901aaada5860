"""mergekit recipes of our rules, read and written: the same merge by this engine and by the stock `mergekit-yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_contmerge.errors import ModelError, RecipeError, unknown
from hf_contmerge.experts import Expert, check_mergeable, open_expert
from hf_contmerge.merge_files import new_folder
from hf_contmerge.merge_rules import MergeRule, parameter_types, rule_class
from hf_contmerge.merge_stream import merge_experts
from hf_contmerge.merge_words import dtype_named, make_rule
from hf_contmerge.merge_write import Merged, Output
from hf_contmerge.model_folder import resolve_model
from hf_contmerge.tensor_files import SHARD_SIZE, Weights
from hf_contmerge.work_sharing import Crew

_WORDS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer")
_MERGEKITS_OWN = {
    # mergekit has methods of these names itself, with parameters that ours do not have: value that equals ours.
    "task_arithmetic": {"weight": 1.0, "normalize": False, "rescale": False, "density": 1.0, "int8_mask": False},
    "ties": {"weight": 1.0, "normalize": True, "rescale": False, "int8_mask": False},
}
_THEIR_DEFAULTS = {"task_arithmetic": {"lambda": 1.0}, "ties": {"lambda": 1.0, "density": 1.0}}


@dataclass(frozen=True)
class MergekitRecipe:
    """A mergekit recipe that this engine can carry out: whole models, one rule, one value for each parameter."""

    rule: str
    parameters: dict[str, Any]
    base: str
    models: tuple[str, ...]
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_from: str | None = None


def read_mergekit_recipe(path: Path) -> MergekitRecipe:
    """Read a recipe. Raises RecipeError for what this engine does not do, with what does."""
    try:
        words = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"Cannot read {path}: {error}") from error
    if not isinstance(words, dict):
        raise RecipeError(f"{path} is no mergekit recipe: expected a mapping with merge_method, base_model and models.")
    for word in words:
        if word not in _WORDS:
            if word in ("slices", "modules", "chat_template"):
                raise RecipeError(f"{path} uses {word!r}, which only `mergekit-yaml {path} OUT` carries out. Use that.")
            raise RecipeError(unknown("word", str(word), _WORDS, where=str(path)))
    for word in ("merge_method", "base_model", "models"):
        if not words.get(word):
            raise RecipeError(f"{path} lacks {word!r}. A merge needs merge_method, base_model and models.")
    rule = str(words["merge_method"])
    models = tuple(_model_name(m, rule, path) for m in words["models"])
    settings = _checked_parameters(rule, words.get("parameters") or {}, path)
    return MergekitRecipe(
        rule, settings, str(words["base_model"]), models, words.get("dtype"), words.get("out_dtype"),
        _tokenizer_source(words, path),
    )  # fmt: skip


def carry_out(
    recipe: MergekitRecipe,
    out: Path,
    *,
    shard_size: int = SHARD_SIZE,
    crew: Crew | None = None,
    force: bool = False,
) -> Merged:
    """Merge as a recipe says, in one go, keeping no state; return the norms and the scale.

    Raises ModelError or RecipeError before anything is written.
    """
    crew, rule = crew or Crew(), make_rule(recipe.rule, recipe.parameters)
    folder = resolve_model(recipe.base)
    check_mergeable(folder)
    base = Weights(folder)
    folders = [resolve_model(m, adapters=True) for m in recipe.models]
    for i, path in enumerate(folders):
        if path.resolve() in [f.resolve() for f in folders[:i]]:
            raise ModelError(f"{recipe.models[i]} is listed twice; an expert must not be folded twice. Remove one.")
    names = {recipe.base, str(folder.resolve())}
    experts = [open_expert(f, base, base_names=names, force=force) for f in folders]
    dtype = dtype_named(recipe.out_dtype or recipe.dtype)
    _require_no_rounding(recipe, base, experts)
    companions = None if recipe.tokenizer_from in (None, "base") else resolve_model(str(recipe.tokenizer_from))
    with new_folder(out, crew) as scratch:
        return merge_experts(rule, base, experts, merged_out=Output(scratch, dtype, shard_size, companions), crew=crew)


def mergekit_yaml(
    rule_name: str, rule: MergeRule, *, base: Path, experts: Sequence[Path], dtype: torch.dtype | None
) -> str:
    """Return the recipe with which the stock `mergekit-yaml` makes the same merge from the experts."""
    parameters = {**rule.parameters(), **_MERGEKITS_OWN.get(rule_name, {})}
    recipe = {
        "merge_method": rule_name,
        "base_model": str(base),
        "models": [{"model": str(e)} for e in experts],
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


def _model_name(entry: Any, rule: str, path: Path) -> str:
    if not isinstance(entry, Mapping) or "model" not in entry:
        raise RecipeError(f"{path}: an entry of `models` must be `- model: NAME`; got {entry!r}.")
    for word, value in (entry.get("parameters") or {}).items():
        if _MERGEKITS_OWN.get(rule, {}).get(word) != value:
            raise RecipeError(
                f"{path}: {word} of {entry['model']} is a parameter of one model; {rule} treats all experts alike. "
                f"Remove it, or use `mergekit-yaml {path} OUT` with a method that weighs them."
            )
    return str(entry["model"])


def _checked_parameters(rule: str, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    known = parameter_types(type(make_rule(rule, {})))
    found: dict[str, Any] = dict(_THEIR_DEFAULTS.get(rule, {}))
    for word, value in given.items():
        if word in _MERGEKITS_OWN.get(rule, {}) and word not in known:
            if value != _MERGEKITS_OWN[rule][word]:
                ours = _MERGEKITS_OWN[rule][word]
                raise RecipeError(f"{path}: {word} must be {ours!r} here; `mergekit-yaml {path} OUT` takes {value!r}.")
        elif word == "scale" and rule_class(rule).whole_model_scale:
            if value != "model":
                raise RecipeError(f"{path}: scale must be `model` here; `mergekit-yaml {path} OUT` takes {value!r}.")
        elif word not in known:
            raise RecipeError(unknown("parameter", word, known, where=f"{path} for {rule}"))
        elif isinstance(value, list | dict):
            raise RecipeError(f"{path}: {word} must be one value for all tensors; got {value!r}. Use `mergekit-yaml`.")
        else:
            found[word] = _as_number(value)
    return found


def _as_number(value: Any) -> Any:
    """Return a string that spells a number as that number: YAML leaves 1e-1 a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _tokenizer_source(words: Mapping[str, Any], path: Path) -> str | None:
    tokenizer = words.get("tokenizer")
    source = words.get("tokenizer_source") or (tokenizer or {}).get("source")
    extra = set(tokenizer or {}) - {"source"}
    if source == "union" or extra:
        raise RecipeError(
            f"{path}: the tokenizer setting {source if source == 'union' else extra.pop()!r} changes the vocabulary, "
            f"which only `mergekit-yaml {path} OUT` does. Use that, or `source: base`."
        )
    return str(source) if source else None


def _require_no_rounding(recipe: MergekitRecipe, base: Weights, experts: Sequence[Expert]) -> None:
    """Refuse a `dtype` in which mergekit would round the inputs: our arithmetic is float32."""
    asked = dtype_named(recipe.dtype)
    if asked in (None, torch.float32):
        return
    for source in (base, *(e.weights for e in experts if hasattr(e, "weights"))):  # pyright: ignore
        for name in source.floating():
            if source.dtype(name) != asked:
                raise RecipeError(
                    f"`dtype: {recipe.dtype}` would round {name} of {source.folder} ({source.dtype(name)}) before it "
                    "is merged. Set `dtype: float32`, and `out_dtype` to what shall be written."
                )
