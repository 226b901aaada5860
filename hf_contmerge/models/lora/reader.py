"""Reads peft LoRA folders as task vectors, without peft.

    D = scaling * B @ A                                              LoRA; scaling = alpha / r, or alpha / sqrt(r)
    D = m / |W + scaling * B @ A| * (W + scaling * B @ A) - W         DoRA; one norm per output
    D = whole - W                                                    modules_to_save, biases, saved embedding tables
    D[rows] = given - W[rows]                                        trainable_token_indices

Key names, patterns and scalings follow peft 0.21: base + D equals the result of its `merge_and_unload`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.lora.layout import FILE, Layout, LowRank, WeightChange
from hf_contmerge.models.lora.settings import CONFIG, is_same_base, read_settings
from hf_contmerge.models.weights import Weights


class Adapter:
    """A peft LoRA folder as a task vector D.

    D = expert - base, weight by weight. Settings and headers are checked on opening; each call reads one weight's
    tensors. A whole table equal to the base's (save_embedding_layers) is no change, and is missing from `names`.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: the base model's weights.

    Raises:
        ModelError: the folder is no LoRA adapter, damaged, pickled or no change of weights, or holds a tensor that is
            unknown or does not fit the base.
    """

    def __init__(self, folder: Path, base: Weights) -> None:
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        self.base_model: str | None = settings.get("base_model_name_or_path") or None
        self._tensors = _open(self.folder)
        self._changes = Layout(self.folder, settings, self._tensors, base).changes
        self.names: tuple[str, ...] = tuple(sorted(self._changes))

    def rank(self, name: str) -> int | None:
        """Return r of a weight's change, without reading data.

        None for a stack of matrices or a change that is not purely low-rank.
        """
        inner = _plain(self._changes[name])
        return inner.rank if inner else None

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the float32 factors of D = left @ right.

        Shapes: left (m, r), right (r, n). None where `rank` is None. Raises KeyError for a name missing from `names`.
        """
        inner = _plain(self._changes[name])
        if inner is None:
            return None
        a, b = self._read(inner.a), self._read(inner.b)
        left, right = (a.T, b.T) if inner.transposed else (b, a)
        return left.float() * inner.scale, right.float().contiguous()

    def task_vector(self, name: str, base: Tensor) -> Tensor:
        """Return D in float32; zeros without a change.

        `base`: the base's tensor of the same shape, in any floating type. It stays unchanged.
        """
        change = self._changes.get(name)
        if change is None:
            return torch.zeros(base.shape)
        if change.whole is None and change.rows is None:
            if change.bias:
                return self._read(change.bias[0]).float() * change.bias[1]
            assert change.low_rank
            delta = self._product(change.low_rank)
            return self._with_magnitude(delta, change.low_rank, base).sub_(base) if change.low_rank.magnitude else delta
        return self._replaced(change, base).sub_(base)

    def _replaced(self, change: WeightChange, base: Tensor) -> Tensor:
        """Return the expert's weight; the adapter holds rows or all of it."""
        expert = (self._read(change.whole) if change.whole else base).to(torch.float32, copy=True)
        if change.rows:
            key, rows = change.rows
            expert[list(rows)] = self._read(key).float()
        if change.bias:
            expert.add_(self._read(change.bias[0]).float(), alpha=change.bias[1])
        if change.low_rank and change.low_rank.magnitude:
            return self._with_magnitude(self._product(change.low_rank), change.low_rank, expert)
        return expert.add_(self._product(change.low_rank)) if change.low_rank else expert

    def _product(self, inner: LowRank) -> Tensor:
        a, b = self._read(inner.a).float(), self._read(inner.b).float() * inner.scale
        if not inner.experts:
            return a.T @ b.T if inner.transposed else b @ a
        a = a.reshape(inner.experts, -1, a.shape[1])  # (experts, r, in)
        b = b.reshape(b.shape[0], -1, inner.experts).permute(2, 0, 1)  # (experts, out, r): peft has the expert last
        return torch.bmm(a.mT, b.mT) if inner.transposed else torch.bmm(b, a)

    def _with_magnitude(self, delta: Tensor, inner: LowRank, weight: Tensor) -> Tensor:
        """Return DoRA's weight: W + delta, scaled per output to `magnitude`.

        Works in `delta`'s memory.
        """
        assert inner.magnitude
        inputs = 0 if inner.transposed else 1
        delta.add_(weight)
        norms = torch.linalg.vector_norm(delta, dim=inputs)
        return delta.mul_((self._read(inner.magnitude).float() / norms).unsqueeze(inputs))

    def _read(self, key: str) -> Tensor:
        return self._tensors.tensor(key)


def check_base(adapter: Adapter, base_names: Collection[str], *, force: bool = False) -> None:
    """Raise ModelError if an adapter names another base than `base_names`.

    Hub ids compare without case and revision, cache folders by their Hub id, paths as resolved. An adapter without a
    base name is accepted.
    """
    if force or not adapter.base_model or is_same_base(adapter.base_model, base_names):
        return
    raise ModelError(
        f"{adapter.folder} was trained on {adapter.base_model}, not on {' alias '.join(base_names) or 'this base'}: it "
        "does not match this base model. Give the adapter's base, or --force if this is a copy of it."
    )


def _plain(change: WeightChange) -> LowRank | None:
    """Return a change's low-rank part, if there is no other part."""
    inner = change.low_rank
    return inner if inner and not (inner.magnitude or inner.experts or change.whole or change.rows) else None


def _open(folder: Path) -> Weights:
    if (folder / FILE).is_file():
        return Weights(folder / FILE)
    if (folder / "adapter_model.bin").is_file():
        raise ModelError(
            f"{folder} holds its adapter as a pickle (adapter_model.bin), which is not read. Load it once with peft "
            "and call save_pretrained, which writes safetensors."
        )
    raise ModelError(f"{folder} has {CONFIG} but no {FILE}. Save or fetch the adapter again.")
