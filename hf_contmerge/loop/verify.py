"""Compares all files of a run, state or model with their records.

A record vouches for itself by its seal and for other files by their digests. What no record covers (trackers, logs,
locks) is listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from hf_contmerge.errors import ContmergeError, RunError, shell_word
from hf_contmerge.loop._history import StageScores
from hf_contmerge.loop.remix import RECORD as REMIX
from hf_contmerge.merging.lineage import LINEAGE
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.identity import Identity
from hf_contmerge.models.statistics import RECORD as STATISTICS_RECORD
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace, Place
from hf_contmerge.run.recipe.phases import PHASES, Phase
from hf_contmerge.run.released import RECORD as RELEASED
from hf_contmerge.run.released import SHAPE as RELEASED_SHAPE
from hf_contmerge.runtime.digests import DIGESTS, changed_files
from hf_contmerge.runtime.records import Record, read_lines, read_record
from hf_contmerge.training.job import OWN

_IGNORED = {".lock", ".report.lock"}


class Damage(NamedTuple):
    """A file with other bytes than recorded."""

    file: Path
    what: str
    redo: str
    """What to do about it."""


@dataclass
class Reading:
    """The files read below a folder, and the damaged ones."""

    folder: Path
    read: set[Path] = field(default_factory=set)
    damages: list[Damage] = field(default_factory=list)
    given_up: Set[Path] = frozenset()
    """Files that may be missing."""

    def record(self, file: Path, redo: str, shape: Mapping[str, Any] = MappingProxyType({})) -> Record:
        """Read a record; a damaged one is empty. `shape`: as in `read_record`."""
        self.read.add(file)
        try:
            return read_record(file, "", shape)
        except RunError as error:
            self.damages.append(Damage(file, str(error).strip(), redo))
            return {}

    def files(self, folder: Path, digests: Mapping[str, str], redo: str) -> None:
        """Compare files with their digests."""
        self.read.update(folder / name for name in digests)
        for name in changed_files(folder, digests):
            file = folder / name
            what = f"{file} {'changed after it was written' if file.exists() else 'is missing'}."
            self.damages.append(Damage(file, what, redo))

    def base(self, identity: Identity, name: str, folder: Path, redo: str) -> None:
        """Compare a base with its record."""
        try:
            base = folder if folder.is_dir() else resolve_model(name)
            changed = identity.changed(base, whole=True)
        except ContmergeError as error:
            self.damages.append(Damage(folder, str(error), redo))
            return
        self.damages += [Damage(base / n, f"{base / n}, of the base, changed.", redo) for n in changed]

    def uncovered(self) -> list[Path]:
        """Return the files below the folder without a record."""
        every = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and not path.is_symlink())
        return [path for path in every if path not in self.read and path.name not in _IGNORED]


def verify_run(run: Run) -> Reading:
    """Read all files of a run."""
    reading = Reading(run.folder, {run.folder / "recipe.yml"})
    if (run.folder / RELEASED).exists():
        redo = "Remove it: it lists the weights that the run gave up."
        known = reading.record(run.folder / RELEASED, redo, RELEASED_SHAPE)
        reading.given_up = {run.folder / name for name in known.get("released", ())}
    again = f"Start the run again: {run.command}"
    if run.inputs.exists() or run.has_results():
        inputs = reading.record(run.inputs, run.inputs_cure)
        reading.files(run.tasks, inputs.get("tasks", {}), f"{again}, which writes the tasks.")
        if "base" in inputs:
            redo = "Restore it, or choose a new folder with --run."
            reading.base(Identity.read(inputs["base"]), run.recipe.base_model, run.base_model, redo)
    for t, place in run.places():
        for phase in PHASES:
            _verify_phase(reading, run, t, place, phase)
        for part in _inner_places(place):
            for phase in ("train", "score"):
                _verify_phase(reading, run, t, part, phase)
        if isinstance(place, MergePlace):
            _verify_merge_files(reading, place, again)
    if (before := run.folder / "from" / LINEAGE).is_file():
        redo = f"Remove {before.parent}, and start the run again: it is fetched anew."
        reading.files(before.parent, reading.record(before, redo).get("files", {}), redo)
    for out in sorted(run.folder.glob("remix/*/")):
        record = reading.record(out / REMIX, f"Remove {out}, and give its command again.")
        reading.files(out, record.get("files", {}), f"Remove {out}, and give `contmerge remix` again.")
    if run.report.is_done("report"):
        reading.record(run.folder / "report.json", again)
    if (run.folder / "report").is_dir():
        redo = f"Write the report again: contmerge report {shell_word(run.folder)}"
        record = reading.record(run.folder / "report" / DIGESTS, redo)
        reading.files(run.folder / "report", record.get("files", {}), redo)
    for file in run.folder.glob(f"stages/*/[be]*/*/*/checkpoint-*/{DIGESTS}"):  # of experts and baselines
        redo = f"{again}, which resumes from an earlier checkpoint."
        reading.files(file.parent, reading.record(file, redo).get("files", {}), redo)
    return reading


def _verify_merge_files(reading: Reading, place: MergePlace, again: str) -> None:
    if place.guard_file.exists():
        reading.record(place.guard_file, again)
    reading.read.add(place.mergekit_recipe)
    try:
        place.check_recipe()
    except RunError as error:
        reading.damages.append(Damage(place.mergekit_recipe, str(error), ""))


def _inner_places(place: Place) -> Iterator[Place]:
    yield place.validation
    if isinstance(place, MergePlace):
        yield place.replayed
        yield from (ExpertPlace(folder, "earlier") for folder in sorted(place.folder.glob("earlier/*")))


def _verify_phase(reading: Reading, run: Run, t: int, place: Place, phase: Phase) -> None:
    if not place.is_done(phase):
        return
    stage = f" --stage {run.stage(t).name}" if t else ""
    redo = f"Redo it: contmerge redo {shell_word(run.folder)} {phase}{stage}, then contmerge run."
    record = reading.record(place.folder / f"{phase}.json", redo)
    files: Mapping[str, str] = record.get("files", {})
    if isinstance(place, MergePlace) and phase == "merge" and _is_pruned(run, t, place):
        files = {name: digest for name, digest in files.items() if not name.startswith("running/")}
    reading.files(place.folder, _without(reading.given_up, place.folder, files), redo)
    if isinstance(place, ExpertPlace) and phase == "train":
        given = Path(record.get("given") or place.folder / "expert")
        reading.files(given, record.get("given_files", {}), "Restore it.")
        _verify_statistics(reading, given)


def _without(given_up: Set[Path], folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of files, without missing released ones."""
    return {n: d for n, d in files.items() if folder / n not in given_up or (folder / n).exists()}


def _is_pruned(run: Run, t: int, place: MergePlace) -> bool:
    """Check for a state already read and removed by the next stage."""
    later = t < len(run.recipe.stages) and run.merged(t + 1, place.entry).is_done("merge")
    return later and not place.running.exists()


def _verify_statistics(reading: Reading, expert: Path) -> None:
    file = expert / STATISTICS_RECORD
    if file.exists():
        redo = f"Measure it again: contmerge statistics {shell_word(expert)} --data FILE"
        reading.files(file.parent, reading.record(file, redo).get("files", {}), redo)


def verify_state(state: MergeState) -> Reading:
    """Read all files of a state."""
    reading, redo = Reading(state.folder), "Restore it from a copy, or fold the experts into a new state."
    if not reading.record(state.folder / "state.json", redo):
        return reading
    log = state.log()
    reading.base(log.base_identity(), log.base, Path(log.base_folder), "Restore it, or start a new state.")
    reading.files(state.folder, log.running_files, redo)
    for expert in log.experts:
        reading.files(Path(expert.folder), expert.files, "Restore it: `contmerge merge drop` reads it.")
    _verify_lines(reading, state)
    _verify_scores(reading, state.folder)
    return reading


def _verify_lines(reading: Reading, state: MergeState) -> None:
    file = state.folder / "exports.jsonl"
    reading.read.add(file)
    try:
        read_lines(file, "")
    except RunError as error:
        reading.damages.append(Damage(file, str(error).strip(), "Remove it: it only lists the written models."))


def _verify_scores(reading: Reading, folder: Path) -> None:
    """Read the scores of a state's stages."""
    redo = "Restore it from a copy, or remove it: the next stage measures it again."
    for file in (StageScores(folder).settings_file, *sorted((folder / "stages").glob("*/scores.json"))):
        if file.exists():
            reading.record(file, redo)
    for file in (folder / "measured/base/score.json", *sorted((folder / "stages").glob("*/measured/*/score.json"))):
        if file.exists():
            reading.files(file.parent, reading.record(file, redo).get("files", {}), redo)


def verify_model(folder: Path) -> Reading:
    """Read the files of a written model or a trained expert."""
    reading = Reading(folder)
    for file in (folder / LINEAGE, folder / OWN / "train.json"):
        if file.exists():
            redo = "Export or fetch it again." if file.name == LINEAGE else "Train it again."
            reading.files(folder, reading.record(file, redo).get("files", {}), redo)
    _verify_statistics(reading, folder)
    if not reading.read:
        raise RunError(
            f"{folder} holds no run, no state, and no record of a model ({LINEAGE}, {OWN}/train.json): nothing says "
            "what its files should be. Give a folder that contmerge wrote, or owner/model of one that it pushed."
        )
    return reading
