"""Reads, writes and hashes safetensors, one tensor at a time."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config, depths, vocabulary_size
from hf_contmerge.models.contents import weight_files
from hf_contmerge.models.reading import no_weights
from hf_contmerge.runtime.foreign import parse_json
from hf_contmerge.runtime.refusals import refusals

SHARD_SIZE = 5_000_000_000
"""Bytes per weight file, as in `save_pretrained`."""

_AT_ONCE = 2**18  # elements compared at once; most tensors that differ do so in the first
_CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip
_LARGEST_HEADER = 2**25  # bytes; 10 MB hold 100,000 tensors
_LONGEST_NAME = 1000
_MOST_AXES, _LARGEST_EMPTY = 16, 2**48  # an empty tensor may claim any
_NAMES = {dtype: code for code, dtype in _CODES.items()}


@dataclass(frozen=True)
class _Entry:
    """The place of a tensor."""

    file: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


_NO_WEIGHTS: dict[tuple[str, bytes], frozenset[str]] = {}
"""Answers by stamp and config.json: one may take the reading of two tables."""


class Weights:
    """The memory-mapped tensors of a model folder, as `from_pretrained` reads it.

    Names, shapes and dtypes come from the headers; data is read on demand. Old buffers are left out, and a tied output
    table stored a second time counts once, as the input table. Each tensor has a separate mapping, released with it:
    dropped tensors do not stay in memory.

    Args:
        folder: a model folder, or a single file.

    Raises:
        ModelError: a file is missing, truncated or unsafe.
    """

    def __init__(self, folder: Path) -> None:
        alone = Path(folder).is_file()
        self.folder = Path(folder).parent if alone else Path(folder)
        self._files: dict[str, BinaryIO] = {}
        self._made: dict[str, Callable[[], Tensor]] = {}
        self._entries = self._open(Path(folder).name) if alone else self._find()
        if not alone and (self.folder / "config.json").is_file():
            for name in self._no_weights():
                del self._entries[name]
        self.names: tuple[str, ...] = tuple(sorted(self._entries))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        code = self._entries[name].code
        if code not in _CODES:
            raise ModelError(
                f"{self.folder}: {name} is stored as {code}, which cannot be merged. "
                "Dequantise the model first: load it with dequantisation and save it as bfloat16."
            )
        return _CODES[code]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor over the file's pages, copied on write.

        Writing to it changes neither the file nor other readers' tensors.
        """
        if name in self._made:
            return self._made[name]()
        entry, dtype = self._entries[name], self.dtype(name)
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        first = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
        file = self._files[entry.file].fileno()
        pages = mmap.mmap(file, entry.end - first, offset=first, access=mmap.ACCESS_COPY)
        offset = entry.begin - first
        buffer = pages if offset % dtype.itemsize == 0 else bytearray(pages[offset:])
        flat = torch.frombuffer(buffer, dtype=dtype, offset=offset if buffer is pages else 0)
        return flat.reshape(entry.shape)

    def prefetch(self, name: str) -> None:
        """Start reading a tensor's pages in the background."""
        entry = self._entries[name]
        if hasattr(os, "posix_fadvise"):
            file = self._files[entry.file].fileno()
            os.posix_fadvise(file, entry.begin, entry.end - entry.begin, os.POSIX_FADV_WILLNEED)

    def floating(self) -> tuple[str, ...]:
        """Return the names of the floating (mergeable) tensors."""
        return tuple(n for n in self.names if self.dtype(n).is_floating_point)

    @functools.cached_property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most floating elements."""
        return main_dtype((name, self.shape(name), self.dtype(name)) for name in self.names)

    def numel(self) -> int:
        """Return the number of parameters."""
        return sum(math.prod(self.shape(n)) for n in self.names)

    @functools.cached_property
    def vocabulary(self) -> int | None:
        """Rows of the vocabulary tables, by config.json."""
        return vocabulary_size(config(self.folder))

    @functools.cached_property
    def depths(self) -> Mapping[str, float]:
        """The place of each weight's layer, from 0 to 1."""
        return depths(self.names)

    def nbytes(self, name: str) -> int:
        """Return a tensor's size in its file."""
        return self._entries[name].end - self._entries[name].begin

    def stamp(self) -> str:
        """Return a digest of the files' names, sizes and times.

        It changes with every change of a file, since no program can set the inode's time; contents are not read.
        """
        stats = [(name, os.fstat(file.fileno())) for name, file in sorted(self._files.items())]
        text = "\n".join(f"{name} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in stats)
        return hashlib.sha256(text.encode()).hexdigest()

    def renamed(
        self, names: Mapping[str, str], rest: Weights, made: Mapping[str, Callable[[], Tensor]] | None = None
    ) -> Weights:
        """Return these tensors under other names, in the layout of `rest`.

        Args:
            names: name in the view -> name here.
            rest: source of the tensors that `names` and `made` lack.
            made: name in the view -> function that makes its tensor from others.
        """
        view = copy.copy(self)
        view._files = {**self._files, **{f"{rest.folder}/{name}": file for name, file in rest._files.items()}}
        view._entries = {n: replace(e, file=f"{rest.folder}/{e.file}") for n, e in rest._entries.items()}
        view._entries |= {name: self._entries[own] for name, own in names.items()}
        view.names = rest.names
        view._made = dict(made or {})
        return view

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of all tensors."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def equal(self, one: str, other: str) -> bool:
        """Compare the values of two tensors."""
        return equal(self.tensor(one).reshape(-1), self.tensor(other).reshape(-1))

    def _find(self) -> dict[str, _Entry]:
        files, indexed = weight_files(self.folder)
        entries = {name: entry for file in files for name, entry in self._open(file).items()}
        absent = [name for name in indexed if name not in entries]
        if absent:
            raise ModelError(f"{self.folder}: the index lists {absent[0]}, which no file holds. Fetch the model again.")
        return entries

    def _no_weights(self) -> frozenset[str]:
        key = (self.stamp(), (self.folder / "config.json").read_bytes())
        if key not in _NO_WEIGHTS:
            _NO_WEIGHTS[key] = frozenset(no_weights(self.folder, self.shapes(), self.equal))
        return _NO_WEIGHTS[key]

    def _open(self, file: str) -> dict[str, _Entry]:
        path = self.folder / file
        try:
            header, data = _read_header(path)
            self._files[file] = path.open("rb")
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                f"{path} is truncated or not a safetensors file ({error}). Fetch or write it again."
            ) from error
        return {
            name: _Entry(file, e["dtype"], tuple(e["shape"]), *(data + offset for offset in e["data_offsets"]))
            for name, e in header.items()
            if name != "__metadata__"
        }


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors header and the place of the first tensor.

    Raises SafetensorError, OSError or ValueError for damaged files, special ones and names of no tensor.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > _LARGEST_HEADER:
            raise ValueError(f"its header would have {length} bytes")
        header = parse_json(file.read(length).decode())
    with safe_open(path, framework="pt"):  # safetensors checks the header against the file
        pass
    for name, entry in header.items():
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ValueError(f"{name!a:.80} is no name of a tensor")
        shape = entry["shape"] if name != "__metadata__" else ()
        if len(shape) > _MOST_AXES or math.prod(filter(None, shape)) > _LARGEST_EMPTY:
            raise ValueError(f"{name} has the shape {shape!s:.100}")
    return header, 8 + length


_STAGED = 2**24  # bytes of a thread's pinned buffer
_STAGING = threading.local()

_Item = tuple[str, Sequence[int], torch.dtype]
Plan = Iterable[_Item]
"""Name, shape and dtype of each tensor to write."""


def main_dtype(plan: Plan) -> torch.dtype:
    """Return the dtype of most floating elements."""
    counts: dict[torch.dtype, int] = {}
    for _, shape, dtype in plan:
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def kept_dtype(own: torch.dtype, usual: torch.dtype, asked: torch.dtype) -> torch.dtype:
    """Return a tensor's dtype in a model written as `asked`.

    Float32 stays float32 in a model of 16 bits.
    """
    return own if own.itemsize > usual.itemsize and asked.itemsize <= usual.itemsize else asked


def fill_files(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """Assign tensors to files of at most `limit` bytes, in order."""
    files: dict[str, int] = {}
    number = used = 0
    for name, size in sizes.items():
        if files and used + size > limit:
            number, used = number + 1, 0
        files[name], used = number, used + size
    return files


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a small safetensors file."""
    with refusals(path):
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


class WeightsWriter:
    """Writes safetensors shards tensor by tensor, in any order.

    Any number of threads and processes may write. The layout follows from names, shapes and dtypes: every tensor's
    place is known before the first write, and memory holds only the tensors in flight. Files are named and indexed as
    by `save_pretrained`.

    Args:
        folder: an existing folder.
        plan: the tensors to write.
        shard_size: bytes per file.
        files: tensor -> number of its file; by default, files are filled up to `shard_size`.
        leader: create the files in this process; the others open existing files.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        shard_size: int = SHARD_SIZE,
        files: Mapping[str, int] | None = None,
        leader: bool = True,
    ) -> None:
        self.folder = folder
        # Wide types first, so that every tensor starts at a multiple of its item size.
        items = sorted(plan, key=lambda item: (-item[2].itemsize, item[0]))
        self.names = tuple(name for name, _, _ in items)
        self._items = {name: (tuple(shape), dtype) for name, shape, dtype in items}
        self._shard_of = files or fill_files({name: _nbytes(shape, dtype) for name, shape, dtype in items}, shard_size)
        self._shards: list[list[_Item]] = [[] for _ in range(max(self._shard_of.values(), default=0) + 1)]
        for item in items:
            self._shards[self._shard_of[item[0]]].append(item)
        self._places: dict[str, tuple[int, int]] = {}
        self._leader = leader
        self._handles: list[int] = []

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(shape, dtype) for shape, dtype in self._items.values())

    def dtype(self, name: str) -> torch.dtype:
        return self._items[name][1]

    def plan(self) -> Plan:
        """Return the tensors to write."""
        return [(name, *self._items[name]) for name in self.names]

    def shard_of(self, name: str) -> int:
        """Return the number of a tensor's file."""
        return self._shard_of[name]

    def create(self) -> None:
        """Create the index and the files, in full size."""
        for number, shard in enumerate(self._shards):
            header, path = _header(shard), self.folder / self._file_name(number)
            with refusals(path), path.open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(_nbytes(shape, dtype) for _, shape, dtype in shard))
        if len(self._shards) > 1:
            self._write_index()

    def __enter__(self) -> WeightsWriter:
        if self._leader:
            self.create()
        for number, shard in enumerate(self._shards):
            self._handles.append(os.open(self.folder / self._file_name(number), os.O_WRONLY))
            offset = len(_header(shard))
            for name, shape, dtype in shard:
                self._places[name] = (number, offset)
                offset += _nbytes(shape, dtype)
        return self

    def write(self, name: str, tensor: Tensor, *, start: int = 0) -> None:
        """Write a tensor, or elements from `start` on."""
        shape, dtype = self._items[name]
        whole = start == 0 and tuple(tensor.shape) == shape
        if tensor.dtype != dtype or not (whole or start + tensor.numel() <= math.prod(shape)):
            raise ValueError(f"expected {name} {shape} {dtype}; got {tuple(tensor.shape)} {tensor.dtype} at {start}")
        shard, offset = self._places[name]
        offset += start * dtype.itemsize
        with refusals(self.folder / self._file_name(shard)):
            for data in _runs_of_bytes(tensor):
                while len(data):
                    written = os.pwrite(self._handles[shard], data, offset)
                    data, offset = data[written:], offset + written

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            os.close(handle)

    def _file_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _write_index(self) -> None:
        weight_map = {name: self._file_name(i) for name, i in self._shard_of.items()}
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def equal(ours: Tensor, theirs: Tensor) -> bool:
    """Compare the numbers of two tensors, in any types.

    Some rows at a time, which saves memory and, where the first ones differ, reads.
    """
    if ours.shape != theirs.shape:
        return False
    if not ours.dim():
        ours, theirs = ours[None], theirs[None]
    rows = max(1, _AT_ONCE * len(ours) // max(ours.numel(), 1))
    pairs = zip(ours.split(rows), theirs.split(rows), strict=True)
    return all(x.equal(y) if x.dtype == y.dtype else x.float().equal(y.float()) for x, y in pairs)


def weights_sha256(folder: Path, *, workers: int | None = None) -> str:
    """Return a digest of a model's tensors, independent of shards.

    It covers names, dtypes, shapes and bytes: a digest of the tensors' digests, computed in `workers` threads (default:
    one per core).
    """
    weights = Weights(folder)

    def line(name: str) -> str:
        digest = hashlib.sha256(tensor_bytes(weights.tensor(name))).hexdigest()
        return f"{name} {weights.dtype(name)} {weights.shape(name)} {digest}\n"

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return hashlib.sha256("".join(pool.map(line, weights.names)).encode()).hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's raw bytes; contiguous CPU tensors are not copied."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data


def _runs_of_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's raw bytes in order; valid until the next run.

    A GPU's tensor passes through a pinned buffer of this thread: copies into fresh pages are many times slower.
    """
    if not tensor.is_cuda:
        yield tensor_bytes(tensor)
        return
    if not hasattr(_STAGING, "buffer"):
        _STAGING.buffer = torch.empty(_STAGED, dtype=torch.uint8, pin_memory=True)
    for run in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_STAGED):
        yield _STAGING.buffer[: len(run)].copy_(run).numpy().data


def _nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _header(shard: Sequence[_Item]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in shard:
        end = offset + _nbytes(shape, dtype)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header_bytes(entries)


def header_bytes(entries: Mapping[str, Any]) -> bytes:
    """Return a safetensors header: JSON length, then JSON padded to eight bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
