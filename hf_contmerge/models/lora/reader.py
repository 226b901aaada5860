"""Reads peft LoRA folders as task vectors, without peft.

    D = scaling * B @ A                                              LoRA; scaling = alpha / r, or alpha / sqrt(r)
    D = m / |W + scaling * B @ A| * (W + scaling * B @ A) - W         DoRA; one norm per output
    D = whole - W                                                    modules_to_save, biases, saved embedding tables
    D[rows] = given - W[rows]                                        trainable_token_indices

Key names, patterns and scalings follow peft 0.21: base + D equals the result of its `merge_and_unload`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.lora.layout import FILE, Layout, LowRank, StoredChange, WeightChange
from hf_contmerge.models.lora.settings import CONFIG, is_same_base, is_same_revision, read_settings
from hf_contmerge.models.memory import Part
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
        self.revision: str | None = settings.get("revision") or None
        self._tensors = _open(self.folder)
        self._changes = Layout(self.folder, settings, self._tensors, base).changes
        self.names: tuple[str, ...] = tuple(sorted(self._changes))

    def rank(self, name: str) -> int | None:
        """Return r of a weight's change, without reading data.

        None for a stack of matrices or a change that is not purely low-rank.
        """
        plain = _plain(self._changes[name])
        return plain[0].rank if plain else None

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the float32 factors of D = left @ right.

        Shapes: left (m, r), right (r, n). None where `rank` is None. Raises KeyError for a name missing from `names`.
        """
        plain = _plain(self._changes[name])
        if plain is None:
            return None
        left, right = self._sides(*plain)
        return (right.mT, left.mT.contiguous()) if plain[1].swapped else (left, right.contiguous())

    def task_vector(self, name: str, base: Tensor) -> Tensor:
        """Return D in float32; zeros without a change.

        `base`: the base's tensor of the same shape, in any floating type. It stays unchanged.
        """
        changes = self._changes.get(name, ())
        if len(changes) == 1 and changes[0].whole:
            return self._change(changes[0], base)
        delta = torch.zeros(base.shape)
        for change in changes:
            delta[change.part.source] = self._change(change, base[change.part.source])
        return delta

    def _change(self, stored: StoredChange, base: Tensor) -> Tensor:
        """Return D of the part of a weight in `base`."""
        change, part = stored.change, stored.part
        held = base.mT if part.swapped else base
        if change.whole is None and change.rows is None:
            delta = self._added(change, part, held)
        else:
            delta = self._replaced(change, part, held).sub_(held)
        return delta.mT if part.swapped else delta

    def _added(self, change: WeightChange, part: Part, base: Tensor) -> Tensor:
        if change.bias:
            return self._read(change.bias[0]).float()[part.place] * change.bias[1]
        assert change.low_rank
        delta = self._product(change.low_rank, part)
        return self._with_magnitude(delta, change.low_rank, base).sub_(base) if change.low_rank.magnitude else delta

    def _replaced(self, change: WeightChange, part: Part, base: Tensor) -> Tensor:
        """Return the expert's weight; the adapter holds rows or all of it."""
        expert = (self._read(change.whole)[part.place] if change.whole else base).to(torch.float32, copy=True)
        if change.rows:
            key, rows = change.rows
            expert[list(rows)] = self._read(key).float()
        if change.bias:
            expert.add_(self._read(change.bias[0]).float()[part.place], alpha=change.bias[1])
        if change.low_rank and change.low_rank.magnitude:
            return self._with_magnitude(self._product(change.low_rank, part), change.low_rank, expert)
        return expert.add_(self._product(change.low_rank, part)) if change.low_rank else expert

    def _product(self, inner: LowRank, part: Part) -> Tensor:
        left, right = self._sides(inner, part)
        return left @ right

    def _sides(self, inner: LowRank, part: Part) -> tuple[Tensor, Tensor]:
        """Return a part's factors in the axes held in memory.

        Stacks have the experts in front.
        """
        a, b = self._read(inner.a).float(), self._read(inner.b).float()
        if inner.experts:
            a = a.reshape(inner.experts, -1, a.shape[1])[part.place[0]]  # (experts, r, in)
            b = b.reshape(b.shape[0], -1, inner.experts).permute(2, 0, 1)[part.place[0]]  # peft has the expert last
        left, right = (a.mT, b.mT) if inner.transposed else (b, a)
        rows, columns = part.place[-2:]
        return left[..., rows, :] * inner.scale, right[..., columns]

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


def check_base(
    adapter: Adapter, base_names: Collection[str], *, force: bool = False, cure: str = "use --force"
) -> None:
    """Raise ModelError if an adapter names another base than `base_names`.

    Hub ids compare without case, cache folders by their Hub id, paths as resolved; revisions where both are known. An
    adapter without a base name is accepted. `cure`: what to do about a copy of its base.
    """
    if force or not adapter.base_model:
        return
    said = adapter.base_model + (f"@{adapter.revision}" if adapter.revision else "")
    wrong = f"{adapter.folder} was trained on {said}, not on {' alias '.join(dict.fromkeys(base_names)) or 'this base'}"
    if is_adapter(Path(adapter.base_model)):
        raise ModelError(
            f"{wrong}: its base is another adapter. Merge that adapter into its base (merge_and_unload, "
            "save_pretrained), and give the result as the base."
        )
    if not is_same_base(adapter.base_model, base_names):
        raise ModelError(
            f"{wrong}: it does not match this base model. Give the adapter's base; for a copy of it, {cure}."
        )
    if not is_same_revision(said, base_names):
        raise ModelError(f"{wrong}: it is another revision. Give the adapter's revision; for a copy of it, {cure}.")


def _plain(changes: Sequence[StoredChange]) -> tuple[LowRank, Part] | None:
    """Return a matrix's low-rank change, if it is the only one."""
    change, part = changes[0].change, changes[0].part
    inner = change.low_rank
    is_matrix = len(part.source) == sum(isinstance(axis, slice) for axis in part.place) == 2
    plain = len(changes) == 1 and is_matrix and changes[0].whole
    return (inner, part) if plain and inner and not (inner.magnitude or change.whole or change.rows) else None


def _open(folder: Path) -> Weights:
    if (folder / FILE).is_file():
        return Weights(folder / FILE)
    if (folder / "adapter_model.bin").is_file():
        raise ModelError(
            f"{folder} holds its adapter as a pickle (adapter_model.bin), which is not read. Load it once with peft "
            "and call save_pretrained, which writes safetensors."
        )
    raise ModelError(f"{folder} has {CONFIG} but no {FILE}. Save or fetch the adapter again.")
