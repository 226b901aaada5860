"""Places in a run folder, for outputs and records.

An output is built in a hidden scratch folder, then renamed; last, the record `<phase>.json` is replaced atomically. A
phase without its record has not happened, whatever a crash leaves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_contmerge.runtime.files import make_folder, put_in_place, remove, replaced, withdraw, write_atomically
from hf_contmerge.runtime.versions import versions

if TYPE_CHECKING:
    from hf_contmerge.run.recipe.phases import Phase
    from hf_contmerge.run.recipe.schema import Merge

Record = dict[str, Any]

_SCORE_FILES = ("score.parquet", ".score.parquet")  # results per document


def _words(record: Record) -> list[str]:
    """Return the rule or the strategies behind a record."""
    return [*record.get("settings", {}).get("strategy", ()), *filter(None, [record.get("rule")])]


@dataclass(frozen=True)
class Place:
    """A folder with the outputs and records of phases."""

    folder: Path

    def record(self, phase: Phase) -> Record:
        """Return the record of a finished phase."""
        return json.loads(self._record_file(phase).read_text(encoding="utf-8"))

    def is_done(self, phase: Phase) -> bool:
        return self._record_file(phase).exists()

    def scratch(self, name: str) -> Path:
        """Create an empty hidden folder for the output `name`."""
        path = self.folder / f".{name}"
        remove(path)
        make_folder(path)
        return path

    def publish(self, name: str) -> Path:
        """Rename an output's scratch folder to its final name."""
        scratch, final = self.folder / f".{name}", self.folder / name
        put_in_place(scratch, final)  # replaces leftovers of a crash before the record
        return final

    def finish(self, phase: Phase, record: Record) -> None:
        """Mark a phase as done by writing its record."""
        words = None if phase == "report" else _words(record)
        stamp = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(words)}
        write_atomically(self._record_file(phase), json.dumps({**record, **stamp}, indent=1) + "\n")

    @property
    def validation(self) -> Place:
        """Scores on validation documents, for guards and `auto` parameters."""
        return Place(self.folder / "validation")

    def undo(self, phase: Phase) -> None:
        """Delete a phase's record, then its outputs."""
        withdraw(self._record_file(phase))
        self.logged(phase).unlink(missing_ok=True)
        for name in self.outputs(phase):
            remove(self.folder / name)
            remove(replaced(self.folder / name))

    def logged(self, phase: Phase) -> Path:
        """File with the last step sent to the trackers."""
        return self.folder / f".{phase}.logged"

    def outputs(self, phase: Phase) -> tuple[str, ...]:
        """Return the names of a phase's outputs, without its record."""
        return {"report": ("report", ".report"), "score": (*_SCORE_FILES, "validation")}.get(phase, ())

    def _record_file(self, phase: Phase) -> Path:
        return self.folder / f"{phase}.json"


@dataclass(frozen=True)
class ExpertPlace(Place):
    """A stage's expert of one kind."""

    kind: str

    @property
    def model(self) -> Path:
        """The expert's folder; for a given expert, the path in its record."""
        given = self.record("train").get("given") if self.is_done("train") else None
        return Path(given) if given else self.folder / "expert"

    @property
    def memory(self) -> Path:
        """Strategies' data for later stages (examples, Fisher diagonals, ...), if any."""
        return self.folder / "memory"

    @property
    def checkpoints(self) -> Path:
        """Training states to resume from; removed once the expert exists."""
        return self.folder / "checkpoints"

    def outputs(self, phase: Phase) -> tuple[str, ...]:
        trained = ("expert", ".expert", "memory", ".memory", "checkpoints")
        return {"train": trained, "score": (*_SCORE_FILES, "validation")}.get(phase, ())


@dataclass(frozen=True)
class MergePlace(Place):
    """A merge entry's model and state after a stage."""

    entry: Merge

    @property
    def model(self) -> Path:
        return self.folder / "merged"

    @property
    def running(self) -> Path:
        """The rule's state: one float32 tensor per weight.

        Read by the next stage, then pruned.
        """
        return self.folder / "running"

    @property
    def mergekit_recipe(self) -> Path:
        return self.folder / "merge.yml"

    @property
    def guard_file(self) -> Path:
        """Failed attempts, if no merge held the forgetting budget."""
        return self.folder / "guard.json"

    @property
    def replayed(self) -> ExpertPlace:
        """The stage's expert, retrained by the guard with earlier examples."""
        return ExpertPlace(self.folder / "replay", "replay")

    def prune(self) -> None:
        """Delete the running state, unused by later stages."""
        remove(self.running)

    def outputs(self, phase: Phase) -> tuple[str, ...]:
        merged = ("merged", ".merged", "running", ".running", "merge.yml")
        chosen = ("guard.json", "validation", ".validation", "replay", ".replay-memory")
        return {"merge": merged + chosen, "score": _SCORE_FILES}.get(phase, ())
