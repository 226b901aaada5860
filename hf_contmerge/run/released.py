"""Weights deleted from finished runs (a study's `keep: scores`).

released.json       the names of the deleted files, in the run's folder
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.phases import Phase
from hf_contmerge.runtime.files import remove
from hf_contmerge.runtime.records import read_record, write_record

RECORD = "released.json"
SHAPE = {"released": [str]}
"""Of the record."""
_WEIGHTS = ".safetensors"


def release(run: Run, phases: Sequence[Phase]) -> None:
    """Delete the weights of a run's phases; records and scores stay.

    The record comes first: a killed call leaves files that nobody needs, not ones that are missed. Files are found in
    the run's own folders, not by the names in its records.
    """
    files = [
        path
        for _, place in run.places()
        for phase in phases
        if place.is_done(phase)
        for name in place.vouched(phase)
        if not (place.folder / name).is_symlink()
        for path in sorted((place.folder / name).rglob(f"*{_WEIGHTS}"))
    ]
    if files:
        names = {path.relative_to(run.folder).as_posix() for path in files}
        write_record(run.folder / RECORD, {"released": sorted(names | released(run))})
    for path in files:
        remove(path)


def released(run: Run) -> set[str]:
    """Return the deleted files by their names in the run's folder."""
    file = run.folder / RECORD
    cure = f"Remove it; `contmerge verify` then lists the weights that {run.folder} gave up as missing."
    return set(read_record(file, cure, SHAPE)["released"]) if file.exists() else set()
