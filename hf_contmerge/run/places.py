"""Places in a run folder, for outputs and records.

An output is built in a hidden scratch folder, then renamed; last, the record `<phase>.json` is replaced atomically. A
phase without its record has not happened, whatever a crash leaves. The record holds the digests of the phase's files,
and what builds on them compares first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hf_contmerge.errors import RunError
from hf_contmerge.runtime.digests import changed_files, digests_of, files_below
from hf_contmerge.runtime.files import make_folder, put_in_place, remove, replaced, withdraw
from hf_contmerge.runtime.records import Record, read_record, require_seal, write_record
from hf_contmerge.runtime.shapes import GUARD, RECORDS
from hf_contmerge.runtime.versions import versions

if TYPE_CHECKING:
    from hf_contmerge.run.recipe.phases import Phase
    from hf_contmerge.run.recipe.schema import Merge

JOINT = "joint"
"""Kind of the expert trained on all stages at once."""
ROUTED, ORACLE = "routed", "oracle"
"""Separate experts behind a router: one that reads the prompt, one that is always right."""
IN_CONTEXT = "in_context"
"""The base with training examples in its prompt."""
BASELINES = (JOINT, ROUTED, ORACLE, IN_CONTEXT)
"""Yardsticks, measured after the last stage."""
FROM_BASE = ("base", JOINT)
"""Kinds of experts that start from the base."""
_SCORE_FILES = ("score.parquet", ".score.parquet")  # results per document
_STATISTICS = "statistics"  # of an expert; measured again at any time, with a record of their own


def _cure(phase: Phase) -> str:
    return f"Restore it from a copy, or drop the phase with `contmerge redo RUN {phase}`, then run the recipe again."


def require_whole(damaged: Sequence[Path], place: Path, phase: Phase) -> None:
    """Raise RunError if a phase has damaged files."""
    if damaged:
        more = f" and {len(damaged) - 1} more files" if len(damaged) > 1 else ""
        raise RunError(
            f"{damaged[0]}{more} changed or went missing after {place / phase}.json was written: nothing is built on "
            f"it. {_cure(phase)}"
        )


def newest(t: int) -> Record:
    """Return stage t's expert, as merge records name it."""
    return {"stage": t, "replayed": False}


def one_a_stage(t: int) -> list[Record]:
    """Return the experts of a merge of t stages, without a guard."""
    return [newest(i) for i in range(1, t + 1)]


def _words(record: Record) -> list[str]:
    """Return the rule, or the strategies and rewards, behind a record."""
    settings = record.get("settings", {})
    return [*settings.get("strategy", ()), *settings.get("rewards", ()), *filter(None, [record.get("rule")])]


def _contradiction(record: Record, t: int) -> str:
    """Return what does not fit together in a merge's record; usually nothing."""
    folded = record.get("folded", one_a_stage(t))
    experts = len(folded)
    if any(not 1 <= part["stage"] <= t for part in folded):
        return f"it names stages that are not among the first {t}"
    if "norms" in record and len(record["norms"]["experts"]) != experts:
        return f"it has {len(record['norms']['experts'])} norms of {experts} experts"
    if len(record.get("expert_sha256", folded)) != experts:
        return f"it has {len(record['expert_sha256'])} digests of {experts} experts"
    owners = {tuple(sorted(shares)) for shares in record.get("ownership", {}).values()}
    if len(owners) > 1:
        return "its layers have different owners"
    geometry = record.get("geometry")
    if not geometry:
        return ""
    compared = geometry.get("compared") or range(1, experts + 1)
    sizes = {len(rows) for rows in (geometry["lengths"], geometry["cosines"], geometry["conflicts"])}
    sizes |= {len(row) for rows in (geometry["cosines"], geometry["conflicts"]) for row in rows}
    if not all(1 <= number <= experts for number in compared) or sizes != {len(compared) + 1}:
        return f"its geometry is not that of {experts} experts and their merge"
    return ""


@dataclass(frozen=True)
class Place:
    """A folder with the outputs and records of phases."""

    folder: Path

    def record(self, phase: Phase) -> Record:
        """Return a finished phase's record. Raises RunError if it is damaged."""
        return read_record(self._record_file(phase), _cure(phase), RECORDS[phase])

    def record_bytes(self, phase: Phase) -> bytes:
        """Return a record as it lies there, unread; empty without one."""
        return self._record_file(phase).read_bytes() if self.is_done(phase) else b""

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
        files = digests_of(self.folder, files_below(self.folder, *self.vouched(phase), apart=_STATISTICS))
        write_record(self._record_file(phase), {**record, **stamp, "files": files})

    def damaged(self, phase: Phase, *outputs: str) -> list[Path]:
        """Return files of a finished phase with other bytes than recorded.

        `outputs`: names of the outputs to read; by default all.
        """
        recorded = self.record(phase)["files"]
        wanted = outputs or self.vouched(phase)
        own = {name: digest for name, digest in recorded.items() if name.startswith(tuple(f"{w}/" for w in wanted))}
        own |= {name: recorded[name] for name in wanted if name in recorded}
        return [self.folder / name for name in changed_files(self.folder, own)]

    def check(self, phase: Phase, *outputs: str) -> None:
        """Raise RunError for damaged files of a phase. Arguments as `damaged`."""
        require_whole(self.damaged(phase, *outputs), self.folder, phase)

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

    def vouched(self, phase: Phase) -> tuple[str, ...]:
        """Return the names of a phase's outputs with recorded digests."""
        return _SCORE_FILES[:1] if phase == "score" else ()

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

    def alone(self, t: int) -> bool:
        """Say if no later expert builds on this one of stage t."""
        return self.kind == JOINT or (self.kind == "base" and t > 1)

    @property
    def memory(self) -> Path:
        """Strategies' data for later stages (examples, Fisher diagonals, ...), if any."""
        return self.folder / "memory"

    @property
    def checkpoints(self) -> Path:
        """Training states to resume from; removed once the expert exists."""
        return self.folder / "checkpoints"

    @property
    def synthesised(self) -> Path:
        """Documents that the start model wrote for replay, if any."""
        return self.folder / "synthesised"

    @property
    def earlier(self) -> Path:
        """Checkpoints for a guard's rung `earlier`; removed once the stage is merged."""
        return self.folder / "earlier"

    def vouched(self, phase: Phase) -> tuple[str, ...]:
        return ("expert", "memory", "synthesised") if phase == "train" else super().vouched(phase)

    def damaged(self, phase: Phase, *outputs: str) -> list[Path]:
        record = self.record(phase)
        given = record.get("given_files", {}) if not outputs or "expert" in outputs else {}
        changed = [self.model / name for name in changed_files(self.model, given)] if given else []
        return changed + super().damaged(phase, *outputs)

    def outputs(self, phase: Phase) -> tuple[str, ...]:
        trained = ("expert", ".expert", "memory", ".memory", "checkpoints", "earlier", "synthesised")
        return {"train": trained, "score": (*_SCORE_FILES, "validation")}.get(phase, ())


@dataclass(frozen=True)
class MergePlace(Place):
    """A merge entry's model and state after a stage."""

    entry: Merge
    t: int
    """The stage's number."""

    def record(self, phase: Phase) -> Record:
        """Return a finished phase's record. Raises RunError for a damaged one."""
        record = super().record(phase)
        if phase == "merge" and (wrong := _contradiction(record, self.t)):
            raise RunError(f"{self._record_file(phase)} is damaged: {wrong}. {_cure(phase)}")
        return record

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
        """The merge for mergekit, written again after the run has moved."""
        return self.folder / "merge.yml"

    def folded(self, t: int) -> list[Record]:
        """Return the experts of stage t's merge, or the guard's."""
        return self.record("merge").get("folded", one_a_stage(t))

    def check_recipe(self) -> None:
        """Raise RunError if merge.yml exists and is not as it was written."""
        if self.mergekit_recipe.exists():
            require_seal(self.mergekit_recipe, _cure("merge"))

    @property
    def guard_file(self) -> Path:
        """Failed attempts, if no merge held the forgetting budget."""
        return self.folder / "guard.json"

    def failed_tries(self) -> list[Record]:
        """Return a merge's attempts beyond the budget."""
        return read_record(self.guard_file, _cure("merge"), GUARD)["tries"] if self.guard_file.exists() else []

    @property
    def replayed(self) -> ExpertPlace:
        """The stage's expert, retrained by the guard with earlier examples."""
        return ExpertPlace(self.folder / "replay", "replay")

    def earlier_at(self, step: int) -> ExpertPlace:
        """The stage's expert as it was at an earlier step."""
        return ExpertPlace(self.folder / "earlier" / f"{step}", "earlier")

    def prune(self) -> None:
        """Delete the running state, unused by later stages."""
        remove(self.running)

    def vouched(self, phase: Phase) -> tuple[str, ...]:
        return ("merged", "running") if phase == "merge" else super().vouched(phase)

    def outputs(self, phase: Phase) -> tuple[str, ...]:
        merged = ("merged", ".merged", "running", ".running", "merge.yml")
        chosen = ("guard.json", "validation", ".validation", "replay", ".replay-memory", "earlier")
        return {"merge": merged + chosen, "score": _SCORE_FILES}.get(phase, ())
