"""peft LoRA folders as what they are: task vectors, read weight by weight. peft itself is not needed.

    D = scaling * B @ A                                              LoRA; scaling = alpha / r, or alpha / sqrt(r)
    D = m / |W + scaling * B @ A| * (W + scaling * B @ A) - W         DoRA; the norm is that of each output's weights
    D = whole - W                                                    modules_to_save, biases, saved embedding tables
    D[rows] = given - W[rows]                                        trainable_token_indices

Key names, patterns and scalings are those of peft 0.21: base + D is what its `merge_and_unload` gives.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.lora.layout import FILE, Change, Layout, LowRank
from hf_contmerge.models.lora.settings import CONFIG, is_same_base, read_settings
from hf_contmerge.models.weights import Weights


class Adapter:
    """A peft LoRA folder, read as the task vector that it is: D = expert - base, weight by weight.

    Settings and headers are checked when it is opened; each call reads one weight's tensors. A whole table that equals
    the base's (save_embedding_layers) is no change, and is not among `names`.

    Args:
        folder: has adapter_config.json and adapter_model.safetensors.
        base: the weights of its base model.

    Raises:
        ModelError: the folder is no LoRA adapter, damaged, pickled, of a kind that is no change of weights, or has a
            tensor that is unknown or does not fit the base's weight.
    """

    def __init__(self, folder: Path, base: Weights) -> None:
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        self.base_model: str | None = settings.get("base_model_name_or_path") or None
        self._tensors = _open(self.folder)
        self._changes = Layout(self.folder, settings, self._tensors, base).changes
        self.names: tuple[str, ...] = tuple(sorted(self._changes))

    def rank(self, name: str) -> int | None:
        """Return r of a weight's change without reading data; None if it is not low-rank, or a stack of matrices."""
        inner = _plain(self._changes[name])
        return inner.rank if inner else None

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return float32 left (m, r) and right (r, n) with D = left @ right; None where `rank` is None.

        Raises KeyError for a name that is not among `names`.
        """
        inner = _plain(self._changes[name])
        if inner is None:
            return None
        a, b = self._read(inner.a), self._read(inner.b)
        left, right = (a.T, b.T) if inner.transposed else (b, a)
        return left.float() * inner.scale, right.float().contiguous()

    def task_vector(self, name: str, base: Tensor) -> Tensor:
        """Return D in float32, of the weight's shape; zeros where the adapter does not touch it.

        `base`: the base's tensor, in any floating type. It is not changed.
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

    def _replaced(self, change: Change, base: Tensor) -> Tensor:
        """Return the expert's own weight, where the adapter holds the whole of it or some rows."""
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
        """Return DoRA's weight: each output's row of W + delta, at its own length. Works in `delta`'s memory."""
        assert inner.magnitude
        inputs = 0 if inner.transposed else 1
        delta.add_(weight)
        norms = torch.linalg.vector_norm(delta, dim=inputs)
        return delta.mul_((self._read(inner.magnitude).float() / norms).unsqueeze(inputs))

    def _read(self, key: str) -> Tensor:
        return self._tensors.tensor(key)


def check_base(adapter: Adapter, base_names: Collection[str], *, force: bool = False) -> None:
    """Raise ModelError if an adapter says that it was trained on another base than the one called `base_names`.

    Hub ids compare without case and revision, cache folders by the id that they hold, paths as resolved. An adapter
    that names no base is accepted.
    """
    if force or not adapter.base_model or is_same_base(adapter.base_model, base_names):
        return
    raise ModelError(
        f"{adapter.folder} was trained on {adapter.base_model}, not on {' alias '.join(base_names) or 'this base'}: it "
        "would change weights that it does not belong to. Give its own base, or --force if this is a copy of it."
    )


def _plain(change: Change) -> LowRank | None:
    """Return the low-rank part of a change that is nothing else."""
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
