"""Maps tensors of a peft LoRA folder to base weights.

Keys are names of modules in memory, behind `base_model.model.`:

    MODULE.lora_A.weight (r, in)  MODULE.lora_B.weight (out, r)      a linear map; with lora_B.bias (out) on its bias
    MODULE.lora_embedding_A (r, vocabulary)  lora_embedding_B (d, r) an embedding table
    MODULE.lora_magnitude_vector                                     DoRA, next to either of these
    MODULE.token_adapter.trainable_tokens_delta (rows, d)            new values of some rows
    MODULE[.base_layer]*.lora_A.weight (r * experts, in) ...         target_parameters: one level per parameter
    anything else                                                    a whole weight of the base

Checked against the headers of both files. Data is read only for whole tables, to compare them with the base's.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hf_contmerge.errors import ModelError
from hf_contmerge.models.lora.matching import HeldNames, Tie
from hf_contmerge.models.lora.settings import CONFIG, scaling, token_rows
from hf_contmerge.models.memory import Held, Part
from hf_contmerge.models.weights import Weights, equal

LOG = logging.getLogger(__name__)

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_A, _B, _BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_TABLE_A, _TABLE_B, _TOKENS = "lora_embedding_A", "lora_embedding_B", "token_adapter.trainable_tokens_delta"
_PARTS = (_A, _B, _BIAS, _MAGNITUDE, _TABLE_A, _TABLE_B, _TOKENS)
_KEY = re.compile(rf"(?P<module>.+?)(?P<level>(\.base_layer)*)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_INNER_FIRST = "Merge that adapter into the base first, and give the result as the base."
_MERGE_FIRST = "Merge the adapter into its base with peft (merge_and_unload, save_pretrained); give the merged folder."
_TIED = {
    False: "merged, it acts on both, as after merge_and_unload; loaded as an adapter it acts on the input only",
    True: "it is added once, as in the adapter loaded by peft; peft's merge_and_unload adds it twice",
}

Parts = dict[str, str]  # part -> key in the file


@dataclass(frozen=True)
class LowRank:
    """The change scale * B @ A of one weight.

    Attributes:
        a: key of A.
        b: key of B.
        rank: rank of B @ A.
        scale: factor of B @ A.
        transposed: the weight is stored (in, out), as Conv1D and embedding tables are.
        embedding: the weight is an embedding table.
        experts: slices of a 3-D stack; 0 for a matrix.
        magnitude: key of DoRA's vector.
    """

    a: str
    b: str
    rank: int
    scale: float
    transposed: bool = False
    embedding: bool = False
    experts: int = 0
    magnitude: str | None = None


@dataclass(frozen=True)
class WeightChange:
    """The adapter's change of one weight.

    Applied in this order: take `whole`, set `rows`, add `bias`, add `low_rank`.

    Attributes:
        whole: a key.
        rows: a key and the rows it replaces.
        bias: a key and its factor.
        low_rank: a product of two factors.
    """

    whole: str | None = None
    rows: tuple[str, tuple[int, ...]] | None = None
    bias: tuple[str, float] | None = None
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class StoredChange:
    """A tensor's change in memory, and its part of a stored weight.

    `whole`: the part is all of the stored weight.
    """

    change: WeightChange
    part: Part
    whole: bool


class Layout:
    """The changes of an adapter, by stored name of the weight.

    Raises ModelError for a tensor that is unknown, does not fit its weight, or has no weight.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], tensors: Weights, base: Weights) -> None:
        self.folder, self.settings, self.tensors, self.base = folder, settings, tensors, base
        self.names = HeldNames(base)
        self._held: dict[str, Held] = {}
        self._changed: dict[str, WeightChange] = {}
        modules, wholes = self._classify_keys()
        self._resolve_ties(modules, wholes)
        for name, key in wholes.items():
            self._add_whole(name, key)
        for module, levels in modules.items():
            self._add_module(module, levels)
        self.changes = self._by_stored_name()

    def _classify_keys(self) -> tuple[dict[str, dict[int, Parts]], Parts]:
        """Return module -> level -> parts, and the keys of whole weights."""
        modules: dict[str, dict[int, Parts]] = defaultdict(lambda: defaultdict(dict))
        wholes: Parts = {}
        for key in self.tensors.names:
            if not key.startswith(PREFIX):
                self._fail(f"holds the unknown key {key}; expected keys that begin with {PREFIX}")
            if not self.tensors.dtype(key).is_floating_point:
                self._fail(f"holds {key} as {self.tensors.dtype(key)}, expected a floating type")
            name = key.removeprefix(PREFIX)
            if name.startswith(PREFIX):
                self._fail(f"holds {key}: it was trained on top of another adapter. {_INNER_FIRST} Unlike this one,")
            if match := _KEY.fullmatch(name):
                modules[match["module"]][match["level"].count(".")][match["part"]] = key
            else:
                wholes[re.sub(r"(\.token_adapter)?\.base_layer(?=\.\w+$)", "", name)] = key
        if not modules:
            self._fail("holds no LoRA tensors")
        return modules, self._without_copies(wholes)

    def _without_copies(self, wholes: Parts) -> Parts:
        """Drop copies of saved modules (save_embedding_layers) and of their originals."""
        kept = dict(wholes)
        for name, key in wholes.items():
            plain = wholes.get(re.sub(r"\.(modules_to_save|original_module)(?=\.\w+$)", "", name))
            trained = ".modules_to_save." in name
            if plain not in (None, key) and (
                not trained or equal(self.tensors.tensor(key), self.tensors.tensor(plain))
            ):
                del kept[name]
        return kept

    def _resolve_ties(self, modules: dict[str, dict[int, Parts]], wholes: Parts) -> None:
        """Keep one change of each tied tensor.

        Raises ModelError if its names change differently: one stored tensor cannot have two values.
        """
        ties: dict[tuple[str, ...], dict[str, Tie]] = defaultdict(dict)
        for name in [*wholes, *(f"{module}.weight" for module in modules)]:
            if tie := self.names.tie(name):
                ties[tie.members][name] = tie
        for members, names in ties.items():
            self._resolve_tied_wholes(members, {n: tie.member for n, tie in names.items() if n in wholes}, wholes)
            changed = {n.removesuffix(".weight"): tie for n, tie in names.items()}
            self._resolve_tied_modules({m: tie for m, tie in changed.items() if m in modules}, modules)

    def _resolve_tied_wholes(self, members: tuple[str, ...], names: Mapping[str, str], wholes: Parts) -> None:
        """Keep one whole value if all names of a tied tensor agree."""
        for name in names:
            tensor = self._find(name, wholes[name])
            self._require_shape(wholes[name], self.tensors.shape(wholes[name]), tensor)
            others = [self.tensors.tensor(wholes[n]) for n in names]
            if set(names.values()) != set(members):
                others.append(self.base.tensor(tensor.parts[0].stored))
            if not all(equal(self.tensors.tensor(wholes[name]), other) for other in others):
                self._refuse_tied(wholes[name], tensor)
        for name in list(names)[1:]:
            del wholes[name]

    def _resolve_tied_modules(self, ties: Mapping[str, Tie], modules: dict[str, dict[int, Parts]]) -> None:
        """Keep the input table's change, if the output head's is the same."""
        table = next((module for module, tie in ties.items() if tie.member == tie.table), "")
        for module, tie in ties.items():
            parts = modules[module][min(modules[module])]
            if module != table and not (table and self._are_twins(table, modules[table][0], module, parts)):
                self._refuse_tied(next(iter(parts.values())), self._find(f"{module}.weight", ""))
            if module != table:
                del modules[module]
            elif len(tie.members) > max(2, len(ties)):
                self._refuse_tied(next(iter(parts.values())), self._find(f"{module}.weight", ""))
        if table and _TABLE_A in modules[table][0]:
            LOG.warning("%s changes %s, which is also the output head: %s", self.folder, table, _TIED[len(ties) > 1])

    def _are_twins(self, module: str, table: Parts, head: str, parts: Parts) -> bool:
        """Return True if head and table change alike.

        They do with ensure_weight_tying.
        """
        read = self.tensors.tensor
        if set(parts) == {_TOKENS} == set(table):
            rows = token_rows(self.settings, module)
            same_rows = token_rows(self.settings, head.removesuffix(".weight")) in ((), rows)
            return same_rows and equal(read(parts[_TOKENS]), read(table[_TOKENS]))
        if set(parts) != {_A, _B} or not {_TABLE_A, _TABLE_B} <= set(table):
            return False
        pairs = ((parts[_A], table[_TABLE_B]), (parts[_B], table[_TABLE_A]))
        same = all(equal(read(ours), read(theirs).T) for ours, theirs in pairs)
        return same and scaling(self.settings, module) == scaling(self.settings, head)

    def _add_whole(self, name: str, key: str) -> None:
        tensor = self._find(name, key)
        self._require_shape(key, self.tensors.shape(key), tensor)
        if not all(self._is_base(key, part) for part in tensor.parts):  # an equal table was saved, not trained
            self._add(tensor, whole=key)

    def _is_base(self, key: str, part: Part) -> bool:
        """Return True if a whole value equals the base's."""
        given, stored = self.tensors.tensor(key)[part.place], self.base.tensor(part.stored)[part.source]
        return equal(given.mT if part.swapped else given, stored)

    def _add_module(self, module: str, levels: Mapping[int, Parts]) -> None:
        if parameters := self._parameters(module):
            self._add_parameters(module, parameters, levels)
            return
        if set(levels) != {0}:
            self._fail(f"wraps {module} {max(levels) + 1} times, but target_parameters in {CONFIG} names none of it")
        parts = dict(levels[0])
        if key := parts.pop(_TOKENS, None):
            self._add_rows(module, key)
        if _TABLE_A in parts or _TABLE_B in parts:
            self._add_embedding(module, self._checked(module, parts, _TABLE_A, _TABLE_B))
        elif parts:
            self._add_linear(module, self._checked(module, parts, _A, _B))

    def _checked(self, module: str, parts: Parts, a: str, b: str) -> Parts:
        """Return a module's parts, if complete and expected."""
        needed = {a, b} | ({_MAGNITUDE} if self.settings.get("use_dora") else set())
        allowed = needed | ({_BIAS} if b == _B else set())
        if lacking := needed - set(parts):
            self._fail(f"lacks {min(lacking)} of {module}")
        if extra := set(parts) - allowed:
            self._fail(f"holds {parts[min(extra)]}, which contradicts {CONFIG} for {module}")
        for part in (a, b):
            if len(self.tensors.shape(parts[part])) != 2:
                self._fail(
                    f"holds {parts[part]} of shape {self.tensors.shape(parts[part])}; expected a matrix, since LoRA on "
                    "convolutions is not supported"
                )
        return parts

    def _low_rank(self, place: str, a: str, b: str, *, experts: int = 0, magnitude: str | None = None) -> LowRank:
        rank, scale = scaling(self.settings, place)
        ranks, expected = (self.tensors.shape(a)[0], self.tensors.shape(b)[1]), rank * (experts or 1)
        if ranks != (expected, expected):
            self._fail(f"has rank {ranks[0]} (A) and {ranks[1]} (B) for {place}; {CONFIG} says {expected}")
        return LowRank(a, b, rank, scale, experts=experts, magnitude=magnitude)

    def _add_linear(self, module: str, parts: Parts) -> None:
        tensor = self._find(f"{module}.weight", parts[_A])
        self._require_plain_expert(tensor, parts[_A])
        inner = self._low_rank(module, parts[_A], parts[_B], magnitude=parts.get(_MAGNITUDE))
        shape = (self.tensors.shape(inner.b)[0], self.tensors.shape(inner.a)[1])
        transposed = self.names.is_conv1d(tensor, shape, flag=bool(self.settings.get("fan_in_fan_out")))
        self._require_shape(inner.a, shape[::-1] if transposed else shape, tensor)
        self._require_magnitude(inner, shape[0], tensor)
        self._add(tensor, low_rank=replace(inner, transposed=transposed))
        if key := parts.get(_BIAS):
            bias = self._find(f"{module}.bias", key)
            self._require_shape(key, self.tensors.shape(key), bias)
            self._add(bias, bias=(key, inner.scale))

    def _require_plain_expert(self, tensor: Held, key: str) -> None:
        """Refuse scalings changed by peft for experts adapted one by one."""
        words = [word for word in ("use_rslora", "rank_pattern", "alpha_pattern") if self.settings.get(word)]
        if words and self.names.is_stacked(tensor):
            self._fail(
                f"holds {key}, an expert adapted alone by an older version, with {words[0]}, whose scaling today's "
                f"peft changes. {_MERGE_FIRST} Otherwise"
            )

    def _add_embedding(self, module: str, parts: Parts) -> None:
        tensor = self._find(f"{module}.weight", parts[_TABLE_A])
        inner = self._low_rank(module, parts[_TABLE_A], parts[_TABLE_B], magnitude=parts.get(_MAGNITUDE))
        shape = (self.tensors.shape(inner.a)[1], self.tensors.shape(inner.b)[0])
        self._require_shape(inner.a, shape, tensor)
        self._require_magnitude(inner, shape[1], tensor)
        self._add(tensor, low_rank=replace(inner, transposed=True, embedding=True))

    def _add_rows(self, module: str, key: str) -> None:
        tensor, rows = self._find(f"{module}.weight", key), token_rows(self.settings, module)
        shape, table = self.tensors.shape(key), tensor.shape
        if shape != (len(rows), *table[1:]) or not all(0 <= row < table[0] for row in rows):
            self._fail(
                f"holds {key} of shape {shape}; {CONFIG} names {len(rows)} rows of {tensor.name}, of shape {table}"
            )
        self._add(tensor, rows=(key, rows))

    def _parameters(self, module: str) -> list[str]:
        """Return a module's target_parameters, in its order."""
        targets = [f".{target}" for target in self.settings.get("target_parameters") or ()]
        return [name for name in self.names.parameters(module) if f".{name}".endswith(tuple(targets))]

    def _add_parameters(self, module: str, names: Sequence[str], levels: Mapping[int, Parts]) -> None:
        """Add the changes of a module's target_parameters.

        Each wrapping level holds one parameter, the first one innermost.
        """
        if set(levels) != set(range(len(names))):
            self._fail(f"holds {len(levels)} changes of {module}, whose target_parameters are {', '.join(names)}")
        for level, name in enumerate(reversed(names)):
            self._add_parameter(name, self._checked(module, levels[level], _A, _B))

    def _add_parameter(self, name: str, parts: Parts) -> None:
        tensor = self._find(name, parts[_A])
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 0
        inner = self._low_rank(name, parts[_A], parts[_B], experts=experts)
        transposed = bool(experts) and self.names.is_in_out(tensor)
        shape = (self.tensors.shape(inner.b)[0], self.tensors.shape(inner.a)[1])
        leading = (experts,) if experts else ()
        self._require_shape(inner.a, (*leading, *(shape[::-1] if transposed else shape)), tensor)
        self._add(tensor, low_rank=replace(inner, transposed=transposed))

    def _add(self, tensor: Held, **change: Any) -> None:
        for part in tensor.parts:
            if not self.base.dtype(part.stored).is_floating_point:
                kind = self.base.dtype(part.stored)
                raise ModelError(f"{part.stored} of {self.base.folder} is {kind}: dequantise the base first.")
        self._held[tensor.name] = tensor
        self._changed[tensor.name] = replace(self._changed.get(tensor.name, WeightChange()), **change)

    def _by_stored_name(self) -> dict[str, tuple[StoredChange, ...]]:
        """Return stored name -> its changes, in separate parts of it."""
        changes: dict[str, tuple[StoredChange, ...]] = defaultdict(tuple)
        for name, change in self._changed.items():
            tensor = self._held[name]
            for part in tensor.parts:
                self._require_part(change, part, tensor)
                if any(part.source == other.part.source for other in changes[part.stored]):
                    self._fail(f"changes {part.stored} twice, once as {name}")
                only_whole = change.whole if change == WeightChange(whole=change.whole) else None
                if not (only_whole and self._is_base(only_whole, part)):
                    changes[part.stored] = (
                        *changes[part.stored],
                        StoredChange(change, part, part.covers(self.base.shape(part.stored))),
                    )
        return {stored: parts for stored, parts in changes.items() if parts}

    def _require_part(self, change: WeightChange, part: Part, tensor: Held) -> None:
        whole = change.rows or (change.low_rank and change.low_rank.magnitude)
        if whole and not part.fills(tensor.shape):
            self._fail(
                f"changes all of {tensor.name} at once, but {part.stored} of {self.base.folder} is a slice of it"
            )

    def _find(self, name: str, key: str) -> Held:
        tensor = self.names.find(name)
        if tensor is None:
            why = "Such tensors are not supported." if "lora_" in name else "Give the adapter's base."
            why = f"lora_bias needs a bias to be added to. {why}" if key.endswith(_BIAS) else why
            raise ModelError(f"{self.folder / FILE} holds {key}, but {self.base.folder} has no weight {name}. {why}")
        if not tensor.parts:
            raise ModelError(
                f"{self.folder / FILE} holds {key}, but transformers makes {name} from stored weights in a way "
                f"({tensor.form}) that is not supported. {_MERGE_FIRST}"
            )
        return tensor

    def _require_shape(self, key: str, shape: Sequence[int], tensor: Held) -> None:
        if tuple(shape) != tensor.shape:
            raise ModelError(
                f"{key} in {self.folder / FILE} makes a change of shape {tuple(shape)}; {tensor.name} of "
                f"{self.base.folder} has shape {tensor.shape}. The adapter has another base, or its vocabulary was "
                "resized."
            )

    def _require_magnitude(self, inner: LowRank, outputs: int, tensor: Held) -> None:
        if inner.magnitude and self.tensors.shape(inner.magnitude) != (outputs,):
            shape = self.tensors.shape(inner.magnitude)
            self._fail(f"holds {inner.magnitude} of shape {shape}; {tensor.name} needs {(outputs,)}")

    def _refuse_tied(self, key: str, tensor: Held) -> NoReturn:
        raise ModelError(
            f"{self.folder / FILE} changes two tied tables differently ({key}); {self.base.folder} stores both as one "
            f"({tensor.parts[0].stored}, tie_word_embeddings). Train with ensure_weight_tying=True, or without the "
            "vocabulary tables."
        )

    def _fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.folder / FILE} {what}. Save or fetch the adapter again, with its {CONFIG}.")
