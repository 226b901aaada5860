"""Places of a run: folders in which phases leave their outputs and, last of all, their records.

An output is built in a hidden scratch folder, which is renamed; then the record `<phase>.json` is replaced atomically.
Whatever a crash leaves, a phase without its record has not happened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_contmerge.runtime.files import put_in_place, remove, write_atomically
from hf_contmerge.runtime.versions import versions

if TYPE_CHECKING:
    from hf_contmerge.run.recipe.phases import Phase
    from hf_contmerge.run.recipe.schema import Merge

Record = dict[str, Any]

_SCORED = ("score.parquet", ".score.parquet")  # what each document added to the scores


def _words(record: Record) -> list[str]:
    """Return the rule or the strategies behind a record."""
    return [*record.get("settings", {}).get("strategy", ()), *filter(None, [record.get("rule")])]


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
        put_in_place(scratch, final)  # over what a crash between this and the record has left
        return final

    def finish(self, phase: Phase, record: Record) -> None:
        """Write the phase's record, which makes it done."""
        words = None if phase == "report" else _words(record)
        stamp = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(words)}
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
