"""Every merge rule as a mergekit method of the same name.

mergekit hands a kernel one tensor at a time; tensors.py computes it, after a pass over the whole models where
a rule's scale needs one. This module declares the methods and looks at recipes before mergekit does.

The results are those of merging/stream.py to the last bit: the same pieces of a tensor, the same name for it, and one
thread for linear algebra, as each of its workers has (with more, matrix products differ in the last bit). For rules
that decompose matrices, `contmerge merge from-recipe` is faster by the number of cores.

Names that mergekit has itself (task_arithmetic, ties) stay mergekit's.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor, bfloat16, promote_types

from hf_contmerge.errors import ContmergeError, ModelError, RecipeError, unknown
from hf_contmerge.merge_rules import (
    COMMON,
    MergeRule,
    get_rule,
    parameter_types,
    rule_class,
    rule_names,
    yaml_word,
)
from hf_contmerge.merging.in_mergekit.recipe import MERGEKITS_OWN, as_number, is_number
from hf_contmerge.merging.in_mergekit.tensors import Storage, from_this_tensor, from_whole_model
from hf_contmerge.merging.merge import require_linear
from hf_contmerge.merging.rules import rounding_named
from hf_contmerge.models.contents import check_contents, weight_files
from hf_contmerge.models.experts import first_twin, twins_refused
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.function import check_config, check_function
from hf_contmerge.models.layout import check_loads
from hf_contmerge.models.reading import tied_flag
from hf_contmerge.models.rounding import ROUNDINGS, Rounding
from hf_contmerge.models.statistics import check_statistics
from hf_contmerge.models.survival import FILE, Kept, Survival
from hf_contmerge.models.weights import Weights, main_dtype

LOG = logging.getLogger(__name__)
_STORED_AS = "contmerge_dtype"  # a parameter that plans carry to the tensors; recipes may not name it


class MergekitRecipeError(RecipeError, click.UsageError):
    """An impossible mergekit recipe: exit code 2, a ValueError in Python."""

    def __init__(self, message: str) -> None:
        click.UsageError.__init__(self, message)


class RuleSpec(MergeMethodSpec):
    """A rule's declaration; its class is loaded on demand."""

    contract = InputContract(base=BasePolicy.REQUIRED, min_non_base=1)

    def __init__(self, name: str) -> None:
        for word in ("name", "pretty_name"):  # the parent is frozen
            object.__setattr__(self, word, name)

    @functools.cached_property
    def rule(self) -> type[MergeRule]:
        try:
            return rule_class(self.name)
        except RecipeError as error:
            raise MergekitRecipeError(str(error)) from error

    @functools.cached_property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        own = {yaml_word(f) for f in self.rule.of_newest}
        parameters = [
            ParameterSpec(word, kind, ParameterScope.NON_BASE if word in own else ParameterScope.SHARED, default)
            for word, (kind, default) in parameter_types(self.rule).items()
        ]
        parameters += [ParameterSpec(word, float, ParameterScope.SHARED, 1.0) for word in COMMON]
        if self.rule.linear:
            parameters.append(ParameterSpec("weight", float, ParameterScope.NON_BASE, 1.0))
        if not self.rule.tunable:  # a number in place of the rule's own scale
            own = "model" if self.rule.whole_model_scale else "tensor"
            parameters.append(ParameterSpec("scale", float | str, ParameterScope.SHARED, own))
        for word, default in (("rounding", ROUNDINGS[0]), (_STORED_AS, "")):
            parameters.append(ParameterSpec(word, str, ParameterScope.SHARED, default))
        return tuple(parameters)

    @property
    def has_share(self) -> bool:
        """True if the rule takes the largest elements of whole models."""
        return self.rule.share_kept is not MergeRule.share_kept

    def of_one_model(self) -> list[str]:
        """Return the parameters with a value per model."""
        return [p.name for p in self.parameters if p.scope == ParameterScope.NON_BASE]

    @property
    def reference_url(self) -> str:
        return self.rule.reference


class RuleMethod(GroupMergeMethod):
    """A merge rule as a mergekit method. `models` are in stage order."""

    def __init__(self, name: str) -> None:
        self.spec: RuleSpec = RuleSpec(name)
        self._kept: dict[str, tuple[Tensor, Kept, Rounding]] = {}
        """Of the tensors merged since the last plan; tensors without data."""

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor in float32; the result has the recipe's dtype."""
        try:
            by, dtype = rounding_named(parameters.pop("rounding", None)), parameters.pop(_STORED_AS, "")
            storage = Storage(dtype_from_name(dtype or None), by)
            scale = _checked_scale(parameters.pop("scale", "tensor"))
            own = {word: parameters.pop(word).values_for(group.non_base) for word in self.spec.of_one_model()}
            weights = own.pop("weight", [1.0] * len(group.non_base))
            each = [dict(zip(own, values, strict=True)) for values in zip(*own.values(), strict=True)]
            rules = [get_rule(self.spec.name, **parameters, **one) for one in each or [{}] * len(weights)]
            # A scale that reads no norms is the same for a tensor and a model, and one tensor's experts have weights.
            if (scale == "model" and rules[-1].whole_model_scale) or self.spec.has_share:
                written = from_whole_model(rules[-1], group, storage)
            else:
                written = from_this_tensor([*zip(rules, weights, strict=True)], group, scale, storage)
            self._kept[written.name] = written.tensor.to("meta"), written.kept, by
            return written.tensor
        except (ContmergeError, ValueError) as error:
            raise MergekitRecipeError(f"{self.spec.name}: {error}") from error

    def planned(self, config: Any) -> Any:
        """Return a recipe whose tensors mergekit does not round: `merge_group` does, once."""
        self._kept.clear()
        stored = str(config.out_dtype or config.dtype or "")
        parameters = {**(config.parameters or {}), _STORED_AS: stored}
        return config.model_copy(update={"dtype": None, "out_dtype": None, "parameters": parameters})

    def report(self, out: str) -> None:
        """Write the survival of the update; warn of a loss."""
        tensors = {name: tensor for name, (tensor, _, _) in self._kept.items()}
        kept, used = {name: k for name, (_, k, _) in self._kept.items()}, {by for _, _, by in self._kept.values()}
        dtype = main_dtype((name, t.shape, t.dtype) for name, t in tensors.items())
        survival = Survival.of(kept, dtype, " and ".join(sorted(used)), sum(t.nbytes for t in tensors.values()))
        survival.write(Path(out))
        survival.warn(out)

    def check(self, config: Any) -> None:
        """Refuse settings with silent or wrong effects in mergekit."""
        known = [p.name for p in self.spec.parameters if p.name != _STORED_AS]
        for place, per_model, words in _settings(config):
            for word, setting in words.items():
                if word not in known:
                    where = f"the parameters of {place} for {self.spec.name}"
                    raise MergekitRecipeError(unknown("parameter", word, known, where=where))
                if per_model and word not in self.spec.of_one_model():
                    raise MergekitRecipeError(
                        f"{self.spec.name} has no parameter per model; {word} of {place} belongs under `parameters:` "
                        "at the top of the recipe."
                    )
                self._check_values(word, setting)
        if self.spec.rule.whole_model_scale or self.spec.has_share:
            self._check_whole(config)

    def _check_values(self, word: str, setting: Any) -> None:
        try:
            for value in _values(setting):
                if word == "scale":
                    _checked_scale(value)
                elif word == "rounding":
                    rounding_named(value)
                elif word == "weight":
                    require_linear(self.spec.name, get_rule(self.spec.name), [_number(value, word)])
                else:
                    get_rule(self.spec.name, **{word: as_number(value)})
        except (RecipeError, ValueError) as error:
            raise MergekitRecipeError(str(error)) from error

    def _check_whole(self, config: Any) -> None:
        """Refuse slices and uneven parameters for rules with whole-model scales."""
        scales = [config.parameters.get("scale", "model") if config.parameters else "model"]
        scales += [words["scale"] for _, _, words in _settings(config) if "scale" in words]
        if all("model" not in _values(scale) for scale in scales):
            return
        uneven = [
            word
            for place, _, words in _settings(config)
            for word, setting in words.items()
            if word not in ("scale", "rounding") and (place != _TOP or len(set(_values(setting))) > 1)
        ]
        slices = config.slices or any(m.slices for m in (config.modules or {}).values())
        if not slices and not uneven:
            return
        what = f"for which {uneven[0]} must be one value" if uneven else "which slices do not have"
        raise MergekitRecipeError(
            f"{self.spec.name} takes its scale from the norms of whole models, {what}. List whole models under "
            "`models:` without gradients or filters, or set `scale: tensor` or a number under `parameters:` at the top."
        )


def install() -> None:
    """Register the rules in mergekit and guard it. Safe to repeat."""
    register_rules()
    guard_planner()
    guard_merge()


def register_rules() -> None:
    """Register every rule with a free name in mergekit."""
    taken = {method.spec.name for method in registry.registered_methods()}
    for name in rule_names():
        if name not in taken:
            registry.register(RuleMethod(name))


def guard_planner() -> None:
    """Check recipes before mergekit plans: it ignores unknown parameters."""
    from mergekit.io.tasks import FinalizeModel
    from mergekit.plan import MergePlanner

    original, to_disk = MergePlanner.normalize_config, MergePlanner.plan_to_disk
    if original.__module__ == __name__:  # guarded already
        return

    def normalize_config(self: Any) -> None:
        if isinstance(self._method, RuleMethod):
            self._method.check(self.config)
            self.config = self._method.planned(self.config)
        original(self)

    def plan_to_disk(self: Any, out_path: str) -> list[Any]:
        Path(out_path, FILE).unlink(missing_ok=True)  # of an earlier merge in this folder
        tasks = to_disk(self, out_path)
        if isinstance(self._method, RuleMethod):
            last = next(task for task in tasks if isinstance(task, FinalizeModel))
            tasks.append(_Report(method_name=self._method.spec.name, out_path=out_path, finalized=last))
        return tasks

    MergePlanner.normalize_config = normalize_config
    MergePlanner.plan_to_disk = plan_to_disk


class _Report(Task[None], frozen=True):
    """The last task of a merge: logs the update kept."""

    method_name: str
    out_path: str
    finalized: Task

    def arguments(self) -> dict[str, Task]:
        return {"finalized": self.finalized}

    def execute(self, **_: Any) -> None:
        method = registry.get(self.method_name)
        assert isinstance(method, RuleMethod)
        method.report(self.out_path)

    def main_thread_only(self) -> bool:
        return True


def guard_merge() -> None:
    """Refuse adapters before mergekit fails on them."""
    import mergekit.merge as merge

    original = merge.get_architecture_info  # the first thing that run_merge calls
    if original.__module__ == __name__:  # guarded already
        return

    def get_architecture_info(config: Any, options: Any) -> Any:
        if config.merge_method in rule_names():
            _warn_of_namesakes(config.merge_method)
            _refuse_layers(config)
            _warn_of_rounding(config)
            _refuse_adapters(config, options)
            _refuse_code(config, options)
            _refuse_other_readings(config)
            _refuse_twins(config)
            _require_statistics(config)
        return original(config, options)

    merge.get_architecture_info = get_architecture_info


def _warn_of_namesakes(name: str) -> None:
    """Warn of a rule with the name of a mergekit method."""
    if name not in MERGEKITS_OWN and not isinstance(registry.get(name), RuleMethod):
        LOG.warning("merge_method %s is mergekit's own. A rule has the same name and is not used; rename it.", name)


def _refuse_layers(config: Any) -> None:
    """Raise MergekitRecipeError for factors by layer with mergekit's methods.

    mergekit ignores them.
    """
    if isinstance(registry.get(config.merge_method), RuleMethod):
        return
    words = [word for _, _, parameters in _settings(config) for word in parameters if word in COMMON]
    if words:
        raise MergekitRecipeError(
            f"merge_method {config.merge_method} is mergekit's own and has no parameter {words[0]}. Use "
            "`contmerge merge from-recipe`, which has."
        )


def _warn_of_rounding(config: Any) -> None:
    """Warn of mergekit's own methods in 16 bits: they round to nearest."""
    if isinstance(registry.get(config.merge_method), RuleMethod):
        return
    asked = [dtype for word in (config.dtype, config.out_dtype) if (dtype := dtype_from_name(word or None))]
    folders = [Path(model.model.path) for model in config.referenced_models()]
    stored = [Weights(folder).main_dtype for folder in folders if folder.is_dir() and not is_adapter(folder)]
    least = min(asked or [functools.reduce(promote_types, stored, bfloat16)], key=lambda dtype: dtype.itemsize)
    if least.itemsize == 2:
        LOG.warning(
            "merge_method %s is mergekit's own. It rounds to the nearest %s values and drops most of a usual update, "
            "and what is kept is not measured. Set `dtype: float32`, or use `contmerge merge from-recipe`: it measures "
            "that, and has `rounding: stochastic`.",
            config.merge_method,
            str(least).removeprefix("torch."),
        )


def _refuse_adapters(config: Any, options: Any) -> None:
    for model in config.referenced_models():
        if model.lora and not options.lora_merge_cache:
            raise MergekitRecipeError(
                f"mergekit merges the adapter of {model} into a model first: say where to keep that, with "
                "--lora-merge-cache DIR. Or use `contmerge merge from-recipe`, which reads adapters as they are."
            )
        if not model.lora and is_adapter(Path(model.model.path)) and not Path(model.model.path, "config.json").exists():
            raise MergekitRecipeError(
                f"{model} is an adapter. Write `model: BASE+{model}` and give --lora-merge-cache DIR, or use "
                "`contmerge merge from-recipe`, which reads adapters as they are."
            )


def _refuse_code(config: Any, options: Any) -> None:
    """Raise MergekitRecipeError for models with custom code: mergekit would load it."""
    for folder in (Path(model.model.path) for model in config.referenced_models()):
        try:
            if folder.is_dir():
                check_loads(folder, trusted=options.trust_remote_code, language=False)
        except ModelError as error:
            raise MergekitRecipeError(str(error)) from error


def _refuse_other_readings(config: Any) -> None:
    """Raise MergekitRecipeError for models read otherwise by transformers, or of another shape."""
    folders = [Path(model.model.path) for model in config.referenced_models()]
    base = Path(config.base_model.model.path) if config.base_model else Path()
    for folder in (f for f in folders if f.is_dir()):
        try:
            check_contents(folder)
            _require_same_files(folder)
            if not base.is_dir() or folder == base:
                continue
            if config.tokenizer or config.tokenizer_source:  # mergekit moves the rows of other vocabularies
                check_config(base, folder)
            else:
                check_function(base, folder)
            if not config.slices:
                _require_same_names(base, folder)
        except ModelError as error:
            raise MergekitRecipeError(str(error)) from error


def _require_same_files(folder: Path) -> None:
    """Raise ModelError if mergekit takes other tensors from a folder than transformers."""
    index, weights = ShardedTensorIndex.from_disk(str(folder)), Weights(folder)
    own_head = tied_flag(folder) and "lm_head.weight" in weights.names
    if {shard.filename for shard in index.shards} != set(weight_files(folder)[0]):
        what = "other files"
    elif unlisted := sorted(set(weights.names) - set(index.tensor_paths)):
        what = f"not {unlisted[0]}, which the index lacks"
    elif own_head:
        what = "a tied head, but a separate one is stored"
    else:
        return
    raise ModelError(
        f"mergekit would read {what} in {folder}, unlike transformers. Load it with transformers and call "
        "save_pretrained, or use `contmerge merge from-recipe`."
    )


def _require_same_names(base: Path, folder: Path) -> None:
    """Raise ModelError for weights with other names than the base's."""
    if different := sorted(set(Weights(base).names) ^ set(Weights(folder).names)):
        raise ModelError(
            f"{folder} and {base} store weights under different names ({different[0]}), which mergekit does not match. "
            "Use `contmerge merge from-recipe`."
        )


def _refuse_twins(config: Any) -> None:
    """Raise MergekitRecipeError for a model listed twice, also as a copy."""
    for part in (config, *(config.modules or {}).values()):
        models = [m.model for m in part.models or () if m.model != config.base_model]
        folders = [Path((m.lora or m.model).path) for m in models]
        there = [i for i, folder in enumerate(folders) if folder.is_dir()]
        twin = first_twin([folders[i] for i in there])
        pair = tuple(there[i] for i in twin) if twin else _listed_twice(models)
        if pair:
            raise MergekitRecipeError(twins_refused(*(str(models[i]) for i in pair)))


def _require_statistics(config: Any) -> None:
    """Raise MergekitRecipeError for a model without needed statistics."""
    if not isinstance(registry.get(config.merge_method), RuleMethod):
        return
    try:
        cls, given = rule_class(config.merge_method), config.parameters or {}
        plain = {w: as_number(v) for w, v in given.items() if w in parameter_types(cls) and not isinstance(v, list)}
        rule = get_rule(config.merge_method, **plain)
    except (ContmergeError, ValueError) as error:
        raise MergekitRecipeError(str(error)) from error
    for model in config.referenced_models() if rule.needs else ():
        if model == config.base_model:
            continue
        if model.lora or not Path(model.model.path).is_dir():
            raise MergekitRecipeError(
                f"{model} has no statistics that {config.merge_method} could read: under mergekit they must lie in the "
                "folder of a whole model. Download it and run `contmerge statistics FOLDER --data FILE`, or use "
                "`contmerge merge from-recipe`, which also takes adapters."
            )
        try:
            check_statistics(rule, [Path(model.model.path)])
        except ContmergeError as error:
            raise MergekitRecipeError(str(error)) from error


def _listed_twice(models: list[Any]) -> tuple[int, int] | None:
    return next(((i, models.index(m)) for i, m in enumerate(models) if models.index(m) != i), None)


_TOP = "the recipe"


def _settings(config: Any) -> Iterator[tuple[str, bool, Mapping[str, Any]]]:
    """Yield (place, per model, parameters) of every level of a recipe."""
    yield _TOP, False, config.parameters or {}
    parts: list[tuple[str, Any]] = [
        ("", config),
        *((f" of module {name}", module) for name, module in (config.modules or {}).items()),
    ]
    for where, part in parts:
        if where:
            yield where.removeprefix(" of "), False, part.parameters or {}
        for model in part.models or ():
            yield f"model {model.model}{where}", True, model.parameters or {}
        for number, piece in enumerate(list[Any](part.slices or [])):
            yield f"slice {number}{where}", False, piece.parameters or {}
            for source in piece.sources:
                yield f"model {source.model} in slice {number}{where}", True, source.parameters or {}


def _values(setting: Any) -> list[Any]:
    """Return all values of a mergekit setting: constants, gradients, filters."""
    if isinstance(setting, list):
        return [value for part in setting for value in _values(part)]
    return _values(setting.value) if hasattr(setting, "value") else [setting]


def _number(value: Any, word: str) -> float:
    number = as_number(value)
    if not is_number(number):
        raise ValueError(f"{word} must be a number; got {value!r}")
    return float(number)


def _checked_scale(value: Any) -> float | str:
    """Return `model`, `tensor` or a finite number. Raises ValueError for anything else."""
    number = as_number(value)
    if number in ("model", "tensor"):
        return number
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"scale must be model, tensor or a number; got {value!r}")
    return float(number)


register_rules()
