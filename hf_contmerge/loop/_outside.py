"""Experts trained outside a run: lookup, working folder, publication.

An expert's folder appears when complete. Its subfolder `contmerge` has the record (train.json), the strategies' memory,
and documents that the start model wrote.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_contmerge.errors import RunError
from hf_contmerge.run.places import ExpertPlace, Record
from hf_contmerge.runtime.digests import changed_files
from hf_contmerge.runtime.files import clear_lock, put_in_place, remove
from hf_contmerge.runtime.plugins import require_same
from hf_contmerge.runtime.records import read_record, write_record
from hf_contmerge.training.job import OWN

_CURE = "Restore it from a copy, or remove the expert's folder to train again."


def finished(out: Path, inputs: Mapping[str, Any]) -> Record | None:
    """Return the record of an existing expert, or None.

    Raises:
        RunError: the folder holds another expert or other files.
    """
    file = out / OWN / "train.json"
    if file.is_file():
        record = read_record(file, _CURE)
        if changed := changed_files(out, record["files"]):
            raise RunError(f"{out / changed[0]} changed or went missing after {file} was written. {_CURE}")
        other = [word.removesuffix("_sha256") for word, value in inputs.items() if record["inputs"].get(word) != value]
        if other:
            raise RunError(
                f"{out} holds an expert with other settings: {', '.join(other)} differ (see {file}). Choose another "
                "folder, or remove this one to train again."
            )
        require_same(record.get("versions", {}), out, cure=", or choose another folder")
        clear_lock(out)
        return record
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and holds no expert of finetune_stage. Choose a new folder, or remove it.")
    return None


def working_folder(out: Path, inputs: Mapping[str, Any]) -> Path:
    """Return the hidden folder for training with these settings."""
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return out.absolute().with_name(f".{out.name}.{key[:12]}")


def clear_others(out: Path, work: Path) -> None:
    """Remove unfinished trainings with other settings."""
    for path in work.parent.glob(f".{glob.escape(out.name)}.*"):
        if path != work and path.is_dir():  # not the lock
            remove(path)


def is_trained(work: ExpertPlace) -> bool:
    """Check for a trained, unpublished expert."""
    return work.is_done("train") and work.model.is_dir()


def publish(work: ExpertPlace, out: Path) -> Record:
    """Move an expert with record and memory to `out`."""
    record, own = work.record("train"), work.model / OWN
    files = {_published(name): digest for name, digest in record["files"].items()}
    write_record(own / "train.json", {**record, "files": files})
    for folder in (work.memory, work.synthesised):
        if folder.is_dir():
            folder.rename(own / folder.name)
    put_in_place(work.model, out)
    remove(work.folder)
    return record


def _published(name: str) -> str:
    """Return the place of a trained file in the expert's folder."""
    return f"{OWN}/{name}" if name.startswith(("memory/", "synthesised/")) else name.removeprefix("expert/")
