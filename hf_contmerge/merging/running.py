"""A rule's state in a folder: tensors, parts or low-rank factors.

model.safetensors ...            float32, float64 if ill-posed: a tensor for each weight, under its name; (slots, shape)
                                 for some rules; of rules with named parts, <weight>::<part>
owners/model.safetensors ...     a uint8 tensor for each, with rules that select: the stage that an element is of
factors/<weight>.safetensors     left, core, right of a weight that only adapters have changed so far, and the shadow
                                 (trust.py) of some
shadows/<weight>.safetensors     float64: the shadow of some tensor
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from hf_contmerge.merging._factored import Factored
from hf_contmerge.merging._pieces import Parts
from hf_contmerge.models.weights import Weights, write_tensors
from hf_contmerge.runtime.foreign import path_in

_OF = "::"


class Running:
    """The state in a folder, to read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._dense = _weights(folder)
        self._keys: dict[str, list[str]] = defaultdict(list)
        for key in self._dense.names if self._dense else ():
            self._keys[key.partition(_OF)[0]].append(key)
        self._owners = _weights(folder / "owners")
        # Opened when they are read: a large model has more of them than a process may have files open.
        self._factors, self._shadows = (
            {path.stem: path for path in sorted((folder / kind).glob("*.safetensors"))}
            for kind in ("factors", "shadows")
        )

    def names(self) -> set[str]:
        """Return the names of the nonzero weights."""
        return {*self._keys, *self._factors}

    def rank(self, name: str) -> int | None:
        """Return a weight's rank: 0 for zero, None for dense."""
        if name in self._factors:
            return max(Weights(self._factors[name]).shape("core"))
        return None if name in self._keys else 0

    def state(self, name: str, dtype: torch.dtype = torch.float32) -> Parts | None:
        """Return a weight's state in full, or None while it is zero.

        `dtype`: of a product of factors; tensors have their own.
        """
        if name in self._factors:
            return {"": self.factored(name).dense(dtype)}
        if self._dense is None or name not in self._keys:
            return None
        return {key.partition(_OF)[2]: self._dense.tensor(key) for key in self._keys[name]}

    def holds(self, name: str) -> bool:
        """Say if a weight's state is nonzero."""
        state = self.state(name)
        return state is not None and any(bool(part.any()) for part in state.values())

    def factored(self, name: str) -> Factored:
        file = Weights(self._factors[name])
        parts = ("left", "core", "right", *(("shadow",) if "shadow" in file.names else ()))
        return Factored(*(file.tensor(part) for part in parts))

    def shadow(self, name: str) -> Tensor | None:
        """Return a weight's shadow in full, if it has one."""
        if name in self._factors:
            return self.factored(name).dense_shadow()
        return Weights(self._shadows[name]).tensor("shadow") if name in self._shadows else None

    def shadowed(self) -> set[str]:
        """Return the names of the weights with a shadow."""
        return {*self._shadows, *(n for n, file in self._factors.items() if "shadow" in Weights(file).names)}

    def owners(self, name: str) -> Tensor:
        """Return the owning stage of each element (uint8; 0: the base)."""
        assert self._owners is not None
        return self._owners.tensor(name)

    def prefetch(self, name: str) -> None:
        """Ask the system to read a weight's state ahead."""
        if self._dense and name in self._keys:
            for key in self._keys[name]:
                self._dense.prefetch(key)


def key_of(name: str, part: str) -> str:
    """Return the stored name of a part of a weight's state."""
    return f"{name}{_OF}{part}" if part else name


def write_factored(folder: Path, name: str, state: Factored) -> None:
    """Write the factors of one weight."""
    parts = {"left": state.left, "core": state.core, "right": state.right, "shadow": state.shadow}
    _write(folder / "factors", name, {part: tensor for part, tensor in parts.items() if tensor is not None})


def write_shadow(folder: Path, name: str, shadow: Tensor) -> None:
    """Write the shadow of one weight."""
    _write(folder / "shadows", name, {"shadow": shadow})


def _write(folder: Path, name: str, parts: Parts) -> None:
    folder.mkdir(exist_ok=True)
    write_tensors(path_in(folder, name, ".safetensors"), parts)


def _weights(folder: Path) -> Weights | None:
    return Weights(folder) if any(folder.glob("*.safetensors")) else None
