"""Every merge rule as a mergekit method of the same name.

mergekit hands a kernel one tensor at a time. For most rules that is enough. OPCM's scale needs the norms of the whole
model, so at its first tensor the plugin runs merge_stream's pass 1 over the files of the same models, keeps the running
tensors in a temporary folder, and each kernel call reads its own back.

The results are those of merge_stream to the last bit: the same pieces of a tensor, the same name for it, and one thread
for linear algebra, as each of merge_stream's workers has (with more, matrix products differ in the last bit). For rules
that decompose matrices, `contmerge merge from-recipe` is faster by the number of cores.

Names that mergekit has itself (task_arithmetic, ties) stay mergekit's.
"""

from __future__ import annotations

import functools
import math
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from hf_contmerge.adapter_files import is_adapter
from hf_contmerge.errors import ContmergeError, RecipeError, unknown
from hf_contmerge.experts import open_expert
from hf_contmerge.merge_rules import MergeRule, Norms, Weight, get_rule, parameter_types, rule_class, rule_names
from hf_contmerge.merge_stream import merge_experts
from hf_contmerge.merge_tensor import Piece, fold_tensor, is_matrix, merged_tensor, pieces
from hf_contmerge.running_state import Running
from hf_contmerge.tensor_files import Weights


class MergekitRecipeError(RecipeError, click.UsageError):
    """A mergekit recipe that cannot be carried out: exit code 2 and a line from commands, a ValueError in Python."""

    def __init__(self, message: str) -> None:
        click.UsageError.__init__(self, message)


@dataclass(frozen=True)
class WholeModel:
    """The outcome of pass 1 over whole models: running tensors on disk, and the scale that their norms give."""

    running: Running
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
            if _checked_scale(scale) == "model":
                return _from_whole_model(rule, group)
            return _from_this_tensor(rule, group, _checked_scale(scale))
        except (ContmergeError, ValueError) as error:
            raise MergekitRecipeError(f"{self.spec.name}: {error}") from error

    def check(self, config: Any) -> None:
        """Refuse, before any tensor is read, what mergekit would pass over in silence or what cannot be right."""
        known = [p.name for p in self.spec.parameters]
        for place, per_model, words in _settings(config):
            for word, setting in words.items():
                if word not in known:
                    where = f"the parameters of {place} for {self.spec.name}"
                    raise MergekitRecipeError(unknown("parameter", word, known, where=where))
                if per_model:
                    raise MergekitRecipeError(
                        f"{self.spec.name} has no parameter per model; {word} of {place} belongs under `parameters:` "
                        "at the top of the recipe."
                    )
                self._check_values(word, setting)
        if self.rule.whole_model_scale:
            self._check_whole(config)

    def _check_values(self, word: str, setting: Any) -> None:
        try:
            for value in _values(setting):
                if word == "scale":
                    _checked_scale(value)
                else:
                    get_rule(self.spec.name, **{word: _as_number(value)})
        except ValueError as error:
            raise MergekitRecipeError(str(error)) from error

    def _check_whole(self, config: Any) -> None:
        """Refuse what has no whole-model scale: slices, and a rule whose parameters differ from tensor to tensor."""
        scales = [config.parameters.get("scale", "model") if config.parameters else "model"]
        scales += [words["scale"] for _, _, words in _settings(config) if "scale" in words]
        if all("model" not in _values(scale) for scale in scales):
            return
        uneven = [
            word
            for place, _, words in _settings(config)
            for word, setting in words.items()
            if word != "scale" and (place != _TOP or len(set(_values(setting))) > 1)
        ]
        slices = config.slices or any(m.slices for m in (config.modules or {}).values())
        if not slices and not uneven:
            return
        what = f"for which {uneven[0]} must be one value" if uneven else "which slices do not have"
        raise MergekitRecipeError(
            f"{self.spec.name} takes its scale from the norms of whole models, {what}. List whole models under "
            "`models:` without gradients or filters, or set `scale: tensor` or a number under `parameters:` at the top."
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


def guard_merge() -> None:
    """Refuse adapters that mergekit cannot read, before it trips over them."""
    import mergekit.merge as merge

    original = merge.get_architecture_info  # the first thing that run_merge calls
    if original.__module__ == __name__:  # guarded already
        return

    def get_architecture_info(config: Any, options: Any) -> Any:
        if config.merge_method in rule_names():
            _refuse_adapters(config, options)
        return original(config, options)

    merge.get_architecture_info = get_architecture_info


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


_TOP = "the recipe"


def _settings(config: Any) -> Iterator[tuple[str, bool, Mapping[str, Any]]]:
    """Yield (place, whether it is one model's, parameters) of every level of a mergekit recipe."""
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
    """Return all values that a mergekit setting can take: a constant, a gradient's points, a filter's choices."""
    if isinstance(setting, list):
        return [value for part in setting for value in _values(part)]
    return _values(setting.value) if hasattr(setting, "value") else [setting]


def _as_number(value: Any) -> Any:
    """Return a string that spells a number as that number: YAML leaves 1e-1 a string. Anything else as it is."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else number


def _checked_scale(value: Any) -> float | str:
    """Return `model`, `tensor` or a finite number. Raises ValueError for anything else."""
    number = _as_number(value)
    if number in ("model", "tensor"):
        return number
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"scale must be model, tensor or a number; got {value!r}")
    return float(number)


def _from_this_tensor(rule: MergeRule, group: TensorGroup, scale: float | str) -> Tensor:
    """Fold the tensors at hand, in order; scale by the rule on this tensor's own norms, or by a given number."""
    assert group.base is not None
    base, experts, weight = group.base.tensor, [entry.tensor for entry in group.non_base], _weight(group)
    if isinstance(scale, str) and not rule.whole_model_scale:
        scale = rule.scale(Norms((1.0,) * len(experts), 1.0))
    parts = [Piece(0, base.numel(), tuple(base.shape))]  # its own norms take the whole of it
    if not isinstance(scale, str):
        parts = pieces(rule, weight, base.shape, base.device)
    merged = torch.empty(base.numel(), dtype=base.dtype, device=base.device)
    flat = [tensor.reshape(-1) for tensor in (base, *experts)]
    with _one_thread(base.device):
        for piece in parts:
            part = _merged_piece(rule, weight, [piece.of(f) for f in flat], scale, group)
            merged[piece.start : piece.stop] = part.reshape(-1)
    return merged.reshape(base.shape)


def _merged_piece(
    rule: MergeRule, weight: Weight, models: Sequence[Tensor], scale: float | str, group: TensorGroup
) -> Tensor:
    base, *experts = models
    running, norms = fold_tensor(rule, base, experts, weight.name, is_matrix=weight.is_matrix)
    for entry, norm in zip(group.non_base, norms.experts, strict=True):
        if not math.isfinite(norm):
            raise ValueError(f"{weight.name} of {entry.id} has values that are NaN or infinite")
    factor = rule.scale(norms) if isinstance(scale, str) else scale
    only = experts[0] if len(experts) == 1 and factor == 1.0 else None
    return merged_tensor(base, rule.read_out(running, weight), factor, base.dtype, expert=only)


def _from_whole_model(rule: MergeRule, group: TensorGroup) -> Tensor:
    """Read this tensor's running state of the whole-model pass back, and scale it by the whole model's norms."""
    assert group.base is not None
    base, weight = group.base.tensor, replace(_weight(group), name=_stored_name(group))
    models = tuple(_weights(entry) for entry in (group.base, *group.non_base))
    whole = _whole_model(rule, models)
    stored, state = models[0].tensor(weight.name).to(base.device), whole.running.tensor(weight.name)
    if state is None:  # no expert differs from the base
        return stored.to(base.dtype)
    only = models[1].tensor(weight.name).to(base.device) if len(models) == 2 and whole.scale == 1.0 else None
    with _one_thread(base.device):
        read = rule.read_out(state.to(base.device), weight)
    return merged_tensor(stored, read, whole.scale, base.dtype, expert=only)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Compute as merge_stream's workers do: the last bit of a matrix product depends on the number of threads."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _weight(group: TensorGroup) -> Weight:
    """Return what merge_stream would tell a rule about this weight; the name is that in the base's files, if any."""
    from mergekit.common import ModelReference

    assert group.base is not None
    shape, name, vocabulary = group.base.tensor.shape, group.metadata.name or "", None
    if isinstance(group.base.id, ModelReference):
        files = _weights(group.base)
        vocabulary = files.vocabulary
        others = () if name in files.names else files.names
        name = next((n for n in others if _holds(group.base, n)), name)
    matrix = group.metadata.vocabulary_axis is None and is_matrix(name, shape, vocabulary)
    return Weight(name, matrix, len(group.non_base))


_lock = threading.Lock()
_latest: dict[tuple[MergeRule, tuple[Weights, ...]], WholeModel] = {}


def _whole_model(rule: MergeRule, models: tuple[Weights, ...]) -> WholeModel:
    """Run pass 1 over whole models (the base first), once per merge whatever the number of tensors and threads.

    The latest outcome alone is kept: a sweep over alpha in one process must not fill the disk with running tensors.
    """
    with _lock:
        if (rule, models) not in _latest:
            base, *experts = (weights.folder for weights in models)
            holder = tempfile.TemporaryDirectory(prefix="contmerge-")
            try:
                whole = _fold_all(rule, base, tuple(experts), Path(holder.name))
            except BaseException:
                holder.cleanup()
                raise
            weakref.finalize(whole, holder.cleanup)  # when nobody reads it any more, at the latest at exit
            _latest.clear()
            _latest[rule, models] = whole
        return _latest[rule, models]


def _fold_all(rule: MergeRule, base: Path, experts: tuple[Path, ...], scratch: Path) -> WholeModel:
    weights = Weights(base)
    found = merge_experts(rule, weights, [open_expert(e, weights) for e in experts], running_out=scratch)
    return WholeModel(Running(scratch), found.scale)


def _stored_name(group: TensorGroup) -> str:
    """Return the name under which the files of all models hold the tensors that mergekit hands over.

    It is mergekit's own name, or another for an alias and for a tied head that is stored a second time: the
    whole-model pass counts that once, as the input table. Raises ValueError where there is no such name.
    """
    assert group.base is not None
    asked, files = group.metadata.name or "", _weights(group.base)
    others = [n for n in files.names if files.shape(n) == tuple(group.base.tensor.shape)]
    names = [asked] if asked in files.names else others
    found = next((n for n in names if all(_holds(entry, n) for entry in group.entries)), None)
    if found is None:
        odd = next((e for e in group.entries if not any(_holds(e, n) for n in names)), group.base)
        raise ValueError(
            f"{asked} of {odd.id} is not what its files hold under that name (slices, a permuted vocabulary or other "
            "names), so a scale over whole models cannot be right. Set `scale: tensor` or a number under `parameters:`."
        )
    return found


def _holds(entry: TensorEntry, name: str) -> bool:
    """Say whether a model's files hold, under this name, the tensor that mergekit hands over."""
    weights, tensor = _weights(entry), entry.tensor
    if name not in weights.names or weights.shape(name) != tuple(tensor.shape):
        return False
    # NaN equals NaN here: that a weight is not finite is for the whole-model pass to say.
    return torch.allclose(weights.tensor(name).to(tensor.dtype), tensor.cpu(), rtol=0, atol=0, equal_nan=True)


def _weights(entry: TensorEntry) -> Weights:
    """Return the files of a model, opened anew when they have changed since: the same object means the same content."""
    folder = _folder(entry)
    stats = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors*"))]
    return _open(folder, tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))


@functools.lru_cache(maxsize=64)
def _open(folder: Path, _stamp: tuple[tuple[str, int, int, int], ...]) -> Weights:
    return Weights(folder)


def _folder(entry: TensorEntry) -> Path:
    """Return the folder from which mergekit reads a model."""
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if not isinstance(entry.id, ModelReference):
        raise ValueError("tensors without a model folder have no whole-model norms; set `scale: tensor` or a number")
    return Path(LoaderCache().get(entry.id).index.base_path)
