"""Writes low-rank changes as a peft LoRA folder.

The stock `PeftModel.from_pretrained(base, folder)` loads it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.lora.layout import FILE, PREFIX
from hf_contmerge.models.lora.settings import CONFIG
from hf_contmerge.models.weights import header_bytes, tensor_bytes

Factors = tuple[Tensor, Tensor]

_HEAD = "lm_head.weight"
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def write_adapter(
    out: Path,
    factors: Mapping[str, Factors] | Iterable[tuple[str, Factors]],
    *,
    base_model: str,
    whole: Mapping[str, Tensor] | None = None,
    embeddings: Collection[str] = (),
    conv1d: Collection[str] = (),
    tied: str | None = None,
    levels: Mapping[str, int] | None = None,
) -> None:
    """Write an adapter for base + left @ right.

    Ranks may differ between modules; every scaling is 1.

    Args:
        out: the folder; created if missing.
        factors: weight's name in memory (MODULE.weight) -> left (m, r) and right (r, n), float32. Only one pair of an
            iterator is in memory at a time. Pairs of rank 0 are left out.
        base_model: name of the base in the adapter: a Hub id or a folder.
        whole: new values of weights with other changes. They become `modules_to_save`, so give all tensors of a module.
            The bias of a module in `factors` may be given alone.
        embeddings: names of embedding tables.
        conv1d: names of linear maps stored (in, out).
        tied: the table shared by input embedding and output head, if any. Its change must be in `whole`: peft applies a
            LoRA on it to one of the two, or twice when merged.
        levels: name of a stack of matrices in memory -> the number of the module's later stacks. Its left is
            (experts, out, r), its right (experts, r, in), with one rank; it becomes one of the `target_parameters`.

    Raises:
        ModelError: no change to write, which peft could not load; or a name is not a module's weight.
    """
    pairs = cast(Iterable[tuple[str, Factors]], factors.items() if isinstance(factors, Mapping) else factors)
    out.mkdir(parents=True, exist_ok=True)
    ranks, stacks = dict[str, int](), dict[str, int]()
    with tempfile.TemporaryFile(dir=out) as data:
        file = _Tensors(data)
        for name, (left, right) in pairs:
            if left.ndim == 3:
                stacks[name] = left.shape[2]
                level = (levels or {})[name]
                file.add_all(f"{PREFIX}{name.rpartition('.')[0]}{'.base_layer' * level}", _stacked(left, right))
            elif left.shape[1]:
                ranks[module := _module(name)] = left.shape[1]
                parts = _parts(left, right, table=name in embeddings, swapped=name in conv1d)
                file.add_all(f"{PREFIX}{module}", parts)
        if not ranks and not stacks:
            raise ModelError(
                f"No low-rank change to write to {out}: all matrices of the merged model equal the base. "
                "Export the whole model."
            )
        saved = _add_whole(file, whole or {}, ranks, tied)
        file.finish(out / FILE)
    settings = _settings(ranks | stacks, saved, base_model, lora_bias=any(f"{m}.bias" in (whole or {}) for m in ranks))
    settings |= {"target_modules": sorted(ranks), "target_parameters": sorted(stacks) or None}
    settings["fan_in_fan_out"] = bool(conv1d)
    settings["ensure_weight_tying"] = tied in (whole or {})
    (out / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _parts(left: Tensor, right: Tensor, *, table: bool, swapped: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield peft's A (r, in) and B (out, r).

    B @ A is left @ right, or its transpose for weights stored (in, out).
    """
    if table:
        yield from (("lora_embedding_A", left.T), ("lora_embedding_B", right.T))
    else:
        a, b = (left.T, right.T) if swapped else (right, left)
        yield from (("lora_A.weight", a), ("lora_B.weight", b))


def _stacked(left: Tensor, right: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield A (r*experts, in) and B (out, r*experts), experts last."""
    yield "lora_A.weight", right.flatten(0, 1)
    yield "lora_B.weight", left.permute(1, 2, 0).flatten(1)


def _add_whole(file: _Tensors, whole: Mapping[str, Tensor], ranks: Mapping[str, int], tied: str | None) -> list[str]:
    """Add whole weights; return the modules to save.

    Modules with factors are excluded: peft reads their biases without modules_to_save.
    """
    saved = set()
    # peft asks for a tied table under both of its names; ensure_weight_tying then makes one module of them.
    copies = {_HEAD: whole[tied]} if tied and tied in whole else {}
    # Wide types first, so that every tensor starts at a multiple of its item size.
    for name, tensor in sorted({**whole, **copies}.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        module, _, parameter = name.rpartition(".")
        if module in ranks and parameter == "weight":
            raise ModelError(f"{name} has both factors and a whole value. Give one of them.")
        file.add(f"{PREFIX}{module}.base_layer.{parameter}" if module in ranks else PREFIX + name, tensor)
        if module not in ranks and name not in copies:
            saved.add(module)
    return sorted(saved)


def _module(name: str) -> str:
    if not name.endswith(".weight"):
        raise ModelError(f"{name} is not a module's weight, so LoRA cannot hold its change. Export the whole model.")
    return name.removesuffix(".weight")


def _settings(ranks: Mapping[str, int], saved: list[str], base_model: str, *, lora_bias: bool) -> dict[str, Any]:
    """Return adapter_config.json with alpha = rank, for scalings of 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(module): rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": saved or None,
        "bias": "lora_only" if lora_bias else "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


class _Tensors:
    """A safetensors file under construction.

    Data waits in a scratch file, because the header in front needs all shapes.
    """

    def __init__(self, data: BinaryIO) -> None:
        self._data = data
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}

    def add(self, key: str, tensor: Tensor) -> None:
        begin = self._data.tell()
        self._data.write(tensor_bytes(tensor))
        place = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, self._data.tell()]}
        self._entries[key] = place

    def add_all(self, prefix: str, parts: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in parts:
            self.add(f"{prefix}.{name}", tensor)

    def finish(self, path: Path) -> None:
        self._data.seek(0)
        with path.open("wb") as file:
            file.write(header_bytes(self._entries))
            shutil.copyfileobj(self._data, file, 1 << 24)
