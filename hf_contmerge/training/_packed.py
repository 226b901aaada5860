"""Compressed files of datasets, counted before they are unpacked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_contmerge.errors import DataError, size

RATIO = 200
"""Bytes that one compressed byte may stand for. Texts have 3 to 20."""
ALLOWED = 2**28
"""Bytes that any file may hold."""
_READ = 2**20
_OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""First bytes -> function that opens the contents. `datasets` looks at these, not at names."""


def require_bounded(file: Path, name: str) -> None:
    """Refuse compressed files with over RATIO times their bytes.

    Raises DataError for one that does, and for a damaged one.
    """
    if not file.is_file():
        return
    most = max(RATIO * file.stat().st_size, ALLOWED)
    try:
        held = _held(file, most)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} is damaged or not of its kind ({error}). Fetch it again.") from error
    if held > most:
        raise DataError(
            f"{name} has {size(file.stat().st_size)} and unpacks to more than {size(most)}, as no text does. Unpack it "
            "yourself if you trust it."
        )


def _held(file: Path, most: int) -> int:
    """Return the unpacked bytes, counted to just beyond `most`."""
    with file.open("rb") as raw:
        head = raw.read(6)
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as archive:  # it unpacks no more of a member than is said here
            return sum(member.file_size for member in archive.infolist())
    opener = next((opener for start, opener in _OPENERS.items() if head.startswith(start)), None)
    if opener is None:
        return 0
    held = 0
    with opener(file) as contents:
        while held <= most and (part := contents.read(_READ)):
            held += len(part)
    return held
