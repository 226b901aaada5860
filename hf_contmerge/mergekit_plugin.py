"""Every merge rule as a mergekit method of the same name.

mergekit hands a kernel one tensor at a time. For most rules that is enough. OPCM's scale needs the norms of the whole
model, so at its first tensor the plugin runs merge_stream's pass 1 over the files of the same models, keeps the running
tensors in a temporary folder, and each kernel call reads its own back.

A name that mergekit has itself (task_arithmetic) stays mergekit's.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor

from hf_contmerge.errors import ContmergeError, RecipeError, unknown
from hf_contmerge.merge_rules import MergeRule, Norms, get_rule, parameter_types, rule_class, rule_names
from hf_contmerge.merge_stream import fold_expert, is_matrix, merged_tensor
from hf_contmerge.tensor_files import Weights


class MergekitRecipeError(RecipeError, click.UsageError):
    """A mergekit recipe that cannot be carried out: exit code 2 and a line from commands, a ValueError in Python."""

    def __init__(self, message: str) -> None:
        click.UsageError.__init__(self, message)


@dataclass(frozen=True)
class WholeModel:
    """The outcome of pass 1 over whole models: running tensors on disk, and the scale that their norms give."""

    folder: Path
    scale: float


class RuleMethod(GroupMergeMethod):
    """One merge rule, as mergekit calls it. The order of `models` is the order of the stages."""

    def __init__(self, name: str) -> None:
        self.rule = rule_class(name)
        parameters = [
            ParameterSpec(word, kind, ParameterScope.SHARED, default)
            for word, (kind, default) in parameter_types(self.rule).items()
        ]
        if self.rule.whole_model_scale:
            parameters.append(ParameterSpec("scale", float | str, ParameterScope.SHARED, "model"))
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=name,
            parameters=tuple(parameters),
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
            reference_url=self.rule.reference,
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor; the result has the inputs' dtype, the arithmetic is float32."""
        try:
            scale = parameters.pop("scale", "tensor")
            rule = get_rule(self.spec.name, **parameters)
            if scale == "model":
                return _from_whole_model(rule, group)
            return _from_this_tensor(rule, group, scale)
        except (ContmergeError, ValueError) as error:
            raise MergekitRecipeError(f"{self.spec.name}: {error}") from error

    def check(self, config: Any) -> None:
        """Refuse, before any tensor is read, what mergekit would pass over in silence or what cannot be right."""
        known = [p.name for p in self.spec.parameters]
        for place, words in _settings(config):
            for word in words:
                if word not in known:
                    where = f"the parameters of {place} for {self.spec.name}"
                    raise MergekitRecipeError(unknown("parameter", word, known, where=where))
                if "model" in place:
                    raise MergekitRecipeError(
                        f"{self.spec.name} has no parameter per model; {word} of {place} belongs under `parameters:` "
                        "at the top of the recipe."
                    )
        constant = {k: v for k, v in (config.parameters or {}).items() if isinstance(v, bool | int | float | str)}
        try:
            get_rule(self.spec.name, **{k: v for k, v in constant.items() if k != "scale"})
        except ValueError as error:
            raise MergekitRecipeError(str(error)) from error
        whole = self.rule.whole_model_scale and (config.parameters or {}).get("scale", "model") == "model"
        if whole and (config.slices or any(m.slices for m in (config.modules or {}).values())):
            raise MergekitRecipeError(
                f"{self.spec.name} takes its scale from the norms of whole models, which slices do not have. List "
                "whole models under `models:`, or set `scale: tensor` or a number under `parameters:`."
            )


def register_rules() -> None:
    """Make every rule known to mergekit, but for names that it has already."""
    from mergekit.merge_methods import registry

    taken = {method.spec.name for method in registry.registered_methods()}
    for name in rule_names():
        if name not in taken:
            registry.register(RuleMethod(name))


def guard_planner() -> None:
    """Let our methods look at the recipe before mergekit plans. mergekit passes over unknown parameters in silence."""
    from mergekit.plan import MergePlanner

    original = MergePlanner.normalize_config
    if original.__module__ == __name__:  # guarded already
        return

    def normalize_config(self: Any) -> None:
        if isinstance(self._method, RuleMethod):
            self._method.check(self.config)
        original(self)

    MergePlanner.normalize_config = normalize_config


def _settings(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, parameters) of every level of a mergekit recipe."""
    yield "the recipe", config.parameters or {}
    parts: list[tuple[str, Any]] = [
        ("", config),
        *((f" of module {name}", module) for name, module in (config.modules or {}).items()),
    ]
    for where, part in parts:
        if where:
            yield where.removeprefix(" of "), part.parameters or {}
        for model in part.models or ():
            yield f"model {model.model}{where}", model.parameters or {}
        for number, piece in enumerate(list[Any](part.slices or [])):
            yield f"slice {number}{where}", piece.parameters or {}
            for source in piece.sources:
                yield f"model {source.model} in slice {number}{where}", source.parameters or {}


def _from_this_tensor(rule: MergeRule, group: TensorGroup, scale: Any) -> Tensor:
    """Fold the tensors at hand, in order; scale by the rule on this tensor's own norms, or by a given number."""
    assert group.base is not None
    base = group.base.tensor
    wide, axis = base.float(), group.metadata.vocabulary_axis
    matrix = is_matrix(group.metadata.name or "", base.shape, base.shape[axis] if axis is not None else None)
    running, norms = torch.zeros_like(wide), []
    for entry in group.non_base:
        task_vector = entry.tensor.float() - wide
        if not bool(torch.isfinite(task_vector).all()):
            raise ValueError(f"{group.metadata.name} of {entry.id} has values that are NaN or infinite")
        norms.append(float(torch.linalg.vector_norm(task_vector, dtype=torch.float64)))
        running = rule.update(running, task_vector, is_matrix=matrix)
    if not isinstance(scale, int | float):
        if scale != "tensor":
            raise ValueError(f"scale must be model, tensor or a number; got {scale!r}")
        scale = rule.scale(Norms(tuple(norms), float(torch.linalg.vector_norm(running, dtype=torch.float64))))
    only = group.non_base[0].tensor if len(group.non_base) == 1 and scale == 1.0 else None
    return merged_tensor(base, running, float(scale), base.dtype, expert=only)


def _from_whole_model(rule: MergeRule, group: TensorGroup) -> Tensor:
    """Read this tensor's running state of the whole-model pass back, and scale it by the whole model's norms."""
    assert group.base is not None
    name, base = group.metadata.name or "", group.base.tensor
    _require_as_stored(group.base, name)
    for entry in group.non_base:
        _require_as_stored(entry, name)
    experts = tuple(_folder(entry) for entry in group.non_base)
    whole = _whole_model(rule, _folder(group.base), experts)
    stored = _weights(_folder(group.base)).tensor(name).to(base.device)
    running = _weights(whole.folder).tensor(name).to(base.device)
    only = None
    if len(experts) == 1 and whole.scale == 1.0:
        only = _weights(experts[0]).tensor(name).to(base.device)
    return merged_tensor(stored, running, whole.scale, base.dtype, expert=only)


_lock = threading.Lock()
_done: dict[tuple[MergeRule, Path, tuple[Path, ...]], WholeModel] = {}
_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _whole_model(rule: MergeRule, base: Path, experts: tuple[Path, ...]) -> WholeModel:
    """Run pass 1 over whole models, once per process whatever the number of tensors and threads."""
    with _lock:
        key = (rule, base, experts)
        if key not in _done:
            holder = tempfile.TemporaryDirectory(prefix="contmerge-")
            _temporary.append(holder)
            _done[key] = _fold_all(rule, base, experts, Path(holder.name))
        return _done[key]


def _fold_all(rule: MergeRule, base: Path, experts: tuple[Path, ...], scratch: Path) -> WholeModel:
    running, running_norm, norms = None, 0.0, []
    for number, expert in enumerate(experts):
        out = scratch / str(number)
        out.mkdir()
        norm, running_norm = fold_expert(rule, base=base, expert=expert, running=running, out=out)
        norms.append(norm)
        for file in running.iterdir() if running else ():
            file.unlink()
        running = out
    assert running is not None
    return WholeModel(running, rule.scale(Norms(tuple(norms), running_norm)))


def _require_as_stored(entry: TensorEntry, name: str) -> None:
    """Raise unless the tensor that mergekit hands over is the one that the model's files hold under its name."""
    weights = _weights(_folder(entry))
    same = False
    if name in weights.names and weights.shape(name) == tuple(entry.tensor.shape):
        same = torch.equal(weights.tensor(name).to(entry.tensor.dtype), entry.tensor.cpu())
    if not same:
        raise ValueError(
            f"{name} of {entry.id} is not what its files hold under that name (slices, a permuted vocabulary or other "
            "names), so a scale over whole models cannot be right. Set `scale: tensor` or a number under `parameters:`."
        )


def _folder(entry: TensorEntry) -> Path:
    """Return the folder from which mergekit reads a model."""
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if not isinstance(entry.id, ModelReference):
        raise ValueError("tensors without a model folder have no whole-model norms; set `scale: tensor` or a number")
    return Path(LoaderCache().get(entry.id).index.base_path)


@functools.lru_cache(maxsize=64)
def _weights(folder: Path) -> Weights:
    return Weights(folder)
