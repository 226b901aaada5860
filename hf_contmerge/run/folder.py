"""The run folder and its phases.

    runs/<name>/
      recipe.yml                                   the recipe with every default, frozen at the first start
      inputs.json                                  digests of the base model and of the tasks' files
      tasks/<task>.yaml <task>.parquet             lm-eval tasks, for the stock `lm_eval` command too
            <task>.jsonl                           the same rows, for people
      stages/00-base/  model score.json            a link to the base model; its scores are row 0
                       score.parquet               next to each score.json: results per document
      stages/01-law/
        experts/<kind>/  expert/ train.json score.json         kind: base, previous, or merged-<merge entry>
        baselines/joint/ expert/ train.json score.json         after the last stage, if the recipe asks
        baselines/{oracle,routed}/ score.json                  separate experts behind a router
        baselines/in_context/ score.json                       the base with training examples in its prompt
        merges/<entry>/  running/ merged/ merge.yml merge.json score.json
                         validation/  with a guard or `auto`: the scores behind the choice
                         replay/      the stage's expert, retrained by a guard
                         guard.json   failed attempts, if no merge held the budget
      report/ index.html report.md scores.csv summary.json forgetting.png
      report.json                                  written when everything above is done

A phase (train, merge, score, report) writes into a hidden scratch folder, renames it, and writes its record
`<phase>.json` last; it is done when its record exists. After a crash only the interrupted phase runs again. Only this
module and places.py know these names.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.errors import ResourceError, RunError, shell_word, unknown
from hf_contmerge.run.places import FROM_BASE, JOINT, ExpertPlace, MergePlace, Place
from hf_contmerge.run.recipe.changes import FieldChange, changes
from hf_contmerge.run.recipe.phases import PHASES, Phase
from hf_contmerge.run.recipe.schema import Merge, Recipe, Stage
from hf_contmerge.run.recipe.text import load_recipe, read_yaml, recipe_yaml
from hf_contmerge.runtime.digests import changed_files, digests_below
from hf_contmerge.runtime.files import FolderLock, make_folder, sync_folder, write_atomically
from hf_contmerge.runtime.foreign import require_own_files
from hf_contmerge.runtime.notebook import html_table
from hf_contmerge.runtime.plugins import changed, require_given, require_same
from hf_contmerge.runtime.records import Record, read_record, require_seal, seal_yaml, write_record
from hf_contmerge.runtime.shapes import INPUTS

_BASE_MODEL = "stages/00-base/model"

_PATIENCE = 600  # seconds to wait for another process's report


@dataclass(frozen=True)
class Run:
    """A recipe and its run folder.

    Stages count from 1; 0 is the base model.
    """

    folder: Path
    recipe: Recipe

    @classmethod
    def open(cls, recipe: Recipe, folder: str | Path | None = None) -> Run:
        """Start a run, or resume an existing one.

        Raises:
            RunError: a field of the folder's recipe differs, and a finished phase used it.
            ResourceError: the folder is not writable.
        """
        run = cls(Path(folder) if folder else recipe.run_folder(), recipe)
        run.check_folder()
        try:
            make_folder(run.folder)
            with FolderLock(run.folder):
                write_atomically(run._recipe_file, seal_yaml(recipe_yaml(recipe)))
        except OSError as error:
            raise ResourceError(
                f"Cannot write the run folder {run.folder}: {error.strerror}. Name another with --run."
            ) from error
        return run

    def check_folder(self) -> None:
        """Raise RunError if the folder cannot hold this run. Writes nothing.

        Raises RecipeError for a missing plugin of the recipe.
        """
        require_given(self.recipe.plugins, self._recipe_file)
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"{self.folder} is a file. Name a folder with --run.")
        if self._recipe_file.exists():
            _require_own_files(self.folder)
            self._refuse_changes(_frozen(self._recipe_file))
            self.require_same_plugins()
        elif self.folder.exists() and any(not _is_leftover(p) for p in self.folder.iterdir()):
            raise RunError(f"{self.folder} is not empty and holds no run (no recipe.yml). Name another with --run.")

    def require_same_plugins(self) -> None:
        """Raise RunError unless the plugin files behind finished phases are given, unchanged."""
        for _, place in self.places():
            for phase in PHASES:
                versions = place.record(phase).get("versions", {}) if place.is_done(phase) else {}
                made = f"{phase} of {place.folder.relative_to(self.folder / 'stages')}"
                redo = f"contmerge redo {shell_word(self.folder)} {phase}"
                cure = f", drop what it made with `{redo}`, or name another folder with --run"
                require_same(versions, made, cure=cure)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Open an existing run with its frozen recipe."""
        recipe_file = Path(folder) / "recipe.yml"
        if not recipe_file.exists():
            if (Path(folder) / "study.yml").is_file():
                raise RunError(
                    f"{folder} is the folder of a study. Name one of its runs, which are in {Path(folder) / 'runs'}; "
                    f"`contmerge study` shows the study, and its report is {Path(folder) / 'report'}."
                )
            raise RunError(
                f"{folder} holds no run (no recipe.yml). Give the folder that `contmerge run` wrote, such as "
                "runs/quickstart."
            )
        _require_own_files(Path(folder))
        return cls(Path(folder), _frozen(recipe_file))

    def _repr_html_(self) -> str:
        """Return the finished phases as a table, for notebooks."""
        rows = [
            (place.folder.relative_to(self.folder / "stages"), *("✓" if place.is_done(p) else "" for p in PHASES[:-1]))
            for _, place in self.places()
        ]
        state = "complete" if self.is_complete() else f"not complete; {self.command}"
        return html_table(f"{self.recipe.name}: {self.folder}, {state}", ("", *PHASES[:-1]), rows)

    def is_complete(self) -> bool:
        """Return True if this exact recipe is done.

        Reads at most two files, so that finished runs answer at once.
        """
        if not self.report.is_done("report") or not (self.folder / "report").is_dir():
            return False
        record = self.report.record("report")
        return record.get("recipe_sha256") == self.recipe_sha256() and not changed(record.get("versions", {}))

    def recipe_sha256(self) -> str:
        fields = json.dumps(self.recipe.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()

    def scores_sha256(self) -> str:
        """Return the digest of all score records.

        A phase that is done again is scored again.
        """
        records = (place.record_bytes("score") for _, place in self.places())
        return hashlib.sha256(b"\n".join(records)).hexdigest()

    @property
    def report(self) -> Place:
        """Place of the report folder and its record."""
        return Place(self.folder)

    def report_lock(self) -> FolderLock:
        """Lock the report: a run and `contmerge report` take turns."""
        return FolderLock(self.folder, ".report.lock", wait=_PATIENCE)

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    @property
    def inputs(self) -> Path:
        """Record of the phases' inputs: the base, the tasks' files."""
        return self.folder / "inputs.json"

    @property
    def base(self) -> Place:
        return Place(self.folder / "stages" / "00-base")

    @property
    def base_model(self) -> Path:
        """Link to the base model's folder, for mergekit recipes."""
        return self.folder / _BASE_MODEL

    inputs_cure = (
        "Restore it from a copy, or drop all phases with `contmerge redo RUN train` and remove it, then run the recipe "
        "again."
    )

    def input_record(self) -> Record:
        """Return the phases' inputs. Raises RunError if the record is damaged."""
        return read_record(self.inputs, self.inputs_cure, INPUTS)

    def changed_tasks(self) -> list[Path]:
        """Return the task files changed since the last start of the run."""
        recorded = self.input_record()["tasks"] if self.inputs.exists() else {}
        return [self.tasks / name for name in changed_files(self.tasks, recorded)]

    def settle(self, *, tasks: bool = True) -> None:
        """Write the run's folder anew into its files, after a move.

        `tasks`: the task files as well, if they are as they were written.
        """
        if not self.inputs.exists():
            return
        record, here = self.input_record(), str(self.folder.resolve())
        if record["folder"] == here:
            return
        if tasks:
            self.check_tasks()
            for file in self.tasks.glob("*.yaml"):
                write_atomically(file, _renamed(file, record["folder"], here))
        for _, place in self.places():
            if isinstance(place, MergePlace) and place.mergekit_recipe.exists():
                place.check_recipe()
                text = _renamed(place.mergekit_recipe, record["folder"], here)
                write_atomically(place.mergekit_recipe, seal_yaml(text))
        write_record(self.inputs, {**record, "folder": here, "tasks": digests_below(self.tasks)})

    @property
    def command(self) -> str:
        """The command that starts or resumes the run."""
        return f"contmerge run {shell_word(self._recipe_file)} --run {shell_word(self.folder)}"

    def check_tasks(self) -> None:
        """Raise RunError if a task file has changed."""
        if changed := self.changed_tasks():
            raise RunError(
                f"{changed[0]} is damaged or was edited after the run wrote it. Write the task files again with "
                f"`{self.command}`."
            )

    def has_results(self) -> bool:
        """Check for any finished phase."""
        return any(place.is_done(phase) for _, place in self.places() for phase in PHASES)

    def link_base(self, folder: Path) -> None:
        """Point the link at the base model."""
        make_folder(self.base.folder)
        new = self.base_model.with_name(".model")
        new.unlink(missing_ok=True)
        new.symlink_to(folder.resolve())
        new.replace(self.base_model)  # never missing: recipes of merges name it
        sync_folder(self.base.folder)

    def stage_numbers(self) -> range:
        return range(1, len(self.recipe.stages) + 1)

    def stage(self, t: int) -> Stage:
        return self.recipe.stages[t - 1]

    def expert(self, t: int, kind: str) -> ExpertPlace:
        """Return the place of stage t's expert.

        In the first stage every kind starts from the base: one expert.
        """
        kind = kind if t > 1 else "base"
        return ExpertPlace(self._stage_folder(t) / "experts" / kind, kind)

    @property
    def joint(self) -> ExpertPlace:
        """Place of the expert trained on all stages at once."""
        return ExpertPlace(self.baseline(JOINT).folder, JOINT)

    def baseline(self, name: str) -> Place:
        """Return the place of a yardstick for these stages.

        More stages have another place.
        """
        return Place(self._stage_folder(len(self.recipe.stages)) / "baselines" / name)

    def merged(self, t: int, entry: Merge) -> MergePlace:
        return MergePlace(self._stage_folder(t) / "merges" / entry.name, entry, t)

    def start_of(self, t: int, kind: str) -> Path | None:
        """Return the start model of stage t's expert; None for the base."""
        if t == 1 or kind in FROM_BASE:
            return None
        if kind == "previous":
            return self.expert(t - 1, kind).model
        return self.merged_of(t - 1, kind).model

    def last_merged(self, entry: Merge) -> int:
        """Return the last merged stage of an entry; 0 for none."""
        return max((t for t in self.stage_numbers() if self.merged(t, entry).is_done("merge")), default=0)

    def merged_of(self, t: int, kind: str) -> MergePlace:
        """Return stage t's merge by a kind, `merged-NAME`."""
        return self.merged(t, next(e for e in self.recipe.merge if f"merged-{e.name}" == kind))

    def memory_before(self, t: int, kind: str) -> Path | None:
        """Return the newest memory of the stages before t, if any.

        Independent experts have none.
        """
        if kind in FROM_BASE:
            return None
        folders = (self.expert(i, kind).memory for i in range(t - 1, 0, -1))
        return next((folder for folder in folders if folder.is_dir()), None)

    def expert_kinds(self) -> tuple[str, ...]:
        """Return the trained kinds of expert."""
        later = {f.name for t in self.stage_numbers()[1:] for f in self._stage_folder(t).glob("experts/*")}
        return tuple(sorted(later)) or ("base",)

    def places(self) -> Iterator[tuple[int, Place]]:
        """Yield (stage, place) of existing places, the base first."""
        yield 0, self.base
        for t in self.stage_numbers():
            for folder in sorted(self._stage_folder(t).glob("experts/*")):
                yield t, ExpertPlace(folder, folder.name)
            for entry in self.recipe.merge:
                if self.merged(t, entry).folder.exists():
                    yield t, self.merged(t, entry)
            for folder in sorted(self._stage_folder(t).glob("baselines/*")):
                yield t, ExpertPlace(folder, JOINT) if folder.name == JOINT else Place(folder)

    def redo(self, phase: str, *, stage: str | None = None) -> list[str]:
        """Undo a phase and its dependents; list the undone phases.

        Applies to `stage` and later ones; by default to all stages.
        """
        if phase not in PHASES:
            raise RunError(unknown("phase", phase, PHASES))
        first = self._first_to_redo(phase, stage)
        undone = ["the report"] if self.report.is_done("report") else []
        with self.report_lock():
            self.report.undo("report")
        # Last to first: a crash halfway leaves no gap in the run.
        for t, place in reversed(list(self.places())):
            for each in reversed(_following(phase, t, place, first, whole_run=stage is None)):
                if place.is_done(each):
                    undone.append(f"{each} of {place.folder.relative_to(self.folder)}")
                place.undo(each)
        return undone[::-1]

    def _first_to_redo(self, phase: str, stage: str | None) -> int:
        if stage is None:
            return 1
        names = [s.name for s in self.recipe.stages]
        if stage not in names:
            raise RunError(unknown("stage", stage, names))
        first = names.index(stage) + 1
        if phase in ("train", "merge") and first > 1:
            before = [self.merged(first - 1, e) for e in self.recipe.merge]
            pruned = [p.entry.name for p in before if p.is_done("merge") and not p.running.exists()]
            if pruned:
                raise RunError(
                    f"The running state after {names[first - 2]} was pruned for {', '.join(pruned)} when "
                    f"{stage} was merged. Use `contmerge redo {shell_word(self.folder)} {phase}` to redo all stages."
                )
        return first

    def _stage_folder(self, t: int) -> Path:
        return self.folder / "stages" / f"{t:02d}-{self.stage(t).name}"

    @property
    def _recipe_file(self) -> Path:
        return self.folder / "recipe.yml"

    def _refuse_changes(self, frozen: Recipe) -> None:
        """Raise RunError if a finished phase used a changed field."""
        before = Run(self.folder, frozen)
        done = [(t, place, phase) for t, place in before.places() for phase in PHASES if place.is_done(phase)]
        differences = list(changes(frozen, self.recipe))
        renamed = {change.stage for change in differences if change.field == f"stages.{change.stage}.name"}
        lines, redo = [], set()
        for change in differences:
            users: dict[str, list[str]] = {}
            for t, place, phase in done:
                if _has_used(change, phase, t, place, renamed):
                    users.setdefault(phase, []).append(str(place.folder.relative_to(self.folder / "stages")))
            if users:
                redo.update(users)
                names = "; ".join(f"{phase} of {', '.join(folders)}" for phase, folders in users.items())
                lines.append(f"  {change.field}: {change.old!r} -> {change.new!r}   used by {names}")
        if lines:
            first = min(redo, key=PHASES.index)
            raise RunError(
                f"{self.folder} was made by another recipe:\n" + "\n".join(lines) + "\n"
                f"To apply the change, undo these phases with `contmerge redo {shell_word(self.folder)} {first}` and "
                "run again; to keep both, name another folder with --run."
            )


def _renamed(file: Path, old: str, new: str) -> str:
    """Return a YAML file with one folder in place of another."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(each) for key, each in value.items()}
        if isinstance(value, list):
            return [moved(each) for each in value]
        if not isinstance(value, str):
            return value
        return value.replace(f"{glob.escape(old)}/", f"{glob.escape(new)}/").replace(f"{old}/", f"{new}/")

    return yaml.safe_dump(moved(read_yaml(file.read_text(encoding="utf-8"))), sort_keys=False)


def _frozen(file: Path) -> Recipe:
    """Read a frozen recipe. Raises RunError if it has changed."""
    require_seal(
        file,
        "Restore it from a copy. Changes go into your own recipe: `contmerge run RECIPE --run "
        f"{file.parent}`. A run of an earlier version has no digests: continue it with that version.",
    )
    return load_recipe(file)


def _require_own_files(folder: Path) -> None:
    """Raise RunError for links out of a run."""
    # W&B links each log in its own cache. Nothing here reads that link, and W&B does not write through it.
    logs = (place / "debug-core.log" for place in folder.glob("trackers/wandb/*/logs"))
    require_own_files(folder, error=RunError, besides={folder / _BASE_MODEL, *logs})


def evenly_spread(last: int, most: int) -> tuple[int, ...]:
    """Return stages from 1 to `last`: all, or `most` with both ends."""
    if last <= most:
        return tuple(range(1, last + 1))
    return tuple(1 + round(i * (last - 1) / (most - 1)) for i in range(most))


def _is_leftover(path: Path) -> bool:
    """Return True for leftovers of a first start killed before recipe.yml."""
    return path.name.startswith((".recipe.yml.", ".lock"))


def _following(phase: str, t: int, place: Place, first: int, *, whole_run: bool) -> tuple[Phase, ...]:
    """Return a place's phases to undo with `phase`, from stage `first` on."""
    if t == 0:  # the scores of the base: no merge changes them
        return ("score",) if whole_run and phase in ("train", "score") else ()
    if phase == "merge" and isinstance(place, ExpertPlace):
        return ("train", "score") if place.kind.startswith("merged-") and t > first else ()
    return PHASES[PHASES.index(phase) :] if t >= first else ()


def _has_used(change: FieldChange, done: str, t: int, place: Place, renamed: Container[int | None]) -> bool:
    """Return True if a phase used a changed field."""
    if t == 0 and done == "score":  # row 0: the base model on what all stages measure
        measured = change.phase == "score" or ".dataset." in change.field
        return change.field == "base_model" or (measured and change.stage not in renamed)
    if done != change.phase:
        return False
    if change.merge_entry is not None:
        return isinstance(place, MergePlace) and place.entry.name == change.merge_entry
    return change.stage is None or t >= change.stage
