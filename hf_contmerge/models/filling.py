"""A loaded model's tensors by stored name, to fill in place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.architecture import Architecture
from hf_contmerge.models.memory import Held, held_by
from hf_contmerge.models.rounding import rounded
from hf_contmerge.models.weights import Weights

Read = Callable[[str], Tensor]
"""Stored name -> values in float32."""


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in memory with the stored weights in it."""

    name: str
    tensor: Tensor
    held: Held

    @torch.no_grad()
    def fill(self, read: Read, names: Collection[str]) -> None:
        """Replace parts by stored name, rounded as in a merge."""
        for part in (part for part in self.held.parts if part.stored in names):
            values = rounded(read(part.stored), self.tensor.dtype, name=part.stored)[part.source]
            self.tensor.data[part.place] = (values.mT if part.swapped else values).to(self.tensor.device)


def held_tensors(model: Any, base: Weights) -> list[HeldTensor]:
    """Return a model's tensors with the stored weights in them."""
    architecture = Architecture(model)
    held = held_by(architecture, architecture.conversion(), base)
    found = model.state_dict(keep_vars=True).items()
    return [HeldTensor(name, tensor, held[name]) for name, tensor in found if name in held]


def whole_tensors(model: Any, base: Weights) -> list[HeldTensor]:
    """Return the same without computed ones.

    Raises:
        ModelError: the model holds a weight in a form that cannot be replaced in memory.
    """
    tensors = held_tensors(model, base)
    if strange := [each for each in tensors if each.held.form]:
        raise ModelError(
            f"{base.folder}: transformers holds {strange[0].name} in a form ({strange[0].held.form}) that cannot be "
            "replaced in memory. Export the merge and measure it with `contmerge score`."
        )
    return [each for each in tensors if each.held.parts and each.tensor.is_floating_point()]
