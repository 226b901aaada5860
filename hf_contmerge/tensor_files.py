"""Safetensors files, one tensor at a time: read from memory-mapped shards, written in shards, fingerprinted."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_contmerge.errors import ModelError

_TIED_HEAD = "lm_head.weight"
_CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip
_NAMES = {dtype: code for code, dtype in _CODES.items()}


def config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {folder / 'config.json'}: {error}") from error


class Weights:
    """The tensors of a model folder, memory-mapped: names, shapes and dtypes from headers, data when asked for.

    A tied output table that is stored a second time is left out: it is the input table, and counts once.

    Raises ModelError for a missing, truncated or unsafe file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._handles: dict[str, Any] = {}
        self._file_of = self._find()
        if _TIED_HEAD in self._file_of and len(self._file_of) > 1 and (self.folder / "config.json").is_file():
            values = config(self.folder)
            tied = values.get("tie_word_embeddings", (values.get("text_config") or {}).get("tie_word_embeddings"))
            if tied:
                del self._file_of[_TIED_HEAD]
        self.names: tuple[str, ...] = tuple(sorted(self._file_of))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._handle(name).get_slice(name).get_dtype()
        if code not in _CODES:
            raise ModelError(
                f"{self.folder}: {name} is stored as {code}, which cannot be merged. "
                "Dequantise the model first: load it with dequantisation and save it as bfloat16."
            )
        return _CODES[code]

    def tensor(self, name: str) -> Tensor:
        try:
            return self._handle(name).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self._file_of[name]} in {self.folder} cannot be read at {name}: {error}") from error

    def floating(self) -> tuple[str, ...]:
        """Return the names of the floating tensors, which are those that merge."""
        return tuple(n for n in self.names if self.dtype(n).is_floating_point)

    def numel(self) -> int:
        """Return the number of parameters."""
        return sum(torch.Size(self.shape(n)).numel() for n in self.names)

    def _find(self) -> dict[str, str]:
        """Return tensor name -> file name."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
            outside = [f for f in files if Path(f).name != f]
            missing = [f for f in files if not (self.folder / f).is_file()]
            if outside or missing:
                what = f"points outside its folder: {outside[0]}" if outside else f"names a missing file: {missing[0]}"
                raise ModelError(f"{index} {what}. Fetch the model again.")
            return dict(weight_map)
        files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{self.folder} holds no *.safetensors. Pickled weights (.bin, .pt) are not read: load the model "
                "once with transformers and call save_pretrained."
            )
        return {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118 (not a dict)

    def _handle(self, name: str) -> Any:
        return self._open(self._file_of[name])

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{self.folder / file} is truncated or no safetensors file ({error}). Fetch or write it again."
                ) from error
        return self._handles[file]


class WeightsWriter:
    """Writes safetensors shards tensor by tensor: memory holds one tensor, whatever the size of a shard.

    The layout is planned from names, shapes and dtypes, so each header can be written before the data. Files are named
    and indexed as `save_pretrained` does. Write the tensors in the order of `names`.
    """

    def __init__(
        self, folder: Path, plan: Iterable[tuple[str, Sequence[int], torch.dtype]], *, shard_size: int = 5_000_000_000
    ) -> None:
        self._folder = folder
        # Wide types first, so that every tensor starts at a multiple of its item size.
        self._plan = sorted(plan, key=lambda item: (-item[2].itemsize, item[0]))
        self.names = tuple(name for name, _, _ in self._plan)
        self._shards = list(_shards(self._plan, shard_size))
        self._next = self._tensors()
        self._file: BinaryIO | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, which must be the next one of the plan, with its shape and dtype."""
        expected, shape, dtype = next(self._next)
        if (name, tuple(tensor.shape), tensor.dtype) != (expected, tuple(shape), dtype):
            raise ValueError(
                f"expected {expected} {tuple(shape)} {dtype}; got {name} {tuple(tensor.shape)} {tensor.dtype}"
            )
        assert self._file is not None
        self._file.write(tensor_bytes(tensor))

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None and next(self._next, None) is not None:
            raise ValueError("not all planned tensors were written")
        if self._file:
            self._file.close()
        if kind is None and len(self._shards) > 1:
            self._write_index()

    def _tensors(self) -> Iterator[tuple[str, Sequence[int], torch.dtype]]:
        for number, shard in enumerate(self._shards):
            if self._file:
                self._file.close()
            self._file = (self._folder / self._file_name(number)).open("wb")
            self._file.write(_header(shard))
            yield from shard

    def _file_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _write_index(self) -> None:
        total = sum(_nbytes(shape, dtype) for _, shape, dtype in self._plan)
        weight_map = {name: self._file_name(i) for i, shard in enumerate(self._shards) for name, _, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def weights_sha256(folder: Path) -> str:
    """Return the digest of a model's tensors (names, dtypes, shapes, bytes), however they are sharded."""
    weights, digest = Weights(folder), hashlib.sha256()
    for name in weights.names:
        tensor = weights.tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's raw bytes, without a copy where it is contiguous and in main memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data


def _nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(
    plan: Sequence[tuple[str, Sequence[int], torch.dtype]], size: int
) -> Iterator[list[tuple[str, Sequence[int], torch.dtype]]]:
    shard: list[tuple[str, Sequence[int], torch.dtype]] = []
    used = 0
    for item in plan:
        need = _nbytes(item[1], item[2])
        if shard and used + need > size:
            yield shard
            shard, used = [], 0
        shard.append(item)
        used += need
    yield shard


def _header(shard: Sequence[tuple[str, Sequence[int], torch.dtype]]) -> bytes:
    """Return the start of a safetensors file: the length of the JSON, then the JSON, padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in shard:
        end = offset + _nbytes(shape, dtype)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
