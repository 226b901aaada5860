"""What has been measured before, on this machine: small files, each under the digest of all that its value depends on.

They lie in $HF_CONTMERGE_CACHE, or ~/.cache/hf_contmerge/scores; `off` there keeps nothing. The folder may be deleted
at any time, and any number of processes may use it at once: a file is written whole or not at all, and one that is
damaged counts as absent.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_contmerge.run.scores import TaskScore

LOG = logging.getLogger(__name__)

VARIABLE = "HF_CONTMERGE_CACHE"
_OFF = "off"
_FORMAT = 1  # of the files; others are not read
_YOUNG = 2.0  # seconds; a file may change once more within one tick of the clock of its file system


@dataclass(frozen=True)
class Shelf:
    """JSON values under digests. `folder` None: nothing is found, and nothing is kept."""

    folder: Path | None

    @classmethod
    def open(cls, *, use: bool = True) -> Shelf:
        """Return the one that the environment names. `use`: whether it is wanted at all."""
        named = os.environ.get(VARIABLE, "")
        if not use or named == _OFF:
            return cls(None)
        return cls(Path(named).expanduser() if named else user_cache() / "hf_contmerge" / "scores")

    def find(self, key: str) -> Any | None:
        """Return what is kept under a digest; None, which is never kept, if it is absent or damaged."""
        if self.folder is None:
            return None
        path = self._file(key)
        try:
            entry = json.loads(gzip.decompress(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, EOFError, zlib.error, ValueError) as error:
            LOG.warning("%s cannot be read (%s) and counts as absent.", path, error)
            return None
        if not isinstance(entry, dict) or (entry.get("format"), entry.get("key")) != (_FORMAT, key):
            LOG.warning("%s is no entry of this cache and counts as absent.", path)
            return None
        return entry["value"]

    def keep(self, key: str, value: Any) -> None:
        """Keep a value under a digest. Where the folder cannot be written, that is logged and nothing else happens."""
        if self.folder is None:
            return
        text = json.dumps({"format": _FORMAT, "key": key, "value": value}, ensure_ascii=False)
        path = self._file(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=".", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(gzip.compress(text.encode(), mtime=0))
                Path(scratch).replace(path)
            except OSError:
                with suppress(OSError):
                    Path(scratch).unlink(missing_ok=True)
                raise
        except OSError as error:
            LOG.warning("The cache of scores cannot be written (%s). Set %s to another folder.", error, VARIABLE)

    def _file(self, key: str) -> Path:
        assert self.folder
        return self.folder / key[:2] / f"{key}.json.gz"


def digest(value: Any) -> str:
    """Return the digest of anything that JSON can say; the order of a mapping's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def stamp(files: Iterable[Path]) -> tuple[str, bool]:
    """Return a word that changes whenever one of the files does, and whether it can be relied on from now on.

    It says where each file lies (past links), its inode, size and times (ns), and nothing of its contents. A file that
    was written a moment ago may be written again without any of these changing.
    """
    stats = sorted((str(path.resolve()), path.stat()) for path in files)
    words = [(p, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats]
    newest = max((s.st_mtime for _, s in stats), default=0.0)
    return digest(["files", *words]), time.time() - newest > _YOUNG


def remembered(shelf: Shelf, what: str, files: Iterable[Path], find: Callable[[], Any]) -> Any:
    """Return what `find` makes of the files, or what it made of them before if they have not been touched since."""
    word, settled = stamp(files)
    key = digest([what, word])
    value = shelf.find(key)
    if value is None:
        value = find()
        if settled and value is not None:
            shelf.keep(key, value)
    return value


def file_sha256(path: Path, shelf: Shelf) -> str:
    """Return the digest of a file's bytes, which are read once as long as the file is not touched."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered(shelf, "sha256", [path], read)


def _nothing(_: str) -> TaskScore | None:
    return None


@dataclass(frozen=True)
class ScoreCache:
    """Scores under their keys (keys.py)."""

    shelf: Shelf
    here: Callable[[str], TaskScore | None] = field(default=_nothing)
    """Where to look first: what the run at hand has measured itself."""

    @classmethod
    def open(cls, *, use: bool = True, here: Callable[[str], TaskScore | None] = _nothing) -> ScoreCache:
        """Return the cache that the environment names. `use`: whether any but `here` is wanted."""
        return cls(Shelf.open(use=use), here)

    def find(self, key: str) -> TaskScore | None:
        """Return the score that was measured under a key, if there was one."""
        known = self.here(key)
        if known is not None:
            return known
        entry = self.shelf.find(key)
        try:
            return None if entry is None else TaskScore.from_json(entry)
        except (TypeError, AttributeError):
            LOG.warning("The entry %s is not a score as this version keeps them, and counts as absent.", key)
            return None

    def keep(self, key: str, score: TaskScore) -> None:
        """Keep a score for all runs to come."""
        self.shelf.keep(key, score.to_json())


def user_cache() -> Path:
    """Return the user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def hugging_face_home() -> Path:
    """Return where the Hub's libraries keep what they fetch, without importing them."""
    return Path(os.environ.get("HF_HOME") or user_cache() / "huggingface")
