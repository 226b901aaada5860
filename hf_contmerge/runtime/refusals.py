"""Errors of a disk, whichever library reports them, in one sentence."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SPACE = "Free some space"
_FOLDER = "name another folder"
_REASONS = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", f"{_SPACE}, or ask for a larger quota"),
    errno.EFBIG: ("the file is too large for this disk or this user", f"Raise the limit (ulimit -f), or {_FOLDER}"),
    errno.EROFS: ("the disk is read-only", f"Make it writable, or {_FOLDER}"),
    errno.EACCES: ("no permission", f"Allow access, or {_FOLDER}"),
    errno.EPERM: ("no permission", f"Allow access, or {_FOLDER}"),
    errno.EIO: ("the disk reports an input/output error", f"Check the disk, or {_FOLDER} on another one"),
    errno.EMFILE: ("too many files are open", "Raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "End other programs"),
    errno.ENAMETOOLONG: ("the name is too long", "Use shorter names"),
    errno.ENOENT: ("it is missing", "Check the name, and restore the file if it was deleted"),
}
"""Error number -> what happened, what to do."""
FULL = (errno.ENOSPC, errno.EDQUOT)

_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)\b", re.IGNORECASE)  # safetensors; pyarrow
_TORCH = re.compile(r"inline_container|PytorchStreamWriter")  # torch.save does not pass the number on
_REASON = re.compile(r"with strerror: (.+)")
_NEXT_TO_NOTHING = 2**24  # free bytes: a failed write may have released some


@contextmanager
def refusals(place: Path) -> Iterator[None]:
    """Raise a library's disk errors as OSError, with a place.

    Args:
        place: the file or folder to name if the error names none.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(place)
        raise
    except Exception as error:
        number = _number(error, place)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def explain(error: OSError) -> str:
    """Return one sentence on a disk error, with its cure."""
    reason, cure = _REASONS.get(error.errno or 0, (error.strerror or str(error), "Fix this"))
    reason = " ".join(str(reason).split()).rstrip(".")
    if not error.filename:
        return f"{reason[:1].upper()}{reason[1:]}. {cure}"
    place = os.fsdecode(error.filename2 or error.filename)  # of a copy, the second is the new file
    verb = "read" if error.errno == errno.ENOENT else "write" if error.errno in FULL else "read or write"
    return f"Cannot {verb} {place}: {reason}. {cure}"


def _number(error: Exception, place: Path) -> int | None:
    text = str(error)
    if match := _NUMBER.search(text):
        return int(match[1])
    if not _TORCH.search(text):
        return None
    if match := _REASON.search(text):
        return next((n for n in errno.errorcode if os.strerror(n) == match[1]), errno.EIO)
    return errno.ENOSPC if free_bytes(place) < _NEXT_TO_NOTHING else _tried(place)


def _tried(place: Path) -> int:
    """Return the error of a small file's write; EIO if none."""
    file = _existing(place) / ".write-test"
    try:
        with file.open("wb") as opened:
            opened.write(bytes(2**16))
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    return errno.EIO


def free_bytes(place: Path) -> int:
    """Return the free bytes of the disk of a place."""
    return shutil.disk_usage(_existing(place)).free


def _existing(place: Path) -> Path:
    return next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir())
