"""Cache of scores on this machine: small files named by digest.

They lie in $HF_CONTMERGE_CACHE, or ~/.cache/hf_contmerge/scores; the value `off` disables the cache. The folder may be
deleted at any time, and any number of processes may use it at once. Files are written atomically; damaged files count
as missing.
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
_FORMAT = 1  # file format; other formats are ignored
_YOUNG = 2.0  # seconds; a file may change again within one clock tick of its file system


@dataclass(frozen=True)
class JsonStore:
    """JSON values by digest; empty and read-only if `folder` is None."""

    folder: Path | None

    @classmethod
    def open(cls, *, use: bool = True) -> JsonStore:
        """Open the store named by the environment.

        Args:
            use: False for a disabled store.
        """
        named = os.environ.get(VARIABLE, "")
        if not use or named == _OFF:
            return cls(None)
        return cls(Path(named).expanduser() if named else user_cache() / "hf_contmerge" / "scores")

    def find(self, key: str) -> Any | None:
        """Return the value of a digest; None if missing or damaged."""
        if self.folder is None:
            return None
        path = self._file(key)
        try:
            entry = json.loads(gzip.decompress(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, EOFError, zlib.error, ValueError) as error:
            LOG.warning("Cannot read %s (%s); treating it as missing.", path, error)
            return None
        if not isinstance(entry, dict) or (entry.get("format"), entry.get("key")) != (_FORMAT, key):
            LOG.warning("%s is not an entry of this cache; treating it as missing.", path)
            return None
        return entry["value"]

    def keep(self, key: str, value: Any) -> None:
        """Store a value under a digest. Write errors are only logged."""
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
            LOG.warning("Cannot write the score cache (%s). Set %s to another folder.", error, VARIABLE)

    def _file(self, key: str) -> Path:
        assert self.folder
        return self.folder / key[:2] / f"{key}.json.gz"


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, regardless of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def stamp(files: Iterable[Path]) -> tuple[str, bool]:
    """Return a fingerprint of files without reading them, and its reliability.

    It covers each file's real path, device, inode, size and times (ns). It is unreliable for files written a
    moment ago: another write could leave all of these unchanged.
    """
    stats = sorted((str(path.resolve()), path.stat()) for path in files)
    words = [(p, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats]
    newest = max((s.st_mtime for _, s in stats), default=0.0)
    return digest(["files", *words]), time.time() - newest > _YOUNG


def remembered(store: JsonStore, what: str, files: Iterable[Path], find: Callable[[], Any]) -> Any:
    """Return `find()`, or its cached value if the files are unchanged."""
    word, settled = stamp(files)
    key = digest([what, word])
    value = store.find(key)
    if value is None:
        value = find()
        if settled and value is not None:
            store.keep(key, value)
    return value


def file_sha256(path: Path, store: JsonStore) -> str:
    """Return a file's digest, cached while the file is unchanged."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered(store, "sha256", [path], read)


def _nothing(_: str) -> TaskScore | None:
    return None


@dataclass(frozen=True)
class ScoreCache:
    """Scores by key (keys.py)."""

    store: JsonStore
    here: Callable[[str], TaskScore | None] = field(default=_nothing)
    """First place to look: the current run's own scores."""

    @classmethod
    def open(cls, *, use: bool = True, here: Callable[[str], TaskScore | None] = _nothing) -> ScoreCache:
        """Open the cache named by the environment.

        Args:
            use: False for `here` alone.
            here: first place to look up a key.
        """
        return cls(JsonStore.open(use=use), here)

    def find(self, key: str) -> TaskScore | None:
        """Return the score of a key, or None."""
        score = self.here(key)
        if score is not None:
            return score
        entry = self.store.find(key)
        try:
            return None if entry is None else TaskScore.from_json(entry)
        except (TypeError, AttributeError):
            LOG.warning("The cache entry %s has another version's format; treating it as missing.", key)
            return None

    def keep(self, key: str, score: TaskScore) -> None:
        """Store a score for later runs."""
        self.store.keep(key, score.to_json())


def user_cache() -> Path:
    """Return the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
