"""Matches an adapter's names and shapes with stored weights."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config, setting, vocabulary_size
from hf_contmerge.models.memory import Held, Part, in_memory, whole_place
from hf_contmerge.models.weights import Weights

_WRAPPERS = {"model", "language_model", "text_model", "transformer", "base_model"}  # optional prefixes
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_TABLE = re.compile(r"(^|\.)(\w*embed\w*|wte)\.weight$")
_OUTPUT = "lm_head.weight"


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


class HeldNames:
    """Finds the tensors named by an adapter.

    Its names are those of a model in memory: today's, an older version's, or behind other wrappers.
    """

    def __init__(self, base: Weights) -> None:
        self._base, self._stored, self._memory = base, StoredNames(base), in_memory(base)
        table = None if self._memory.held else tied_table(base)
        self._ties = dict.fromkeys((table, _OUTPUT), (table, _OUTPUT)) if table else self._memory.ties

    def find(self, name: str) -> Held | None:
        """Return a tensor, None without a weight. Raises ModelError for several matches."""
        for candidate in dict.fromkeys((name, self._memory.rename(name))):
            if tensor := self._filled(candidate):
                return tensor
        stored = self._stored.find(name)
        return self._as_stored(stored) if stored else None

    def _filled(self, name: str) -> Held | None:
        tensor = self._memory.held.get(name)
        if tensor is None or tensor.parts or tensor.form:
            return tensor
        twins = [self._memory.held[twin] for twin in self._ties.get(name, ()) if self._memory.held[twin].parts]
        return replace(twins[0], name=name) if len(twins) == 1 else None

    def _as_stored(self, stored: str) -> Held:
        shape = self._base.shape(stored)
        return self._memory.tensor_of(stored) or Held(
            stored, shape, (Part(stored, whole_place(shape), whole_place(shape)),)
        )

    def tie(self, name: str) -> Tie | None:
        """Return a weight's tie; None if its names are stored apart."""
        tensor = self.find(name)
        member = tensor.name if tensor else _OUTPUT if re.search(r"(^|\.)lm_head\.weight$", name) else name
        members = self._ties.get(member, ())
        stored = [m for m in members if not self._memory.held or self._memory.held[m].parts]
        if not members or (self._memory.held and len(stored) != 1):
            return None
        table = next((m for m in members if m in self._memory.tables), members[0])
        return Tie(member, table, members)

    def parameters(self, module: str) -> list[str]:
        """Return the names of a module's tensors, in its order."""
        return self._memory.parameters(module)

    def is_stacked(self, tensor: Held) -> bool:
        """Return True for a slice of a stack in memory."""
        return self._memory.is_stacked(tensor.name)

    def is_in_out(self, tensor: Held) -> bool:
        """Return True for a stack (experts, in, out)."""
        return tensor.name.rpartition(".")[0] in self._memory.in_out

    def is_conv1d(self, tensor: Held, change: tuple[int, int], *, flag: bool) -> bool:
        """Return True for a linear map (in, out).

        `change` and `flag` decide if its class is unknown.
        """
        if tensor.name in self._memory.held:
            return tensor.name in self._memory.conv1d
        return is_conv1d(self._base, tensor.parts[0].stored, change, flag=flag)


@dataclass(frozen=True)
class Tie:
    """Names of one tensor.

    `member`: the name asked for. `table`: the input embedding.
    """

    member: str
    table: str
    members: tuple[str, ...]


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


def tied_table(base: Weights) -> str | None:
    """Return the tied vocabulary table's stored name, if any."""
    values = config(base.folder) if (base.folder / "config.json").is_file() else {}
    if setting(values, "tie_word_embeddings") is False or any(_HEAD.search(name) for name in base.names):
        return None
    vocabulary = vocabulary_size(values)
    tables = [n for n in base.names if _TABLE.search(n) and len(base.shape(n)) == 2]
    tables = [n for n in tables if base.shape(n)[0] == vocabulary] or tables
    return tables[0] if len(tables) == 1 else None
