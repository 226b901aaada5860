"""A disk that fails, tears a write, loses power or kills the process at a chosen change.

Every change that this process makes to files below a folder is a step: open (for writing), write, truncate, fsync,
mkdir, rename, unlink, rmdir, symlink, link; and each request to a server. Libraries that write without Python count,
too: safetensors as one write; torch.save is made to write through a Python file, and fails as on a real disk.
"""

import builtins
import errno
import hashlib
import io
import os
import pickle
import re
import signal
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITES = ("open", "write", "truncate", "mkdir", "symlink", "link")
"""Steps that need room."""
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Fault:
    """What happens, and when."""

    do: str = ""
    """kill, tear (half of a write, then a kill), fail, record, or nothing."""
    at: int = 0
    """Number of the step, from 1."""
    pattern: str = ""
    """Count only steps that match, such as `rename .*merge\\.json`."""
    number: int = errno.ENOSPC
    """Of the error of `fail`. A full disk stays full for all that needs room."""


@dataclass
class Snapshot:
    """The tree before a step."""

    kind: str
    path: str
    folders: dict[int, dict[str, int]]
    """Folder -> name -> object."""
    files: dict[int, str]
    """File -> digest of its bytes; of a link, what it points to."""


@dataclass
class Journal:
    """All steps of a command, with what was on the disk before each, and the bytes of the files."""

    root: int
    steps: list[Snapshot] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def keep(self, data: bytes) -> str:
        """Keep bytes; return their digest."""
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.blobs.setdefault(digest, data)
        return digest

    def save(self, path: str) -> None:
        with real_open(path, "wb") as file:
            pickle.dump(self, file)


real_open = io.open
_LINK = "link:"
_TORCH = "[enforce fail at inline_container.cc"


class Disk:
    """Counts the steps below a folder, and meets the fault."""

    def __init__(self, root: str, fault: Fault) -> None:
        self.root, self.fault, self.count, self.full = os.path.realpath(root), fault, 0, False
        self.names: list[str] = []
        self._busy = False
        self._scan = _Scan(self.root) if fault.do == "record" else None

    def inside(self, path: Any, dir_fd: int | None = None) -> str:
        """Return the whole path of a file below the root; "" for others."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        path = os.path.abspath(path)
        return path if path.startswith(self.root + "/") or path == self.root else ""

    def step(self, kind: str, path: str, *, data: Any = None, write: Any = None) -> None:
        """Count a step; `write` writes bytes there, to tear a write."""
        if not path or self._busy:
            return
        name = f"{kind} {os.path.relpath(path, self.root)}".replace(f".{os.getpid()}", "")
        fault = self.fault
        if self._scan:
            self._busy = True
            self._scan.take(kind, path)
            self._busy = False
        if self.full and kind in WRITES:
            raise self._error(kind, path)
        if fault.pattern and not re.search(fault.pattern, name):
            return
        self.names.append(name)
        self.count += 1
        if self.count == fault.at:
            self._meet(kind, path, data, write)

    def _meet(self, kind: str, path: str, data: Any, write: Any) -> None:
        if self.fault.do == "tear" and kind == "write":
            write(memoryview(data).cast("B")[: max(1, memoryview(data).nbytes // 2)])
        if self.fault.do in ("kill", "tear"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.do == "fail":
            self.full = self.fault.number in FULL
            raise self._error(kind, path)

    def _error(self, kind: str, path: str) -> OSError:
        number = self.fault.number
        named = (path,) if kind not in ("write", "fsync", "truncate") else ()
        return OSError(number, os.strerror(number), *named)

    def finish(self, journal: str) -> None:
        """Save the record of all steps."""
        if self._scan:
            self._scan.take("end", self.root)
            self._scan.journal.save(journal)


class _Scan:
    """Looks at a tree again and again; an inode that was free in between is another object."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._objects: dict[int, int] = {}
        self._known: dict[int, tuple[tuple[int, int], str]] = {}
        self._written = ""  # a clock may stand still between two writes
        self._next = 0
        os.makedirs(root, exist_ok=True)
        self.journal = Journal(0)

    def take(self, kind: str, path: str) -> None:
        seen: set[int] = set()
        shot = Snapshot(kind, path, {}, {})
        root = self._look(self.root, os.lstat(self.root), seen, shot)
        assert root == self.journal.root
        for inode in set(self._objects) - seen:
            self._known.pop(self._objects.pop(inode), None)
        if kind == "fsync":
            shot.path = str(self._objects.get(os.lstat(path).st_ino, -1) if os.path.lexists(path) else -1)
        self.journal.steps.append(shot)
        self._written = path

    def _look(self, path: str, info: os.stat_result, seen: set[int], shot: Snapshot) -> int:
        seen.add(info.st_ino)
        if info.st_ino not in self._objects:
            self._objects[info.st_ino], self._next = self._next, self._next + 1
        number = self._objects[info.st_ino]
        if stat.S_ISDIR(info.st_mode):
            with os.scandir(path) as entries:
                below = {e.name: self._look(e.path, e.stat(follow_symlinks=False), seen, shot) for e in entries}
            shot.folders[number] = below
        elif stat.S_ISLNK(info.st_mode):
            shot.files[number] = _LINK + os.readlink(path)
        else:
            stamp = (info.st_size, info.st_mtime_ns)
            if self._known.get(number, (None,))[0] != stamp or path == self._written:
                self._known[number] = stamp, self._bytes(path)
            shot.files[number] = self._known[number][1]
        return number

    def _bytes(self, path: str) -> str:
        with real_open(path, "rb") as file:
            return self.journal.keep(file.read())


def install(root: str, fault: Fault) -> Disk:
    """Put a disk between this process and the files below `root`."""
    disk = Disk(root, fault)
    _patch_open(disk)
    _patch_os(disk)
    _patch_libraries(disk)
    return disk


def _patch_open(disk: Disk) -> None:
    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            disk.step("write", self.path, data=data, write=super().write)
            return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            disk.step("truncate", self.path)
            return super().truncate(size)

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        path = disk.inside(file) if set(mode) & set("wax+") else ""
        if not path:
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            disk.step("open", path)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.path = path  # pyright: ignore[reportAttributeAccessIssue]
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding or "utf-8", errors, newline)

    builtins.open = io.open = opened
    import _io

    _io.open = opened  # tempfile's


def _patch_os(disk: Disk) -> None:
    def patch(name: str, kind: str, at: int = 0) -> None:
        real = getattr(os, name)

        def patched(*args: Any, dir_fd: int | None = None, **words: Any) -> Any:
            place = words.get("dst_dir_fd") if at else dir_fd
            disk.step(kind, disk.inside(args[at], place))
            return real(*args, **words, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        setattr(os, name, patched)

    for name, kind in {"mkdir": "mkdir", "rename": "rename", "replace": "rename", "unlink": "unlink",
                       "remove": "unlink", "rmdir": "rmdir", "fsync": "fsync", "fdatasync": "fsync",
                       "truncate": "truncate", "ftruncate": "truncate"}.items():  # fmt: skip
        patch(name, kind)
    patch("symlink", "symlink", at=1)
    patch("link", "link", at=1)

    really_open, really_write, really_pwrite, really_send = os.open, os.write, os.pwrite, os.sendfile

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            disk.step("open", disk.inside(path, dir_fd))
        return really_open(path, flags, mode, dir_fd=dir_fd)

    def write(fd: int, data: Any) -> int:
        disk.step("write", disk.inside(fd), data=data, write=lambda half: really_write(fd, half))
        return really_write(fd, data)

    def pwrite(fd: int, data: Any, offset: int) -> int:
        disk.step("write", disk.inside(fd), data=data, write=lambda half: really_pwrite(fd, half, offset))
        return really_pwrite(fd, data, offset)

    def sendfile(out: int, source: int, offset: int, count: int) -> int:
        if disk.inside(out):
            data = os.pread(source, count, offset)
            disk.step("write", disk.inside(out), data=data, write=lambda half: really_write(out, half))
        return really_send(out, source, offset, count)

    os.open, os.write, os.pwrite, os.sendfile = opened, write, pwrite, sendfile


def _patch_libraries(disk: Disk) -> None:
    import safetensors.torch
    import torch
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    from safetensors import SafetensorError

    httpx: Any = sys.modules[HTTPError.__module__.partition(".")[0]]  # by its name of this version
    serialize, save = safetensors.torch.serialize_file, torch.save

    def serialize_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        def half(_: Any) -> None:
            Path(f"{path}.half").write_bytes(b"half")  # it writes next to the file, then renames

        try:
            disk.step("write", disk.inside(path), data=b"..", write=half)
        except OSError as error:
            text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(text) from None
        serialize(tensors, path, metadata=metadata)

    def torch_save(value: Any, file: Any, *args: Any, **words: Any) -> None:
        if not isinstance(file, str | os.PathLike):
            return save(value, file, *args, **words)
        try:
            opened = open(file, "wb")  # noqa: SIM115  (opening fails otherwise than writing)
        except OSError as error:
            raise RuntimeError(f"{_TORCH}:747] . open file failed with strerror: {error.strerror}") from error
        try:
            with opened:
                return save(value, opened, *args, **words)
        except OSError as error:  # the writer in C++ does not say more
            raise RuntimeError(f"{_TORCH}:672] . unexpected pos 576 vs 534") from error

    send = httpx.Client.send

    def sent(client: Any, request: Any, **words: Any) -> Any:
        try:
            disk.step("send", disk.root)
        except OSError as error:
            raise httpx.ReadError(str(error), request=request) from error
        return send(client, request, **words)

    httpx.Client.send = sent
    safetensors.torch.serialize_file = serialize_file
    torch.save = torch_save


# Power cuts


def after_power_cut(journal: Journal, number: int, how: str, draw: Any) -> dict[str, str]:
    """Return path -> digest (or link, or "/" for a folder) of what a disk may hold if the power fails before a step.

    Args:
        journal: the command's steps.
        number: index of the step.
        how: `lost` keeps only what was flushed; `names` has all names but only flushed bytes; `mixed` draws what the
            disk had come to: each change of a name, and the bytes of each file.
        draw: random numbers.
    """
    folders, files = dict(journal.steps[0].folders), dict(journal.steps[0].files)
    for shot in journal.steps[:number]:
        if shot.kind == "fsync":
            target = int(shot.path)
            if target in shot.folders:
                folders[target] = shot.folders[target]
            elif target in shot.files:
                files[target] = shot.files[target]
    live = journal.steps[number]
    image: dict[str, str] = {}
    empty = journal.keep(b"")

    def names(folder: int) -> dict[str, int]:
        old, new = folders.get(folder, {}), live.folders.get(folder, folders.get(folder, {}))
        return _mixed(old, new, draw) if how == "mixed" else old if how == "lost" else new

    def data(file: int) -> str:
        old, new = files.get(file, empty), live.files.get(file, files.get(file, empty))
        if new.startswith(_LINK) or old == new or how != "mixed":
            return new if new.startswith(_LINK) else old
        return draw.choice([old, new, journal.keep(journal.blobs[new][: len(journal.blobs[new]) // 2])])

    def put(path: str, number: int) -> None:
        if any(number in shot for shot in (live.folders, folders)):
            image[path] = "/"
            for name, below in names(number).items():
                put(f"{path}/{name}" if path else name, below)
        else:
            image[path] = data(number)

    put("", journal.root)
    return image


def _mixed(old: dict[str, int], new: dict[str, int], draw: Any) -> dict[str, int]:
    """Draw which changes of a folder the disk has; a rename is one change."""
    changed = {name for name in {*old, *new} if old.get(name) != new.get(name)}
    result = {name: number for name, number in old.items() if name not in changed}
    while changed:
        group, found = set(), {changed.pop()}
        while found:
            name = found.pop()
            group.add(name)
            numbers = {old.get(name), new.get(name)} - {None}
            found |= {n for n in changed if {old.get(n), new.get(n)} & numbers} - group
        changed -= group
        source = draw.choice([old, new])
        result |= {name: source[name] for name in group if name in source}
    return result


def restore(image: dict[str, str], journal: Journal, root: Path) -> None:
    """Write an image in place of a folder."""
    for path, digest in image.items():
        target = root / path
        if digest == "/":
            target.mkdir(parents=True, exist_ok=True)
        elif digest.startswith(_LINK):
            target.symlink_to(digest.removeprefix(_LINK))
        else:
            target.write_bytes(journal.blobs[digest])
