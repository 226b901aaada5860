"""Places of a run: folders in which phases leave their outputs and, last of all, their records.

An output is built in a hidden scratch folder, which is renamed; then the record `<phase>.json` is replaced atomically.
Whatever a crash leaves, a phase without its record has not happened.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_contmerge.errors import RunError

if TYPE_CHECKING:  # merging on its own needs neither recipes nor what checks them
    from hf_contmerge.recipe import Merge, Phase

Record = dict[str, Any]

_SCORED = ("score.parquet", ".score.parquet")  # what each document added to the scores
_RECORDED_PACKAGES = ("hf_contmerge", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm_eval")


@dataclass(frozen=True)
class Place:
    """A folder in which phases leave their outputs and, last of all, their records."""

    folder: Path

    def record(self, phase: Phase) -> Record:
        """Return the record of a phase that is done."""
        return json.loads(self._record_file(phase).read_text(encoding="utf-8"))

    def is_done(self, phase: Phase) -> bool:
        return self._record_file(phase).exists()

    def scratch(self, name: str) -> Path:
        """Return an empty hidden folder in which to build the output `name`."""
        path = self.folder / f".{name}"
        remove(path)
        path.mkdir(parents=True)
        return path

    def publish(self, name: str) -> Path:
        """Put the scratch folder of the output `name` in its place."""
        scratch, final = self.folder / f".{name}", self.folder / name
        sync_files(scratch)
        remove(final)  # left by a crash between this rename and the record
        scratch.rename(final)
        sync_folder(self.folder)
        return final

    def finish(self, phase: Phase, record: Record) -> None:
        """Write the phase's record, which makes it done."""
        stamp = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
        write_atomically(self._record_file(phase), json.dumps({**record, **stamp}, indent=1) + "\n")

    @property
    def validation(self) -> Place:
        """Where the scores on validation documents lie, which a guard and `auto` parameters go by."""
        return Place(self.folder / "validation")

    def undo(self, phase: Phase) -> None:
        """Forget that a phase was done, then remove what it wrote."""
        self._record_file(phase).unlink(missing_ok=True)
        self.logged(phase).unlink(missing_ok=True)
        for name in self.outputs(phase):
            remove(self.folder / name)

    def logged(self, phase: Phase) -> Path:
        """Return the file that says up to which step trackers have been told of a phase."""
        return self.folder / f".{phase}.logged"

    def outputs(self, phase: Phase) -> tuple[str, ...]:
        """Return the names of what a phase writes beside its record."""
        return {"report": ("report", ".report"), "score": (*_SCORED, "validation")}.get(phase, ())

    def _record_file(self, phase: Phase) -> Path:
        return self.folder / f"{phase}.json"


@dataclass(frozen=True)
class ExpertPlace(Place):
    """A stage's expert of one kind."""

    kind: str

    @property
    def model(self) -> Path:
        """The expert's folder: trained here, or, for a given expert, where its record says."""
        given = self.record("train").get("given") if self.is_done("train") else None
        return Path(given) if given else self.folder / "expert"

    @property
    def memory(self) -> Path:
        """What the stage's strategies keep for later ones (examples, a Fisher diagonal, ...), if anything."""
        return self.folder / "memory"

    @property
    def checkpoints(self) -> Path:
        """Half-trained states, to resume from; removed once the expert is there."""
        return self.folder / "checkpoints"

    def outputs(self, phase: Phase) -> tuple[str, ...]:
        trained = ("expert", ".expert", "memory", ".memory", "checkpoints")
        return {"train": trained, "score": (*_SCORED, "validation")}.get(phase, ())


@dataclass(frozen=True)
class MergePlace(Place):
    """What one merge entry of the recipe made of the stages so far."""

    entry: Merge

    @property
    def model(self) -> Path:
        return self.folder / "merged"

    @property
    def running(self) -> Path:
        """The rule's state: one float32 tensor per weight. Read by the next stage, then pruned."""
        return self.folder / "running"

    @property
    def mergekit_recipe(self) -> Path:
        return self.folder / "merge.yml"

    @property
    def guard_file(self) -> Path:
        """What was tried in vain, where no merge held the forgetting budget."""
        return self.folder / "guard.json"

    @property
    def replayed(self) -> ExpertPlace:
        """The stage's expert as the guard trained it again, with examples of earlier stages."""
        return ExpertPlace(self.folder / "replay", "replay")

    def prune(self) -> None:
        """Drop the running state, which a later stage's record has made needless."""
        remove(self.running)

    def outputs(self, phase: Phase) -> tuple[str, ...]:
        merged = ("merged", ".merged", "running", ".running", "merge.yml")
        chosen = ("guard.json", "validation", ".validation", "replay", ".replay-memory")
        return {"merge": merged + chosen, "score": _SCORED}.get(phase, ())


class FolderLock:
    """Keeps a second process out of a folder; the kernel lets go of it however the holder dies."""

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
    """Replace a file so that a crash leaves the old text or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    found = {}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sync_files(folder: Path) -> None:
    """Make the system write a folder's files to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the system write a folder's own entries (names, renames) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
