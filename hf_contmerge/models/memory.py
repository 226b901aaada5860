"""How transformers holds stored weights in memory.

Names differ (embed_out is lm_head), experts stored one by one are stacked, fused maps are split. The rules are those of
`from_pretrained`, applied to names and shapes; no data is read.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_contmerge.errors import ModelError
from hf_contmerge.models.architecture import Architecture, Conversion, find_architecture, in_order
from hf_contmerge.models.weights import Weights

Place = tuple[int | slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A stored weight or a part of it, in memory.

    `stored[source]` is `memory[place]`, transposed if `swapped`.
    """

    stored: str
    source: tuple[slice, ...]
    place: Place
    swapped: bool = False

    def fills(self, shape: Shape) -> bool:
        """Return True if `place` is the whole tensor in memory."""
        return self.place == whole_place(shape)

    def covers(self, shape: Shape) -> bool:
        """Return True if `source` is the whole stored weight."""
        return self.source == whole_place(shape)


@dataclass(frozen=True)
class Held:
    """A tensor in memory.

    Attributes:
        name: its name.
        shape: its shape.
        parts: stored weights in it; none if it is computed or tied to another one.
        form: an unsupported operation behind it, else empty.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...] = ()
    form: str = ""


@dataclass(frozen=True)
class InMemory:
    """The names in memory of a base's tensors, for peft.

    Attributes:
        held: name -> tensor, in the order of the modules' parameters.
        tables: weights of embedding tables.
        conv1d: weights of linear maps held as (in, out).
        linear: weights of linear maps held as (out, in).
        stacks: parameters of several matrices, (experts, ...).
        leaves: modules without modules in them.
        in_out: modules whose stacks are held as (experts, in, out).
        ties: name -> all names of a tensor with several.
        rename: an older version's name of a tensor -> today's.
    """

    held: Mapping[str, Held]
    tables: frozenset[str] = frozenset()
    conv1d: frozenset[str] = frozenset()
    linear: frozenset[str] = frozenset()
    stacks: frozenset[str] = frozenset()
    leaves: frozenset[str] = frozenset()
    in_out: frozenset[str] = frozenset()
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rename: Callable[[str], str] = str

    @functools.cached_property
    def _places(self) -> Mapping[str, tuple[Held, ...]]:
        """Stored name -> its tensors in memory."""
        places: dict[str, dict[str, Held]] = defaultdict(dict)
        for tensor in self.held.values():
            for part in tensor.parts:
                places[part.stored][tensor.name] = tensor
        return {stored: tuple(tensors.values()) for stored, tensors in places.items()}

    def parameters(self, module: str) -> list[str]:
        """Return the names of a module's tensors, in its order."""
        return [name for name in self.held if name.rpartition(".")[0] == module]

    def is_stacked(self, stored: str) -> bool:
        """Return True if a stored weight is a slice in memory."""
        parts = [part for tensor in self._places.get(stored, ()) for part in tensor.parts if part.stored == stored]
        return any(isinstance(axis, int) for part in parts for axis in part.place)

    def tensor_of(self, stored: str) -> Held | None:
        """Return the tensor equal to a stored weight, if any."""
        tensors = self._places.get(stored, ())
        if len(tensors) != 1 or len(tensors[0].parts) != 1:
            return None
        (part,) = tensors[0].parts
        return tensors[0] if part.fills(tensors[0].shape) and not part.swapped else None

    def name(self, stored: str) -> str:
        """Return a weight's name in memory. Raises ModelError if it has none."""
        tensor = self.tensor_of(stored)
        if tensor is None:
            why = (
                f"transformers holds {stored} in another form in memory, so LoRA cannot target it"
                if self.held
                else f"transformers does not know this architecture, so peft's name for {stored} is unknown"
            )
            raise ModelError(f"{why}. Export the merged model without --as-adapter.")
        return tensor.name


def in_memory(base: Weights) -> InMemory:
    """Build the base's model without data; match its tensors with files.

    An architecture unknown to transformers has no tensors.
    """
    from transformers.pytorch_utils import Conv1D

    architecture = find_architecture(base.folder)
    if architecture is None:
        return InMemory({})
    model = architecture.model
    modules, rules = dict(model.named_modules()), architecture.conversion()
    return InMemory(
        held=held_by(architecture, rules, base),
        tables=frozenset(f"{n}.weight" for n, m in modules.items() if isinstance(m, torch.nn.Embedding)),
        conv1d=frozenset(f"{n}.weight" for n, m in modules.items() if isinstance(m, Conv1D)),
        linear=frozenset(f"{n}.weight" for n, m in modules.items() if isinstance(m, torch.nn.Linear)),
        stacks=frozenset(n for n, p in model.named_parameters() if p.ndim == 3 and not _is_convolution(modules, n)),
        leaves=frozenset(n for n, m in modules.items() if not any(m.children())),
        in_out=frozenset(n for n, m in modules.items() if getattr(m, "is_transposed", False)),
        ties=_ties(model),
        rename=functools.partial(_renamed, rules),
    )


def _is_convolution(modules: Mapping[str, Any], parameter: str) -> bool:
    return type(modules[parameter.rpartition(".")[0]]).__name__.startswith("Conv")


def _renamed(rules: Conversion, name: str) -> str:
    """Return a tensor's current name in memory; old adapters have others."""
    now, pattern = rules.target(name)
    return name if pattern else now


def _ties(model: Any) -> dict[str, tuple[str, ...]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}


def held_by(architecture: Architecture, rules: Conversion, base: Weights) -> dict[str, Held]:
    """Return name in memory -> tensor, with the stored weights in it."""
    held = {name: Held(name, shape) for name, shape in architecture.shapes.items()}
    collected: dict[str, dict[str, list[_Array]]] = defaultdict(lambda: defaultdict(list))
    for stored in in_order(base.names):
        name, pattern = rules.target(stored)
        if name not in held:
            continue
        array = _Array.of(stored, base.shape(stored))
        if pattern is None:
            held[name] = _filled(held[name], array)
        else:
            collected[name][pattern].append(array)
    for name, arrays in collected.items():
        for target, array in _targets(name, rules.converter(next(iter(arrays))), arrays, architecture.shapes).items():
            held[target] = _filled(held[target], array)
    return held


def _filled(tensor: Held, array: _Array | str) -> Held:
    if isinstance(array, str):
        return replace(tensor, form=array)
    if array.shape != tensor.shape:
        return tensor  # another layout than the config's: from_pretrained refuses the model
    return replace(tensor, parts=array.parts)


def _targets(
    name: str, converter: Any, arrays: Mapping[str, list[_Array]], shapes: Mapping[str, Shape]
) -> dict[str, _Array | str]:
    """Apply a converter to shapes; return its targets or an unsupported operation."""
    patterns = converter.target_patterns
    names = {p: name.replace(patterns[0], p, 1) if len(patterns) > 1 else name for p in patterns}
    lists = [arrays[pattern] for pattern in converter.source_patterns if pattern in arrays]
    try:
        for operation in converter.operations:
            lists = _apply(operation, lists, len(names), shapes.get(name))
        results = [array for each in lists for array in each]
        if len(results) == len(names):
            return dict(zip(names.values(), results, strict=True))
        kind = "conversion"
    except _NotUnderstood as error:
        kind = str(error)
    return {target: kind for target in names.values() if target in shapes}


class _NotUnderstood(Exception):
    """An operation without a rule in `_apply`."""


def _apply(operation: Any, lists: list[list[_Array]], targets: int, shape: Shape | None) -> list[list[_Array]]:
    """Apply one operation to lists of arrays, one for each pattern."""
    kind = type(operation).__name__
    if kind == "MergeModulelist" and operation.dim == 0:
        return [[_Array.stacked(each)] for each in lists]
    if kind == "Concatenate":
        return [[_Array.joined([a for each in lists for a in each], operation.dim)]]
    if len(lists) == len(lists[0]) == 1:
        (array,) = lists[0]
        if kind == "Transpose":
            keep = operation.check_dims and array.shape == shape
            return lists if keep else [[array.transposed(operation.dim0, operation.dim1)]]
        if kind == "Chunk" and operation.num_shards_attribute is None and not array.shape[operation.dim] % targets:
            return [[chunk] for chunk in array.chunks(operation.dim, targets)]
    raise _NotUnderstood(kind)


@dataclass(frozen=True)
class _Array:
    """A tensor made of stored weights."""

    shape: Shape
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, stored: str, shape: Shape) -> _Array:
        return cls(shape, (Part(stored, whole_place(shape), whole_place(shape)),))

    @classmethod
    def stacked(cls, arrays: Sequence[_Array]) -> _Array:
        parts = (replace(p, place=(i, *p.place)) for i, array in enumerate(arrays) for p in array.parts)
        return cls((len(arrays), *arrays[0].shape), tuple(parts))

    @classmethod
    def joined(cls, arrays: Sequence[_Array], axis: int) -> _Array:
        parts, offset = list[Part](), 0
        for array in arrays:
            parts += (replace(p, place=_moved(p.place, axis, offset)) for p in array.parts)
            offset += array.shape[axis]
        return cls(_set(arrays[0].shape, axis, offset), tuple(parts))

    def transposed(self, first: int, second: int) -> _Array:
        order = list(range(len(self.shape)))
        order[first], order[second] = second, first
        parts = tuple(
            replace(p, place=tuple(p.place[i] for i in order), swapped=p.swapped != _swaps(p.place, order))
            for p in self.parts
        )
        return _Array(tuple(self.shape[i] for i in order), parts)

    def chunks(self, axis: int, count: int) -> list[_Array]:
        if len(self.parts) != 1 or self.parts[0].swapped or not self.parts[0].fills(self.shape):
            raise _NotUnderstood("Chunk")
        size = self.shape[axis] // count
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        sources = [_set(self.parts[0].source, axis, slice(i * size, (i + 1) * size)) for i in range(count)]
        stored = self.parts[0].stored
        return [_Array(shape, (Part(stored, source, whole_place(shape)),)) for source in sources]


def whole_place(shape: Shape) -> tuple[slice, ...]:
    """Return the index of a whole tensor."""
    return tuple(slice(0, length) for length in shape)


def _swaps(place: Place, order: Sequence[int]) -> bool:
    """Return True if a new order exchanges a part's last two axes."""
    axes = [i for i in order if isinstance(place[i], slice)]
    kept, swapped = sorted(axes), [*sorted(axes)[:-2], *sorted(axes)[:-3:-1]]
    if axes not in (kept, swapped):
        raise _NotUnderstood("Transpose")
    return axes != kept


def _moved(place: Place, axis: int, offset: int) -> Place:
    old = place[axis]
    return _set(place, axis, slice(old.start + offset, old.stop + offset) if isinstance(old, slice) else old + offset)


def _set(place: Any, axis: int, value: int | slice) -> Any:
    return (*place[:axis], value, *place[axis + 1 :])
