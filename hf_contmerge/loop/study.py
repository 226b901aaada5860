"""Runs a study: the cells of a grid, in parallel perhaps."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.errors import BudgetError, ContmergeError, ResourceError, RunError
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.study import Study, StudyCell, study_cells
from hf_contmerge.run.released import release
from hf_contmerge.runtime.files import FOREVER, FolderLock, make_folder, remove, write_atomically
from hf_contmerge.runtime.records import read_record, write_record
from hf_contmerge.runtime.stopping import Stopped

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyFolder:
    """A study, its cells and its folder."""

    folder: Path
    study: Study
    cells: tuple[StudyCell, ...]

    @classmethod
    def open(cls, study: Study, folder: str | Path | None = None) -> StudyFolder:
        """Check a study's grid. Writes nothing. Raises RecipeError."""
        return cls(Path(folder) if folder else study.folder(), study, tuple(study_cells(study)))

    @property
    def experts(self) -> Path:
        return self.folder / "experts"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    def run(self, cell: StudyCell) -> Run:
        """Return a cell's run."""
        return Run(self.folder / "runs" / cell.name, cell.recipe)

    def part(self, number: int, parts: int) -> list[StudyCell]:
        """Return the cells of a part, from 1; neighbours share experts."""
        size = len(self.cells)
        return list(self.cells[size * (number - 1) // parts : size * number // parts])

    def is_complete(self) -> bool:
        """Say if this exact study is done, its report included."""
        if not self._record.exists() or not (self.report / "study.json").exists():
            return False
        record = read_record(self._record, "Remove it, and give the same command again.")
        runs = (self.run(cell) for cell in self.cells)
        if record.get("study_sha256") != self._sha256() or not all(run.is_complete() for run in runs):
            return False
        return record.get("reported_sha256") == self._reported_sha256()

    def write(self) -> None:
        """Write the study with all defaults. Raises ResourceError."""
        try:
            make_folder(self.folder)
            with FolderLock(self.folder, wait=FOREVER):  # other parts may start at the same moment
                write_atomically(self.folder / "study.yml", yaml.safe_dump(self._fields(), sort_keys=False))
        except OSError as error:
            raise ResourceError(
                f"Cannot write the study folder {self.folder}: {error.strerror}. Name another with --out."
            ) from error

    def spare(self, run: Run) -> None:
        """Delete a finished run's merged weights, if only scores are kept.

        Its experts may serve other runs until the study is complete.
        """
        if self.study.keep == "scores" and run.is_complete():
            release(run, ["merge"])

    def finish(self) -> None:
        """Record the study as complete; delete experts if only scores are kept."""
        if self.study.keep == "scores":
            for cell in self.cells:
                release(self.run(cell), ["train", "merge"])
            remove(self.experts)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        digests = {"study_sha256": self._sha256(), "reported_sha256": self._reported_sha256()}
        write_record(self._record, {**digests, "cells": len(self.cells), "finished": finished})

    @property
    def _record(self) -> Path:
        return self.folder / "study.json"

    def _fields(self) -> dict[str, Any]:
        return self.study.model_dump(mode="json")

    def _reported_sha256(self) -> str:
        """Return the digest of the runs' scores, which the report repeats."""
        return hashlib.sha256("".join(self.run(cell).scores_sha256() for cell in self.cells).encode()).hexdigest()

    def _sha256(self) -> str:
        return hashlib.sha256(json.dumps(self._fields(), sort_keys=True).encode()).hexdigest()


def run_cells(folder: StudyFolder, cells: Sequence[StudyCell], *, trust_remote_code: bool = False) -> None:
    """Run the unfinished cells.

    A cell that stops does not stop the others.

    Raises:
        RunError: some cells stopped, each with its reason.
    """
    from hf_contmerge.loop.run import run_recipe

    stopped: dict[str, ContmergeError] = {}
    for number, cell in enumerate(cells, 1):
        run = folder.run(cell)
        if run.is_complete():
            folder.spare(run)
            continue
        LOG.info("cell %d of %d: %s", number, len(cells), cell.name)
        try:
            folder.spare(
                run_recipe(cell.recipe, run.folder, trust_remote_code=trust_remote_code, experts=folder.experts)
            )
        except ContmergeError as error:
            if not stopped and not isinstance(error, BudgetError) and number == 1:
                raise  # most likely each cell would stop for the same reason
            LOG.error("cell %s stopped: %s", cell.name, error)
            stopped[cell.name] = error
    if stopped:
        listed = "".join(f"\n  {name}: {error}" for name, error in stopped.items())
        raise RunError(
            f"{len(stopped)} of {len(cells)} cells of {folder.folder} stopped; the others are done:{listed}\n"
            "The same command runs these again. The report needs all runs: take the settings of those that will stop "
            "again out of the study's file, and the same command reports the others."
        )


def run_side_by_side(folder: StudyFolder, jobs: int, words: Sequence[str], *, quiet: bool = False) -> None:
    """Run all cells in several processes of this machine.

    `words`: the command's arguments, without `--jobs`. `quiet`: drop what the processes print, not what they log.

    Raises:
        RunError: a process failed.
    """
    command = [sys.executable, "-m", "hf_contmerge.commands.main", "study", *words]
    jobs = min(jobs, len(folder.cells))
    out = subprocess.DEVNULL if quiet else None
    running = [subprocess.Popen([*command, "--part", f"{n}/{jobs}"], stdout=out) for n in range(1, jobs + 1)]
    try:
        codes = [process.wait() for process in running]
    except Stopped as stop:
        for process in running if stop.number != signal.SIGINT else ():  # a terminal sends Ctrl-C to the jobs as well
            process.send_signal(stop.number)
        for process in running:
            process.wait()
        raise
    if any(codes):
        raise RunError(
            f"{sum(map(bool, codes))} of {jobs} jobs failed; see their messages above. Finished runs are kept."
        )


def unfinished(folder: StudyFolder) -> Iterator[StudyCell]:
    """Yield the cells whose runs are not complete."""
    return (cell for cell in folder.cells if not folder.run(cell).is_complete())
