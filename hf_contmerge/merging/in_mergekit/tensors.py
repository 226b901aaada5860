"""The tensors of a mergekit merge: in memory, or over whole models.

A scale of the whole model needs the norms of all tensors, and mergekit hands over one at a time. So at the first one
merging/stream.py's pass 1 runs over the files of the same models and keeps the state in a temporary folder, from which
each call then reads its own.
"""

from __future__ import annotations

import functools
import math
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merging._pieces import Piece, Stored, fold_tensor, merged_piece, pieces, read_out, unchanged
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.models.config import depths, is_matrix
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.rounding import Rounding
from hf_contmerge.models.statistics import FOLDER, Statistics
from hf_contmerge.models.survival import Kept
from hf_contmerge.models.weights import Weights, kept_dtype
from hf_contmerge.runtime.device import threads

Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size and time of each file."""


@dataclass(frozen=True)
class WholeModel:
    """The outcome of pass 1: running tensors on disk, and the scale."""

    running: Running
    scale: float


@dataclass(frozen=True)
class Written:
    """A merged tensor and the survival of its update."""

    name: str
    tensor: Tensor
    kept: Kept


@dataclass(frozen=True)
class Storage:
    """A recipe's dtype (None: the widest of a tensor's inputs) and rounding."""

    dtype: torch.dtype | None
    by: Rounding

    def of(self, group: TensorGroup, name: str) -> Stored:
        """Return how a tensor is stored."""
        assert group.base is not None
        asked = self.dtype or group.base.tensor.dtype
        files = _files(group.base) if self.dtype else None
        if files and name in files.names:
            asked = kept_dtype(files.dtype(name), files.main_dtype, asked)
        return Stored(name, asked, self.by)


def from_this_tensor(
    how: Sequence[tuple[MergeRule, float]], group: TensorGroup, scale: float | str, storage: Storage
) -> Written:
    """Fold tensors in memory; scale by their norms or a number.

    `how`: rule and weight of each expert.
    """
    assert group.base is not None
    rule = how[-1][0]
    base, experts, weights = group.base.tensor, [entry.tensor for entry in group.non_base], _weights_met(rule, group)
    _require_depth(rule, weights[-1])
    if isinstance(scale, str) and not rule.whole_model_scale:
        scale = rule.scale(Norms((1.0,) * len(experts), 1.0))
    parts = [Piece(0, base.numel(), tuple(base.shape))]  # its own norms take the whole of it
    if not isinstance(scale, str):
        parts = pieces(rule, weights[-1], base.device)
    stored, kept = storage.of(group, weights[-1].name), list[Kept]()
    merged = torch.empty(base.numel(), dtype=stored.dtype, device=base.device)
    flat = [tensor.reshape(-1) for tensor in (base, *experts)]
    with _one_thread(base.device):
        for piece in parts:
            cut_base, *cut = (piece.of(f) for f in flat)
            running, norms = fold_tensor(how, weights, piece, cut_base, cut)
            _require_finite(weights[-1].name, norms, group)
            factor = rule.scale(norms) if isinstance(scale, str) else scale
            read, only = read_out(rule, running, weights[-1]), cut[0] if len(cut) == 1 and factor == 1.0 else None
            part, left = merged_piece(cut_base, read, factor, replace(stored, start=piece.start), expert=only)
            merged[piece.start : piece.stop] = part.reshape(-1)
            kept.append(left)
    return Written(stored.name, merged.reshape(base.shape), Kept.sum(kept))


def _require_finite(name: str, norms: Norms, group: TensorGroup) -> None:
    for entry, norm in zip(group.non_base, norms.experts, strict=True):
        if not math.isfinite(norm):
            raise ValueError(f"{name} of {entry.id} has values that are NaN or infinite")


def from_whole_model(rule: MergeRule, group: TensorGroup, storage: Storage) -> Written:
    """Return this tensor from the whole-model pass, scaled by the model's norms."""
    assert group.base is not None
    base, weight = group.base.tensor, replace(_weight(group), name=_stored_name(group, _NO_WHOLE_SCALE))
    models = tuple(_weights(entry) for entry in (group.base, *group.non_base))
    whole = _whole_model(rule, models)
    before, state = models[0].tensor(weight.name).to(base.device), whole.running.state(weight.name)
    stored = storage.of(group, weight.name)
    if state is None:  # no expert differs from the base
        return Written(weight.name, *unchanged(before, stored))
    only = models[1].tensor(weight.name).to(base.device) if len(models) == 2 and whole.scale == 1.0 else None
    with _one_thread(base.device):
        read = read_out(rule, {name: part.to(base.device) for name, part in state.items()}, weight)
    return Written(weight.name, *merged_piece(before, read, whole.scale, stored, expert=only))


def _one_thread(device: torch.device) -> AbstractContextManager[None]:
    """Compute with one thread: threads change matrix products' last bits."""
    return threads(1) if device.type == "cpu" else nullcontext()


def _weight(group: TensorGroup) -> Weight:
    """Describe a weight like merging/stream.py, by the base's stored name."""
    assert group.base is not None
    shape, name, vocabulary, depth = tuple(group.base.tensor.shape), group.metadata.name or "", None, None
    if files := _files(group.base):
        vocabulary = files.vocabulary
        others = () if name in files.names else files.names
        name = next((n for n in others if _holds(group.base, n)), name)
        depth = files.depths.get(name)
    matrix = group.metadata.vocabulary_axis is None and is_matrix(name, shape, vocabulary)
    return Weight(name, matrix, len(group.non_base), shape, depth)


def _require_depth(rule: MergeRule, weight: Weight) -> None:
    """Raise ValueError for a weight of unknown layer, given factors."""
    lies_in_layers = not weight.name or bool(depths([weight.name]))
    if rule.first_layer != rule.last_layer and weight.depth is None and lies_in_layers:
        raise ValueError(
            f"the depth of {weight.name or 'a tensor without a name'} is not known (slices, or tensors in memory), so "
            "it has no factor between first_layer and last_layer. List whole models under `models:`, or remove the two."
        )


def _weights_met(rule: MergeRule, group: TensorGroup) -> list[Weight]:
    """Return the weight per expert, with needed statistics."""
    weight = _weight(group)
    if not rule.needs:
        return [replace(weight, stage=stage) for stage in range(1, weight.stage + 1)]
    assert group.base is not None
    weight, device = replace(weight, name=_stored_name(group, _NO_STATISTICS)), group.base.tensor.device
    found = [_statistics(entry).of(weight.name, rule.needs, device) for entry in group.non_base]
    return [replace(weight, stage=stage, statistics=one) for stage, one in enumerate(found, 1)]


def _statistics(entry: TensorEntry) -> Statistics:
    """Return an expert's statistics, reopened after changes."""
    folder = _folder(entry)
    return _open_statistics(folder, _stamp(folder / FOLDER))


@functools.lru_cache(maxsize=64)
def _open_statistics(folder: Path, _stamp: Stamp) -> Statistics:
    return Statistics(folder)


_lock = threading.Lock()


_latest: dict[tuple[MergeRule, tuple[Weights, ...]], WholeModel] = {}


def _whole_model(rule: MergeRule, models: tuple[Weights, ...]) -> WholeModel:
    """Run pass 1 over whole models, once per merge.

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


_NO_WHOLE_SCALE = "so a scale over whole models cannot be right. Set `scale: tensor` or a number under `parameters:`."
_NO_STATISTICS = "so it is not known which statistics are its. List whole models under `models:`."


def _stored_name(group: TensorGroup, therefore: str) -> str:
    """Return the stored name behind a tensor from mergekit.

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
            f"names), {therefore}"
        )
    return found


def _holds(entry: TensorEntry, name: str) -> bool:
    """Say if a model's files hold this tensor under this name."""
    weights, tensor = _weights(entry), entry.tensor
    if name not in weights.names or weights.shape(name) != tuple(tensor.shape):
        return False
    # NaN equals NaN here: that a weight is not finite is for the whole-model pass to say.
    return torch.allclose(weights.tensor(name).to(tensor.dtype), tensor.cpu(), rtol=0, atol=0, equal_nan=True)


def _files(entry: TensorEntry) -> Weights | None:
    """Return a model's files; None for a tensor in memory."""
    from mergekit.common import ModelReference

    return _weights(entry) if isinstance(entry.id, ModelReference) else None


def _weights(entry: TensorEntry) -> Weights:
    """Return a model's files, reopened after changes."""
    folder = _folder(entry)
    return _open(folder, _stamp(folder))


@functools.lru_cache(maxsize=64)
def _open(folder: Path, _stamp: Stamp) -> Weights:
    return Weights(folder)


def _stamp(folder: Path) -> Stamp:
    """Return what changes with the tensors of a folder."""
    stats = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors*"))]
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats)


def _folder(entry: TensorEntry) -> Path:
    """Return the folder of a model in mergekit."""
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if not isinstance(entry.id, ModelReference):
        raise ValueError(
            "tensors without a model folder have neither whole-model norms nor statistics; set `scale: tensor` or a "
            "number, and take a rule that needs no statistics"
        )
    return Path(LoaderCache().get(entry.id).index.base_path)
