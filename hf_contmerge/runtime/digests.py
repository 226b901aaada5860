"""Digests of files, to notice changed bytes.

XXH3 with 128 bits: against bad disks and mistakes, at the speed of memory. Identities of models are SHA-256.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

Digests = dict[str, str]
"""Name of a file, relative to a folder -> digest of its bytes."""

DIGESTS = "digests.json"
"""Record inside a folder whose files it vouches for."""

_WINDOW = 2**26
_SHARED: dict[str, int] = (
    {"flags": mmap.MAP_SHARED | mmap.MAP_POPULATE, "prot": mmap.PROT_READ}
    if hasattr(mmap, "MAP_POPULATE")
    else {"access": mmap.ACCESS_READ}
)


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes, mapped in windows.

    Copies would take longer than the digest.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, _WINDOW):
            with mmap.mmap(file.fileno(), min(_WINDOW, size - start), offset=start, **_SHARED) as window:
                digest.update(window)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Return the digest of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def digests_of(folder: Path, names: Iterable[str]) -> Digests:
    """Return the digests of named files, computed in threads."""
    listed = sorted(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(listed, pool.map(lambda name: file_digest(folder / name), listed), strict=True))


def digests_below(folder: Path) -> Digests:
    """Return the digests of all files of a folder."""
    return digests_of(folder, files_below(folder, "."))


def files_below(folder: Path, *outputs: str, apart: str | None = None) -> list[str]:
    """Return the files of a folder's outputs: files, folders, or missing.

    `apart`: name of a subfolder with records of its own.
    """
    paths = [p for name in outputs for p in ((folder / name), *(folder / name).rglob("*")) if p.is_file()]
    names = [p.relative_to(folder) for p in paths]
    return [name.as_posix() for name in names if apart not in name.parts[:-1]]


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """Return the recorded files that are missing or changed."""
    present = [name for name in recorded if (folder / name).is_file()]
    now = digests_of(folder, present)
    return [name for name, digest in recorded.items() if now.get(name) != digest]
