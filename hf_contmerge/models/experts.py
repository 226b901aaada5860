"""Experts as task vectors, from full models or peft adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config, optional_json
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.function import check_function
from hf_contmerge.models.layout import weights_like
from hf_contmerge.models.lora.layout import FILE
from hf_contmerge.models.lora.reader import Adapter, check_base
from hf_contmerge.models.reading import missing
from hf_contmerge.models.weights import Weights, tensor_bytes, weights_sha256

ExpertKind = Literal["model", "adapter"]

Reader = Callable[[int, int, Tensor], Tensor]
"""(start, stop, base's elements start:stop in float32) -> the task vector's elements, float32, all flat."""


class Expert(Protocol):
    """A trained model as the difference from its base, weight by weight."""

    folder: Path
    kind: ExpertKind

    def rank(self, name: str, /) -> int | None:
        """Return a change's rank: 0 for none, None if unknown or high."""
        ...

    def factors(self, name: str, /) -> tuple[Tensor, Tensor] | None:
        """Return float32 factors left (m, r), right (r, n), or None."""
        ...

    def reader(self, name: str, base: Tensor, /) -> Reader:
        """Return a reader of a weight's change. `base`: the base's tensor."""
        ...

    def is_whole(self, name: str, /) -> bool:
        """Say if a weight's change is computed in one piece."""
        ...

    def values(self, name: str, /) -> Tensor | None:
        """Return the weight as stored; None where the file stores a change."""
        ...

    def prefetch(self, name: str, /) -> None:
        """Ask the system to read a weight ahead."""
        ...


class DenseExpert:
    """A full model of the base's layout."""

    kind: ExpertKind = "model"

    def __init__(self, folder: Path, base: Weights) -> None:
        check_mergeable(folder)
        self.folder = folder
        self.weights = weights_like(base, folder)
        self.names = base.floating()
        for name in self.names:
            if not self.weights.dtype(name).is_floating_point:
                raise ModelError(
                    f"{name} is stored as {self.weights.dtype(name)} in {folder}, as {base.dtype(name)} in "
                    f"{base.folder}. An expert's weights must be floating: save it again in the base's dtype."
                )
        for name in sorted(set(base.names) - set(self.names)):
            if not torch.equal(base.tensor(name), self.weights.tensor(name)):
                raise ModelError(
                    f"The integer tensor {name} differs between {base.folder} and {folder}; only floating weights "
                    "can be merged. Use experts whose buffers are the base's."
                )

    def rank(self, _name: str) -> None:
        return None

    def factors(self, _name: str) -> None:
        return None

    def reader(self, name: str, _base: Tensor) -> Reader:
        stored = self.weights.tensor(name).reshape(-1)
        return lambda start, stop, wide: torch.sub(stored[start:stop].to(wide.device), wide).float()  # float64 too

    def is_whole(self, _name: str) -> bool:
        return False

    def values(self, name: str) -> Tensor:
        return self.weights.tensor(name)

    def prefetch(self, name: str) -> None:
        self.weights.prefetch(name)


class AdapterExpert:
    """A peft adapter of the base."""

    kind: ExpertKind = "adapter"

    def __init__(self, adapter: Adapter) -> None:
        self.folder, self._adapter = adapter.folder, adapter
        self._names = frozenset(adapter.names)

    def rank(self, name: str) -> int | None:
        return self._adapter.rank(name) if name in self._names else 0

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        return self._adapter.factors(name) if name in self._names else None

    def reader(self, name: str, base: Tensor) -> Reader:
        if name not in self._names:
            return lambda _start, _stop, wide: torch.zeros_like(wide)
        return lambda start, stop, wide: self._adapter.task_vector(name, base).reshape(-1)[start:stop].to(wide.device)

    def is_whole(self, name: str) -> bool:
        return name in self._names

    def values(self, _name: str) -> None:
        return None

    def prefetch(self, _name: str) -> None:
        return None


class WeightedExpert:
    """An expert whose task vector is multiplied by a number."""

    def __init__(self, expert: Expert, weight: float) -> None:
        self.folder, self._expert, self._weight = expert.folder, expert, weight
        self.kind: ExpertKind = expert.kind

    def rank(self, name: str) -> int | None:
        return self._expert.rank(name)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        factors = self._expert.factors(name)
        return factors and (factors[0] * self._weight, factors[1])

    def reader(self, name: str, base: Tensor) -> Reader:
        if self._weight == 0.0:
            return lambda _start, _stop, wide: torch.zeros_like(wide)
        read = self._expert.reader(name, base)
        return lambda start, stop, wide: read(start, stop, wide) * self._weight

    def is_whole(self, name: str) -> bool:
        return self._expert.is_whole(name)

    def values(self, name: str) -> Tensor | None:
        return self._expert.values(name)

    def prefetch(self, name: str) -> None:
        self._expert.prefetch(name)


def weighted(expert: Expert, weight: float) -> Expert:
    """Return an expert with a weight; with weight 1, itself."""
    return expert if weight == 1.0 else WeightedExpert(expert, weight)


def open_expert(folder: Path, base: Weights, *, base_names: Collection[str] = (), force: bool = False) -> Expert:
    """Open a full model or an adapter; check the fit by headers.

    Args:
        folder: the expert's folder.
        base: the base's weights.
        base_names: names under which an adapter may know its base.
        force: accept an adapter of another base, or a model of another configuration or tokenizer.
    """
    if not is_adapter(folder):
        expert = DenseExpert(folder, base)
        if not force:
            check_function(base.folder, folder)
        return expert
    adapter = Adapter(folder, base)
    check_base(adapter, base_names, force=force)
    return AdapterExpert(adapter)


def stored_weights(folder: Path) -> Weights:
    """Open the tensors of a model's or an adapter's files."""
    return Weights(folder / FILE if is_adapter(folder) else folder)


def expert_sha256(folder: Path) -> str:
    """Return the digest of an expert's tensors and adapter settings."""
    if not is_adapter(folder):
        return weights_sha256(folder)
    digest = weights_sha256(folder / FILE)  # a merged model may lie beside it
    settings = optional_json(folder / "adapter_config.json")
    return hashlib.sha256((digest + json.dumps(settings, sort_keys=True)).encode()).hexdigest()


def first_twin(folders: Sequence[Path]) -> tuple[int, int] | None:
    """Return the indices of a twin and its original, or None.

    Of experts that differ in the first bytes of any tensor, no more is read.
    """
    alike: dict[str, list[int]] = {}
    for i, folder in enumerate(folders):
        alike.setdefault(_first_bytes(folder), []).append(i)
    digests: dict[str, int] = {}
    for i in sorted(i for group in alike.values() if len(group) > 1 for i in group):
        first = digests.setdefault(expert_sha256(folders[i]), i)
        if first != i:
            return i, first
    return None


def twins_refused(model: str, twin: str) -> str:
    """Return the message for two experts with the same weights."""
    same = "is listed twice" if Path(model).resolve() == Path(twin).resolve() else f"has the same weights as {twin}"
    return (
        f"{model} {same}; an expert must not be folded twice. Leave it out, or name the right one. Nothing was merged."
    )


def _first_bytes(folder: Path) -> str:
    """Return a digest of each tensor's name, type, shape and first bytes."""
    weights, digest = stored_weights(folder), hashlib.sha256()
    for name in weights.names:
        start = tensor_bytes(weights.tensor(name).reshape(-1)[:64])
        digest.update(f"{name} {weights.dtype(name)} {weights.shape(name)}".encode() + start)
    return digest.hexdigest()


def check_mergeable(folder: Path) -> None:
    """Raise ModelError for quantised or incomplete weights. Reads headers only."""
    if "quantization_config" in config(folder):
        method = config(folder)["quantization_config"].get("quant_method", "quantised")
        raise ModelError(f"{folder} is quantised ({method}). Dequantise it and save it as bfloat16 before merging.")
    weights = Weights(folder)
    for name in weights.names:
        weights.dtype(name)
    if lacking := missing(folder, weights.shapes()):
        more = f" and {len(lacking) - 1} more weights" if len(lacking) > 1 else ""
        raise ModelError(
            f"{folder} lacks {lacking[0]}{more}: transformers would make them up at random. Fetch or save it again."
        )
