"""Matches an adapter's names and shapes with stored weights."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config, text_config
from hf_contmerge.models.weights import Weights

_WRAPPERS = {"model", "language_model", "text_model", "transformer", "base_model"}  # optional prefixes
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_TABLE = re.compile(r"(^|\.)(\w*embed\w*|wte)\.weight$")
_ROWS = 4096  # rows of a table compared at once


class StoredNames:
    """Finds a weight's stored name by its name in memory."""

    def __init__(self, base: Weights) -> None:
        self._stored = set(base.names)
        self._bare: dict[str, list[str]] = defaultdict(list)
        for name in base.names:
            self._bare[_bare(name)].append(name)

    def find(self, name: str) -> str | None:
        """Return the stored name of a weight, if any.

        Tried in order: the same name, a name with other wrappers in front, the only name with this ending. Raises
        ModelError for several matches.
        """
        if name in self._stored:
            return name
        matches = self._bare.get(_bare(name)) or [n for n in sorted(self._stored) if n.endswith(f".{name}")]
        if len(matches) > 1:
            raise ModelError(f"{name} is ambiguous: the base has {' and '.join(matches)}. Give its original base.")
        return matches[0] if matches else None


def _bare(name: str) -> str:
    parts = name.split(".")
    while parts[0] in _WRAPPERS and len(parts) > 2:
        parts = parts[1:]
    return ".".join(parts)


def is_conv1d(base: Weights, name: str, change: tuple[int, int], *, flag: bool) -> bool:
    """Return True if a linear map is stored (in, out).

    The bias decides: its length is the number of outputs. For a square weight, the biases of the base's other weights
    decide; without any bias, `flag` does.

    Args:
        base: the base's weights.
        name: the weight's stored name.
        change: the adapter's shape (out, in).
        flag: the adapter's fan_in_fan_out, which peft keeps from the last module only.
    """
    shape = base.shape(name)
    if len(shape) != 2:
        return False
    stored = set(base.names)
    if _bias(name) not in stored:
        return flag and (shape != change or shape[0] == shape[1])
    oblong = [name] if shape[0] != shape[1] else [n for n in base.names if _bias(n) in stored and _is_oblong(base, n)]
    transposed = {base.shape(_bias(n)) == base.shape(n)[1:] for n in oblong}
    return transposed.pop() if len(transposed) == 1 else flag


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias"


def _is_oblong(base: Weights, name: str) -> bool:
    shape = base.shape(name)
    return len(shape) == 2 and shape[0] != shape[1]


def match_parameters(
    shapes: Mapping[str, tuple[int, ...]], changes: Sequence[tuple[int, int]]
) -> list[tuple[str, bool]] | None:
    """Match each change (out, in) with a parameter.

    A module stores all its stacks in one order, so an oblong stack decides the order of a square one.

    Args:
        shapes: the parameters' shapes, (out, in) or stacks of either order.
        changes: the adapter's shapes (out, in).

    Returns:
        Each change's parameter, and True if stored (experts, in, out). None unless there is exactly one match.
    """
    orders = [
        order
        for order in itertools.permutations(shapes, len(changes))
        if all(c in _orders(shapes[name]) for name, c in zip(order, changes, strict=True))
    ]
    if len(orders) != 1 or len(shapes) != len(changes):
        return None
    stacks = [(shapes[name][1:], c) for name, c in zip(orders[0], changes, strict=True) if len(shapes[name]) == 3]
    transposed = {shape != c for shape, c in stacks if c[0] != c[1]}
    if stacks and len(transposed) != 1:
        return None
    return [(name, len(shapes[name]) == 3 and True in transposed) for name in orders[0]]


def _orders(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the possible changes (out, in) of a parameter's shape."""
    return (shape,) if len(shape) == 2 else (shape[1:], shape[:0:-1])


def tied_table(base: Weights) -> str | None:
    """Return the tied vocabulary table's stored name, if any."""
    values = config(base.folder) if (base.folder / "config.json").is_file() else {}
    text = text_config(values)
    tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tied is False or any(_HEAD.search(name) for name in base.names):
        return None
    vocabulary = values.get("vocab_size") or text.get("vocab_size")
    tables = [n for n in base.names if _TABLE.search(n) and len(base.shape(n)) == 2]
    tables = [n for n in tables if base.shape(n)[0] == vocabulary] or tables
    return tables[0] if len(tables) == 1 else None


def equal(ours: Tensor, theirs: Tensor) -> bool:
    """Compare the numbers of two tensors, in any types.

    Tensors of different types are compared some rows at a time, to save memory.
    """
    if ours.shape != theirs.shape:
        return False
    if ours.dtype == theirs.dtype:
        return bool(ours.equal(theirs))
    if ours.dim() == 0:
        return float(ours) == float(theirs)
    return all(bool(x.float().equal(y.float())) for x, y in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True))
