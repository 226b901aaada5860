"""Reads models in another form than their base: stacks, fused maps.

transformers converts stored tensors to its form in memory, and only moves elements. Numbering the base's elements and
converting the numbers therefore shows where each element of the base's form lies in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.models.architecture import Architecture, Place
from hf_contmerge.models.weights import Weights

_AT_ONCE = 4  # groups kept: workers ask for their tensors in turn


@dataclass(frozen=True)
class _Group:
    """Tensors of two models, in two stored forms of the same weights."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


class Converted:
    """A base's tensors, read from another model's stored form."""

    def __init__(self, architecture: Architecture, base: Weights, other: Weights) -> None:
        self._architecture, self._base, self._other = architecture, base, other
        self.taken: set[str] = set()
        """Their stored names that went into a group."""
        self.readers: dict[str, Callable[[], Tensor]] = {}
        """The base's stored name -> function that makes its tensor."""
        self._values = functools.lru_cache(maxsize=_AT_ONCE)(self._make)

    def add(self, name: str, ours: Mapping[str, Place], theirs: Mapping[str, Place]) -> None:
        """Look for a base's tensor in another form."""
        if name in self.readers:
            return
        filled = self._architecture.filled
        targets = filled(ours[name].target)
        sources = tuple(n for n, place in theirs.items() if not targets.isdisjoint(filled(place.target)))
        targets = {target for n in sources for target in filled(theirs[n].target)}
        group = _Group(tuple(n for n, p in ours.items() if not targets.isdisjoint(filled(p.target))), sources)
        if sources and name in group.ours and self._fits(group):
            self.taken |= set(sources)
            self.readers |= {n: functools.partial(self._read, group, n) for n in group.ours}

    def _fits(self, group: _Group) -> bool:
        """Say if both sides make the same weights, by shapes alone."""
        sides = ((self._base, group.ours), (self._other, group.theirs))
        try:
            mine, yours = (
                self._architecture.in_memory({n: torch.empty(w.shape(n), device="meta") for n in names})
                for w, names in sides
            )
        except (RuntimeError, ValueError, KeyError, IndexError):  # experts of a stack are missing, or other sizes
            return False
        shapes = [{name: tensor.shape for name, tensor in side.items()} for side in (mine, yours)]
        elements = sum(math.prod(self._base.shape(n)) for n in group.ours)
        return shapes[0] == shapes[1] and sum(t.numel() for t in mine.values()) == elements

    def _read(self, group: _Group, name: str) -> Tensor:
        return self._values(group)[name]

    def _make(self, group: _Group) -> dict[str, Tensor]:
        memory = self._architecture.in_memory({n: self._other.tensor(n) for n in group.theirs})
        numbers, start = dict[str, Tensor](), 0
        for name in group.ours:
            shape = self._base.shape(name)
            numbers[name] = torch.arange(start, start + math.prod(shape)).reshape(shape)
            start += math.prod(shape)
        flat = torch.empty(start, dtype=next(iter(memory.values())).dtype)
        for target, places in self._architecture.in_memory(numbers).items():
            flat[places.reshape(-1)] = memory[target].reshape(-1)
        parts = flat.split([math.prod(self._base.shape(name)) for name in group.ours])
        return {n: part.reshape(self._base.shape(n)) for n, part in zip(group.ours, parts, strict=True)}
