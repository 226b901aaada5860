"""Atomic files and folders, folder locks, flushes to disk."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_contmerge.errors import ContmergeError, RunError
from hf_contmerge.runtime.ranks import Ranks


class FolderLock:
    """Locks a folder against other processes; the kernel unlocks after crashes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"

    def __enter__(self) -> FolderLock:
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RunError(
                f"{self._path.parent} is in use by another process. Wait for it, or name another folder."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file atomically: a crash leaves the old or new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_files(source: Path, target: Path) -> None:
    """Hard-link a folder's files into another, or copy them."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def sync_files(folder: Path) -> None:
    """Flush a folder's files and entries to disk, with subfolders."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names, renames) to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(scratch: Path, final: Path) -> None:
    """Flush a folder to disk; rename it to `final`."""
    sync_files(scratch)
    remove(final)
    scratch.rename(final)
    sync_folder(final.parent)


@contextmanager
def new_folder(out: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a hidden folder, renamed to `out` at the end.

    It is removed after an error. Raises RunError if `out` exists and is not empty.
    """
    out = out.absolute()  # "." has no name
    scratch = out.with_name(f".{out.name}.partial")

    def make() -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"{out} exists and is not empty. Name a new folder, or remove that one.")
        remove(scratch)
        scratch.mkdir(parents=True)

    ranks.first(make)
    try:
        yield scratch
    except (ContmergeError, OSError, ValueError):
        if ranks.is_main:
            remove(scratch)
        raise
    ranks.first(lambda: put_in_place(scratch, out))
