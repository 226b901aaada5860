"""Tells a model's weights from the other tensors of its files.

`from_pretrained` ignores old buffers (rotary frequencies, masks), reads a tied table that is stored twice as one, and
knows weights by several names. Where names alone leave no doubt, transformers is not asked: its import takes seconds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_contmerge.models.architecture import Architecture, Place, find_architecture
from hf_contmerge.models.config import config, setting, vocabulary_size

Shapes = Mapping[str, tuple[int, ...]]
Equal = Callable[[str, str], bool]
"""Says if two stored tensors hold the same values."""

_BUFFER = re.compile(
    r"(^|\.)((original_)?inv_freq|position_ids|token_type_ids|masked_bias|relative_position_index|embed_positions_sin"
    r"|sin_cached|cos_cached)$"
)
_MASK = re.compile(r"(^|\.)\w*att(n|ention)\.bias$")
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
_HEAD = "lm_head.weight"


class Reading(NamedTuple):
    """Decides about a folder's tensors as transformers does when it loads."""

    places: Mapping[str, Place]
    """Stored name -> place, of the tensors that it loads."""
    shared: Mapping[str, str]
    """Name in memory of a tied tensor that is not stored -> stored name of the one it shares."""


def no_weights(folder: Path, shapes: Shapes, equal: Equal) -> set[str]:
    """Return stored tensors other than weights: old buffers, second copies."""
    buffers = {name for name, shape in shapes.items() if is_buffer(name, shape)}
    if not buffers and not _may_repeat(config(folder), shapes):
        return set()
    architecture = known_architecture(folder, shapes)
    if architecture is None:
        return buffers | _repeated_head(folder, shapes, equal)
    places = architecture.places(shapes)
    return {name for name in buffers if name not in places} | _repeated(architecture, places, equal)[0]


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Say if a tensor is called like a buffer of older models."""
    return bool(_BUFFER.search(name) or (_MASK.search(name) and len(shape) == 4))


def read(architecture: Architecture, shapes: Shapes, equal: Equal) -> Reading:
    """Match stored tensors with the weights in memory."""
    places = architecture.places(shapes)
    repeated, shared = _repeated(architecture, places, equal)
    return Reading({name: place for name, place in places.items() if name not in repeated}, shared)


def missing(folder: Path, shapes: Shapes) -> list[str]:
    """Return the parameters to be initialised at random, as far as known."""
    if not _is_uneven(config(folder), shapes):
        return []
    architecture = known_architecture(folder, shapes)
    return architecture.missing(architecture.places(shapes).values()) if architecture else []


def known_architecture(folder: Path, names: Iterable[str], *, tied: bool | None = None) -> Architecture | None:
    """Return a folder's architecture, None for one with custom code."""
    architecture = find_architecture(folder, tied=tied)
    if architecture and "auto_map" in config(folder) and architecture.missing(architecture.places(names).values()):
        return None
    return architecture


def tied_flag(folder: Path) -> bool | None:
    """Return `tie_word_embeddings` of config.json; None if it is left to the architecture."""
    return setting(config(folder), "tie_word_embeddings")


def _may_repeat(values: Mapping[str, Any], shapes: Shapes) -> bool:
    """Say if tables of the vocabulary could be one table stored twice."""
    vocabulary = vocabulary_size(values)
    tables = [shape for shape in shapes.values() if len(shape) in (1, 2) and shape[0] == vocabulary]
    untied = setting(values, "tie_word_embeddings") is False
    return len(tables) > (2 if untied else 1)


def _repeated(architecture: Architecture, places: Mapping[str, Place], equal: Equal) -> tuple[set[str], dict[str, str]]:
    """Return second copies of tied tensors, and names -> the shared one."""
    stored = {place.key: name for name, place in places.items()}
    copies, shared = set[str](), dict[str, str]()
    for group in architecture.ties:
        names = [stored[key] for key in group if key in stored]
        repeated = {name for name in names[1:] if equal(name, names[0])}
        shared |= {key: names[0] for key in group if names and stored.get(key, "") in {"", *repeated}}
        copies |= repeated
    return copies, shared


def _repeated_head(folder: Path, shapes: Shapes, equal: Equal) -> set[str]:
    """Return an unknown model's head, if it repeats the tied table."""
    tables = [n for n, shape in shapes.items() if n != _HEAD and shape == shapes.get(_HEAD)]
    return {_HEAD} if tied_flag(folder) and any(equal(_HEAD, table) for table in tables) else set()


def _is_uneven(values: Mapping[str, Any], shapes: Shapes) -> bool:
    """Say if a stack's layers differ, or an untied head is missing."""
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in shapes:
        if match := _LAYER.match(name):
            layers[match[1], match[2]].add(match[3])
    stacks: dict[str, set[frozenset[str]]] = defaultdict(set)
    for (stack, _), names in layers.items():
        stacks[stack].add(frozenset(names))
    if any(len(kinds) > 1 for kinds in stacks.values()) or not layers:
        return True
    vocabulary = vocabulary_size(values)
    tables = [shape for shape in shapes.values() if len(shape) == 2 and shape[0] == vocabulary]
    untied = setting(values, "tie_word_embeddings") is False
    return len(tables) != (2 if untied else 1)
