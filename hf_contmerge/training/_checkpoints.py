"""Checkpoints to resume from: whole, and with the bytes that were written."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from hf_contmerge.errors import RunError
from hf_contmerge.runtime.digests import DIGESTS, changed_files, digests_below
from hf_contmerge.runtime.foreign import read_object
from hf_contmerge.runtime.records import read_record, write_record

LOG = logging.getLogger(__name__)


_NAME = re.compile(r"checkpoint-(\d{1,18})")


def seal_checkpoint(folder: Path) -> None:
    """Write the digests of a checkpoint's files into it."""
    if folder.is_dir():
        write_record(folder / DIGESTS, {"files": digests_below(folder)})


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete and undamaged checkpoint: trainer_state.json comes last."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
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
