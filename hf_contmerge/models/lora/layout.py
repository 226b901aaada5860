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
from hf_contmerge.models.lora.matching import StoredNames, equal, is_conv1d, match_parameters, tied_table
from hf_contmerge.models.lora.settings import CONFIG, scaling, token_rows
from hf_contmerge.models.weights import Weights

LOG = logging.getLogger(__name__)

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_A, _B, _BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_TABLE_A, _TABLE_B, _TOKENS = "lora_embedding_A", "lora_embedding_B", "token_adapter.trainable_tokens_delta"
_PARTS = (_A, _B, _BIAS, _MAGNITUDE, _TABLE_A, _TABLE_B, _TOKENS)
_KEY = re.compile(rf"(?P<module>.+?)(?P<level>(\.base_layer)*)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_MERGE_FIRST = "Merge the adapter into its base with peft (merge_and_unload, save_pretrained); give the merged folder."

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


class Layout:
    """The changes of an adapter, by stored name of the weight.

    Raises ModelError for a tensor that is unknown, does not fit its weight, or has no weight.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], tensors: Weights, base: Weights) -> None:
        self.folder, self.settings, self.tensors, self.base = folder, settings, tensors, base
        self.names = StoredNames(base)
        self.changes: dict[str, WeightChange] = {}
        modules, wholes = self._classify_keys()
        self._resolve_tied_table(modules, wholes)
        for name, key in wholes.items():
            self._add_whole(name, key)
        for module, levels in modules.items():
            self._add_module(module, levels)

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

    def _resolve_tied_table(self, modules: dict[str, dict[int, Parts]], wholes: Parts) -> None:
        """Drop the output head's change where tied to the input table.

        Raises ModelError if the two changes differ: one stored table cannot have two values.
        """
        table = tied_table(self.base)
        if table is None:
            return
        inputs = next((key for name, key in wholes.items() if self.names.find(name) == table), None)
        head = next((n for n in (*modules, *wholes) if re.search(r"(^|\.)lm_head(\.weight)?$", n)), "lm_head")
        outputs = wholes.pop(f"{head.removesuffix('.weight')}.weight", None)
        for key in filter(None, (inputs, outputs)):
            self._require_shape(key, self.tensors.shape(key), table)
            given = [self.tensors.tensor(k) if k else self.base.tensor(table) for k in (inputs, outputs)]
            if not equal(*given):
                self._refuse_tied(key, table)
        twin = modules.pop(head.removesuffix(".weight"), None)
        module = next((m for m in modules if self.names.find(f"{m}.weight") == table), "")
        if twin and not (module and self._are_twins(module, modules[module][0], head, twin[0])):
            self._refuse_tied(next(iter(twin[min(twin)].values())), table)
        if module and not twin and _TABLE_A in modules[module][0]:
            LOG.warning(
                "%s changes %s, which is also the output head: merged, it acts on both, as after merge_and_unload; "
                "loaded as an adapter it acts on the input only",
                self.folder,
                table,
            )

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
        stored = self._stored(name, key)
        self._require_shape(key, self.tensors.shape(key), stored)
        if not equal(self.tensors.tensor(key), self.base.tensor(stored)):  # an equal table was saved, not trained
            self._add(stored, whole=key)

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
                self._fail(f"holds {parts[part]} of shape {self.tensors.shape(parts[part])}; expected a matrix")
        return parts

    def _low_rank(self, place: str, a: str, b: str, *, experts: int = 0, magnitude: str | None = None) -> LowRank:
        rank, scale = scaling(self.settings, place)
        ranks, expected = (self.tensors.shape(a)[0], self.tensors.shape(b)[1]), rank * (experts or 1)
        if ranks != (expected, expected):
            self._fail(f"has rank {ranks[0]} (A) and {ranks[1]} (B) for {place}; {CONFIG} says {expected}")
        return LowRank(a, b, rank, scale, experts=experts, magnitude=magnitude)

    def _add_linear(self, module: str, parts: Parts) -> None:
        stored = self._stored(f"{module}.weight", parts[_A])
        inner = self._low_rank(module, parts[_A], parts[_B], magnitude=parts.get(_MAGNITUDE))
        shape = (self.tensors.shape(inner.b)[0], self.tensors.shape(inner.a)[1])
        transposed = is_conv1d(self.base, stored, shape, flag=bool(self.settings.get("fan_in_fan_out")))
        self._require_shape(inner.a, shape[::-1] if transposed else shape, stored)
        self._require_magnitude(inner, shape[0], stored)
        self._add(stored, low_rank=replace(inner, transposed=transposed))
        if key := parts.get(_BIAS):
            bias = self._stored(f"{module}.bias", key)
            self._require_shape(key, self.tensors.shape(key), bias)
            self._add(bias, bias=(key, inner.scale))

    def _add_embedding(self, module: str, parts: Parts) -> None:
        stored = self._stored(f"{module}.weight", parts[_TABLE_A])
        inner = self._low_rank(module, parts[_TABLE_A], parts[_TABLE_B], magnitude=parts.get(_MAGNITUDE))
        shape = (self.tensors.shape(inner.a)[1], self.tensors.shape(inner.b)[0])
        self._require_shape(inner.a, shape, stored)
        self._require_magnitude(inner, shape[1], stored)
        self._add(stored, low_rank=replace(inner, transposed=True, embedding=True))

    def _add_rows(self, module: str, key: str) -> None:
        stored, rows = self._stored(f"{module}.weight", key), token_rows(self.settings, module)
        shape, table = self.tensors.shape(key), self.base.shape(stored)
        if shape != (len(rows), *table[1:]) or not all(0 <= row < table[0] for row in rows):
            self._fail(f"holds {key} of shape {shape}; {CONFIG} names {len(rows)} rows of {stored}, of shape {table}")
        self._add(stored, rows=(key, rows))

    def _parameters(self, module: str) -> dict[str, str]:
        """Return name in memory -> stored name of a module's target_parameters."""
        parameters = {}
        for target in self.settings.get("target_parameters") or ():
            name = f"{module}.{target.rpartition('.')[2]}"
            if f".{name}".endswith(f".{target}"):
                parameters[name] = self.names.find(name)
        if lacking := [name for name, stored in parameters.items() if stored is None]:
            raise ModelError(
                f"{self.folder} changes {lacking[0]}, but {self.base.folder} stores no tensor of this name. Experts "
                f"stored one by one cannot be matched with a stack. {_MERGE_FIRST}"
            )
        return parameters

    def _add_parameters(self, module: str, targets: Mapping[str, str], levels: Mapping[int, Parts]) -> None:
        """Add the changes of a module's target_parameters.

        Each wrapping level holds one parameter; shapes decide which.
        """
        pairs = [self._checked(module, parts, _A, _B) for _, parts in sorted(levels.items())]
        changes = [(self.tensors.shape(pair[_B])[0], self.tensors.shape(pair[_A])[1]) for pair in pairs]
        shapes = {name: self.base.shape(stored) for name, stored in targets.items()}
        matched = match_parameters(shapes, changes)
        if matched is None:
            raise ModelError(
                f"{self.folder} holds changes (out, in) {changes} of parameters of {module}, which do not fit {shapes} "
                f"in exactly one way. {_MERGE_FIRST}"
            )
        for (name, transposed), pair in zip(matched, pairs, strict=True):
            experts = shapes[name][0] if len(shapes[name]) == 3 else 0
            inner = self._low_rank(name, pair[_A], pair[_B], experts=experts)
            self._add(targets[name], low_rank=replace(inner, transposed=transposed))

    def _add(self, stored: str, **change: Any) -> None:
        if not self.base.dtype(stored).is_floating_point:
            raise ModelError(f"{stored} of {self.base.folder} is {self.base.dtype(stored)}: dequantise the base first.")
        self.changes[stored] = replace(self.changes.get(stored, WeightChange()), **change)

    def _stored(self, name: str, key: str) -> str:
        stored = self.names.find(name)
        if stored is None:
            why = "Such tensors are not supported." if "lora_" in name else "Give the adapter's base."
            raise ModelError(f"{self.folder / FILE} holds {key}, but {self.base.folder} has no weight {name}. {why}")
        return stored

    def _require_shape(self, key: str, shape: Sequence[int], stored: str) -> None:
        if tuple(shape) != self.base.shape(stored):
            raise ModelError(
                f"{key} in {self.folder / FILE} makes a change of shape {tuple(shape)}; {stored} of {self.base.folder} "
                f"has shape {self.base.shape(stored)}. The adapter has another base, or its vocabulary was resized."
            )

    def _require_magnitude(self, inner: LowRank, outputs: int, stored: str) -> None:
        if inner.magnitude and self.tensors.shape(inner.magnitude) != (outputs,):
            shape = self.tensors.shape(inner.magnitude)
            self._fail(f"holds {inner.magnitude} of shape {shape}; {stored} needs {(outputs,)}")

    def _refuse_tied(self, key: str, table: str) -> NoReturn:
        raise ModelError(
            f"{self.folder / FILE} changes two tied tables differently ({key}); {self.base.folder} stores both as one "
            f"({table}, tie_word_embeddings). Train with ensure_weight_tying=True, or without the vocabulary tables."
        )

    def _fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.folder / FILE} {what}. Save or fetch the adapter again, with its {CONFIG}.")
