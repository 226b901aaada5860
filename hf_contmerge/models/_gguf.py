"""Reads GGUF files of strangers: first the counts, then transformers.

gguf's own reader believes the counts: it reads on behind the end of a file, for as many values as the file claims.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import MOST_LAYERS, foreign_errors

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of one size."""
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 2**23
"""Of all arrays; the largest vocabularies have some 2**20 tokens, scores and merges."""
_MOST_AXES = 8
_COUNTS = (b".block_count", b".expert_count")


@contextmanager
def opened_gguf(path: Path) -> Iterator[None]:
    """Check a GGUF file's header; turn its readers' exceptions into a ModelError."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"Reading {path} needs the package gguf: pip install 'hf_contmerge[gguf]'.") from error
    with foreign_errors(path, "transformers"):
        try:
            _Header(path).check()
        except (ValueError, struct.error) as error:
            raise ModelError(f"{path} is no whole GGUF file ({error}). Fetch it again.") from error
        yield


class _Header:
    """A walk over a header. Raises struct.error and ValueError.

    struct.error: the end of the file; ValueError: other damage.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at, self._order, self._left = 4, "<", _MOST_VALUES

    def check(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = struct.unpack_from("<I", self._bytes, 4)
        self._order = "<" if version & 0xFFFF else ">"
        self._number("I")
        tensors, fields = self._number("Q"), self._number("Q")
        self._require_room(tensors + fields, 12)
        for _ in range(fields):
            name, kind, start = self._skip_text(), self._number("I"), self._at
            self._skip_value(kind)
            if name.endswith(_COUNTS):
                self._require_few(name, self._bytes[start : self._at])
        for _ in range(tensors):
            self._skip_tensor()

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"{self._order}{code}", self._bytes, self._at)
        self._at += struct.calcsize(f"={code}")
        return value

    def _require_room(self, count: int, size: int) -> None:
        """Raise ValueError unless as many things of a size can follow."""
        if count * size > len(self._bytes) - self._at:
            raise ValueError(
                f"it is cut off, or claims {count} values where {len(self._bytes) - self._at} bytes follow"
            )

    def _require_few(self, name: bytes, value: bytes) -> None:
        """Raise ValueError for more layers or experts than models have.

        transformers would make them one by one.
        """
        count = int.from_bytes(value, "little" if self._order == "<" else "big")
        if count > MOST_LAYERS:
            raise ValueError(f"{name.decode(errors='replace')} is {count}, more than {MOST_LAYERS}")

    def _skip_text(self) -> bytes:
        length = self._number("Q")
        self._require_room(length, 1)
        self._at += length
        return self._bytes[self._at - length : self._at]

    def _skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self._skip_text()
        elif kind in _SIZES:
            self._require_room(1, _SIZES[kind])
            self._at += _SIZES[kind]
        elif kind == _ARRAY and depth < 4:
            self._skip_array(depth)
        else:
            raise ValueError(f"a value has the unknown type {kind}")

    def _skip_array(self, depth: int) -> None:
        kind, count = self._number("I"), self._number("Q")
        self._require_room(count, _SIZES.get(kind, 8))
        self._left -= count
        if self._left < 0:
            raise ValueError(f"it holds more than {_MOST_VALUES} values")
        if kind in _SIZES:
            self._at += count * _SIZES[kind]
            return
        for _ in range(count):
            self._skip_value(kind, depth + 1)

    def _skip_tensor(self) -> None:
        self._skip_text()
        axes = self._number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor has {axes} axes")
        self._require_room(1, 8 * axes + 12)
        self._at += 8 * axes + 12
