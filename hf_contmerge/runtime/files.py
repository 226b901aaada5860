"""Atomic files and folders, folder locks, flushes to disk.

What a command reports as done is on the disk: data first, then its name, last the record that vouches for it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hf_contmerge.errors import RunError
from hf_contmerge.runtime.ranks import Ranks
from hf_contmerge.runtime.refusals import refusals

LOG = logging.getLogger(__name__)
FOREVER = -1.0

_WINDOWS = os.name == "nt"  # flushes only files that are open for writing, and no folders


class FolderLock:
    """Locks a folder against other processes; the system unlocks after crashes.

    Args:
        folder: an existing folder.
        name: of the lock's file.
        wait: seconds to wait for another process, or FOREVER.
        what: the folder in messages, if it is another one.
    """

    def __init__(self, folder: Path, name: str = ".lock", *, wait: float = 0, what: Path | None = None) -> None:
        self._path, self._wait, self._what = folder / name, wait, what or folder

    def __enter__(self) -> FolderLock:
        from filelock import FileLock, Timeout  # slow to import; most commands lock nothing

        self._lock = FileLock(self._path)
        try:
            self._lock.acquire(timeout=self._wait)
        except Timeout as error:
            raise RunError(
                f"{self._what} is in use by another process. Wait for it, or name another folder."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to replace `path` at the end, on the disk.

    A crash leaves the old file or the new one.
    """
    make_folder(path.parent)
    scratch = path.with_name(f".{path.name}.new")
    with refusals(path):
        try:
            with scratch.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except BaseException:
            with suppress(OSError):  # a full disk needs the room
                scratch.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file atomically: a crash leaves the old or new text."""
    with replacing(path) as file:
        file.write(text.encode())


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_files(source: Path, target: Path) -> None:
    """Hard-link a folder's files into another, or copy them."""
    shutil.copytree(source, target, copy_function=link_file, dirs_exist_ok=True)


def link_file(source: Path | str, target: Path | str) -> None:
    """Hard-link a file, or copy it where links are impossible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def withdraw(record: Path) -> None:
    """Remove a record, on the disk, before changes to its files."""
    if record.exists():
        record.unlink()
        sync_folder(record.parent)


def sync_files(folder: Path) -> None:
    """Flush a folder's files and entries to disk, with subfolders."""
    for path in folder.rglob("*"):
        if path.is_file():
            with refusals(path), path.open("rb+" if _WINDOWS else "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names, renames) to disk."""
    if _WINDOWS:
        return
    with refusals(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks flush names by themselves
                raise
        finally:
            os.close(handle)


def put_in_place(scratch: Path, final: Path) -> None:
    """Flush a folder to disk; rename it to `final`.

    An older folder is whole or gone, never half removed.
    """
    sync_files(scratch)
    old = replaced(final)
    remove(old)
    if final.is_dir() and any(final.iterdir()):
        final.rename(old)
    remove(final)
    scratch.rename(final)
    sync_folder(final.parent)
    remove(old)


def replaced(final: Path) -> Path:
    """Return the hidden name of a replaced folder."""
    return final.with_name(f".{final.name}.old")


@contextmanager
def alone(out: Path, *, wait: float = 0) -> Iterator[None]:
    """Lock a folder that may not exist yet, from next to it.

    Raises RunError if another process makes it.
    """
    lock = _lock_of(out)
    make_folder(out.parent)
    with FolderLock(out.parent, lock.name, wait=wait, what=out):
        try:
            yield
        finally:
            try:
                lock.unlink()  # filelock takes care of those who wait for it
            except OSError as error:  # Windows removes no open file
                if not _WINDOWS:
                    LOG.warning("Warning: %s stays behind (%s). It is empty: remove it.", lock, error.strerror)


def clear_lock(out: Path) -> None:
    """Remove a crashed process's lock next to a finished folder."""
    if _lock_of(out).exists():
        with suppress(RunError), alone(out):
            pass


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


def target_of(out: Path) -> Path:
    """Return the target of a path. Raises RunError for circular links."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # by version of Python
        raise RunError(f"{out} links to itself. Name a new folder.") from error


@contextmanager
def new_folder(out: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a hidden folder, renamed to `out` at the end.

    It is removed after an error. A link to an empty folder is followed. Raises RunError if `out` exists and is not
    empty, or another process makes it.
    """
    final = target_of(out)
    scratch = final.with_name(f".{final.name}.partial")

    def make() -> None:
        held.enter_context(alone(final))
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise RunError(f"{out} exists and is not empty. Name a new folder, or remove that one.")
        remove(scratch)
        make_folder(scratch)

    with ExitStack() as held, refusals(final):
        ranks.first(make)
        try:
            yield scratch
            ranks.first(put_in_place, scratch, final)
        except BaseException:
            if ranks.is_main:
                with suppress(OSError):
                    remove(scratch)
            raise
