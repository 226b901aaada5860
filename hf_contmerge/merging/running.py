"""A rule's state in a folder: tensors, parts or low-rank factors.

model.safetensors ...            float32: a tensor for each weight, under its name, (slots, *shape) for some rules; of
                                 rules with named parts, <weight>::<part>
owners/model.safetensors ...     a uint8 tensor for each, with rules that select: the stage that an element is of
factors/<weight>.safetensors     left, core, right of a weight that only adapters have changed so far
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from torch import Tensor

from hf_contmerge.merging._factored import Factored
from hf_contmerge.merging._pieces import Parts
from hf_contmerge.models.weights import Weights, write_tensors

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
        self._factors = {path.stem: path for path in sorted((folder / "factors").glob("*.safetensors"))}

    def names(self) -> set[str]:
        """Return the names of the nonzero weights."""
        return {*self._keys, *self._factors}

    def rank(self, name: str) -> int | None:
        """Return a weight's rank: 0 for zero, None for dense."""
        if name in self._factors:
            return max(Weights(self._factors[name]).shape("core"))
        return None if name in self._keys else 0

    def state(self, name: str) -> Parts | None:
        """Return a weight's state in full, or None while it is zero."""
        if name in self._factors:
            return {"": self.factored(name).dense()}
        if self._dense is None or name not in self._keys:
            return None
        return {key.partition(_OF)[2]: self._dense.tensor(key) for key in self._keys[name]}

    def factored(self, name: str) -> Factored:
        file = Weights(self._factors[name])
        return Factored(*(file.tensor(part) for part in ("left", "core", "right")))

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
    out = folder / "factors"
    out.mkdir(exist_ok=True)
    parts = {"left": state.left, "core": state.core, "right": state.right}
    write_tensors(out / f"{name}.safetensors", parts)


def _weights(folder: Path) -> Weights | None:
    return Weights(folder) if any(folder.glob("*.safetensors")) else None
