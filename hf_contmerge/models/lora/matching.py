"""What an adapter must know of its base's weights: their stored names, their orientation, tied tables."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config, text_config
from hf_contmerge.models.weights import Weights

_WRAPPERS = {"model", "language_model", "text_model", "transformer", "base_model"}  # prefixes that come and go
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_TABLE = re.compile(r"(^|\.)(\w*embed\w*|wte)\.weight$")
_ROWS = 4096  # of a table, compared at a time


class Names:
    """Finds the stored name of a weight that is known by its name in memory."""

    def __init__(self, base: Weights) -> None:
        self._stored = set(base.names)
        self._bare: dict[str, list[str]] = defaultdict(list)
        for name in base.names:
            self._bare[_bare(name)].append(name)

    def find(self, name: str) -> str | None:
        """Return the same name, else the one that differs by wrappers in front, else the only one that ends in it.

        Raises ModelError if more than one does.
        """
        if name in self._stored:
            return name
        found = self._bare.get(_bare(name)) or [n for n in sorted(self._stored) if n.endswith(f".{name}")]
        if len(found) > 1:
            raise ModelError(f"The adapter's {name} may be {' or '.join(found)} of the base: none has that exact name.")
        return found[0] if found else None


def _bare(name: str) -> str:
    parts = name.split(".")
    while parts[0] in _WRAPPERS and len(parts) > 2:
        parts = parts[1:]
    return ".".join(parts)


def is_conv1d(base: Weights, name: str, change: tuple[int, int], *, flag: bool) -> bool:
    """Say whether a linear map's weight is stored (in, out). `change`: the adapter's (out, in).

    Its bias tells, which is as long as the outputs; for a square weight, the biases of the base's other weights; where
    there is none, `flag`: the adapter's fan_in_fan_out, which peft leaves as the last module had it.
    """
    shape = base.shape(name)
    if len(shape) != 2:
        return False
    stored = set(base.names)
    if _bias(name) not in stored:
        return flag and (shape != change or shape[0] == shape[1])
    oblong = [name] if shape[0] != shape[1] else [n for n in base.names if _bias(n) in stored and _is_oblong(base, n)]
    found = {base.shape(_bias(n)) == base.shape(n)[1:] for n in oblong}
    return found.pop() if len(found) == 1 else flag


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias"


def _is_oblong(base: Weights, name: str) -> bool:
    shape = base.shape(name)
    return len(shape) == 2 and shape[0] != shape[1]


def match_parameters(
    shapes: Mapping[str, tuple[int, ...]], changes: Sequence[tuple[int, int]]
) -> list[tuple[str, bool]] | None:
    """Return for each change (out, in) the parameter that it fits, and whether that is stored (experts, in, out).

    `shapes`: of the parameters, (out, in) or stacks of either order. A module stores all its stacks in one order, so an
    oblong one tells that of a square one. None unless there is exactly one way.
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
    """Return which changes (out, in) a parameter of that shape may have."""
    return (shape,) if len(shape) == 2 else (shape[1:], shape[:0:-1])


def tied_table(base: Weights) -> str | None:
    """Return the stored name of the table that is both the input embedding and the output head, if there is one."""
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
    """Say whether two tensors hold the same numbers, in whatever floating types. Memory holds some rows of each."""
    if ours.shape != theirs.shape:
        return False
    if ours.dtype == theirs.dtype:
        return bool(ours.equal(theirs))
    if ours.dim() == 0:
        return float(ours) == float(theirs)
    return all(bool(x.float().equal(y.float())) for x, y in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True))
