"""Checkpoints to resume from: whole, with the written bytes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from hf_contmerge.errors import RunError
from hf_contmerge.runtime.digests import DIGESTS, changed_files, digests_below
from hf_contmerge.runtime.files import link_files, put_in_place, remove
from hf_contmerge.runtime.foreign import read_object
from hf_contmerge.runtime.records import read_record, write_record

LOG = logging.getLogger(__name__)

_TO_RESUME = ("optimizer", "scheduler", "rng_state", "scaler", "sampled", DIGESTS)
"""Files of a checkpoint that only resumed training reads."""


_NAME = re.compile(r"checkpoint-(\d{1,18})")


def seal_checkpoint(folder: Path) -> None:
    """Write the digests of a checkpoint's files into it."""
    if folder.is_dir():
        write_record(folder / DIGESTS, {"files": digests_below(folder)})


def keep_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Link a checkpoint's model files into a folder, with digests."""
    scratch, kept = folder / f".{checkpoint.name}", folder / checkpoint.name
    remove(scratch)
    link_files(checkpoint, scratch)
    for path in list(scratch.iterdir()):
        if path.name.startswith(_TO_RESUME):
            path.unlink()
    seal_checkpoint(scratch)
    put_in_place(scratch, kept)


def kept_checkpoints(folder: Path) -> list[Path]:
    """Return the undamaged kept checkpoints of a training, the latest first."""
    return [path for path in _in_order(folder) if not _is_damaged(path)]


def _in_order(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=kept_step, reverse=True)


def kept_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete and undamaged checkpoint: trainer_state.json comes last."""
    for path in _in_order(folder):
        try:
            read_object(path / "trainer_state.json")
        except (OSError, ValueError):
            continue
        if not _is_damaged(path):
            return path
        LOG.warning("%s is damaged: training resumes from an earlier one, or from its start.", path)
    return None


def _is_damaged(checkpoint: Path) -> bool:
    """Compare a checkpoint with its digests, unless a kill came before them."""
    if not (checkpoint / DIGESTS).exists():
        return False
    try:
        return bool(changed_files(checkpoint, read_record(checkpoint / DIGESTS, "")["files"]))
    except RunError:
        return True
