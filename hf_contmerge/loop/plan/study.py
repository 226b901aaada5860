"""The checks and the plan of a study: runs and times."""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_contmerge.errors import RecipeError, RunError, shell_word, unknown
from hf_contmerge.loop.plan.plan import Findings, check_run, make_plan
from hf_contmerge.loop.study import StudyFolder
from hf_contmerge.models.identity import Identity, model_files
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import JOINT, ExpertPlace
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.study import StudyCell
from hf_contmerge.run.steps import Step, run_steps
from hf_contmerge.runtime.digests import digests_below, digests_of
from hf_contmerge.training.job import rows_sha256
from hf_contmerge.training.joint import joint_train
from hf_contmerge.training.settings import make_strategies

if TYPE_CHECKING:
    from hf_contmerge.loop.plan._planned import PlannedRun


@dataclass
class StudyPlan:
    """Runs that are left, and their estimated seconds."""

    cells: int
    left: int = 0
    """Runs that are not complete. All that follows is theirs."""
    trainings: int = 0
    """Without sharing."""
    trained: int = 0
    """With sharing."""
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "merge": 0.0, "score": 0.0})
    """By phase."""
    disk_bytes: int = 0
    """Added at the end, without sharing; with `keep: scores`, the most on the way."""
    findings: Findings = field(default_factory=Findings)


def plan_study(folder: StudyFolder, *, trust_remote_code: bool = False) -> StudyPlan:
    """Check a cell of each unfinished setting; estimate the rest from these."""
    plan, shared, merged = StudyPlan(len(folder.cells)), _Shared.of(folder), 0
    checks = _Checks(folder, trust_remote_code)
    with _saying_once():
        for cells in checks.unfinished(folder.cells):
            first, *others = checks.worth_a_look(cells)
            phases = checks.plan(first)
            for cell in others:
                checks.look_at(cell)
            if not phases:
                continue
            plan.left += len(cells)
            merged = max(merged, sum(p["disk_kept_bytes"] for p in phases if p["phase"] == "merge"))
            for cell in cells:
                for step, phase in _left(folder.run(cell), phases, first.recipe):
                    plan.disk_bytes += phase["disk_kept_bytes"]
                    if step.phase != "train" or _is_given(cell.recipe, step):
                        plan.seconds[step.phase] += phase["seconds"]
                    else:
                        plan.trainings += 1
                        shared.need(cell.recipe, step, phase)
    plan.trained = len(shared.needed)
    plan.seconds["train"] += sum(seconds for seconds, _ in shared.needed.values())
    if folder.study.keep == "scores":
        plan.disk_bytes = merged + sum(kept for _, kept in shared.needed.values())
    plan.findings = checks.findings()
    return plan


def check_study(folder: StudyFolder, cells: Sequence[StudyCell], *, trust_remote_code: bool = False) -> None:
    """Check all settings of some cells before the first one is run.

    One setting alone is checked by its first run, unless earlier runs may stand on other data.

    Raises:
        RecipeError: a setting cannot run, or cannot be compared with another.
    """
    checks = _Checks(folder, trust_remote_code)
    settings = list(checks.unfinished(cells))
    with _silence():
        for setting in settings:
            for cell in checks.worth_a_look(setting):
                if len(settings) > 1 or folder.run(cell).has_results():
                    checks.look_at(cell)
    refuse(folder, checks.findings())


def refuse(folder: StudyFolder, findings: Findings) -> None:
    """Raise RecipeError for errors that checks have found."""
    if findings.errors:
        listed = "".join(f"\n  {error}" for error in findings.errors)
        raise RecipeError(f"study {folder.study.name} cannot run:{listed}")


# Checks


class _Checks:
    """Checks of a study, whose findings name the settings."""

    def __init__(self, folder: StudyFolder, trust_remote_code: bool) -> None:
        self._folder, self._trust = folder, trust_remote_code
        self._found: dict[str, Findings] = {}
        self._made: dict[tuple[int, str], tuple[str, str]] = {}
        """Seed and task file -> the first setting with it, and its digest."""
        self._digests = functools.cache(lambda folder: digests_of(folder, model_files(folder)))
        self._whole = Findings()
        self._whole.ask(functools.partial(_check_reference, folder))

    def unfinished(self, cells: Sequence[StudyCell]) -> Iterator[list[StudyCell]]:
        """Yield the unfinished cells of each setting that has some."""
        for setting in dict.fromkeys(cell.setting for cell in cells):
            of = [cell for cell in cells if cell.setting == setting]
            if left := [cell for cell in of if not self._folder.run(cell).is_complete()]:
                yield left

    def worth_a_look(self, cells: Sequence[StudyCell]) -> Iterator[StudyCell]:
        """Yield a setting's first cell, and one that has results."""
        yield cells[0]
        every = [cell for cell in self._folder.cells if cell.setting == cells[0].setting]
        started = next((cell for cell in every if self._folder.run(cell).has_results()), None)
        if started and started != cells[0]:
            yield started

    def plan(self, cell: StudyCell) -> list[Mapping[str, Any]]:
        """Check a cell; return its phases, finished or not."""
        look = functools.partial(self._compare, cell)
        run, found = self._folder.run(cell), self._of(cell)
        return make_plan(run, found, trust_remote_code=self._trust, whole=True, look=look).get("phases", [])

    def look_at(self, cell: StudyCell) -> None:
        """Check a cell without estimates."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        run, found = self._folder.run(cell), self._of(cell)
        with tempfile.TemporaryDirectory() as scratch:
            planned = check_run(run, found, Path(scratch), processes, trust_remote_code=self._trust)
            if planned:
                self._compare(cell, planned)

    def findings(self) -> Findings:
        """Return all findings; errors of some settings alone name them."""
        all_of = Findings(list(self._whole.errors))
        for what in dict.fromkeys(error for found in self._found.values() for error in found.errors):
            settings = [name for name, found in self._found.items() if what in found.errors]
            named = len({cell.setting for cell in self._folder.cells}) > len(settings)
            all_of.errors.append(f"setting {', '.join(settings)}: {what}" if named else what)
        all_of.notes = list(dict.fromkeys(note for found in self._found.values() for note in found.notes))
        return all_of

    def _of(self, cell: StudyCell) -> Findings:
        return self._found.setdefault(cell.setting, Findings())

    def _compare(self, cell: StudyCell, planned: PlannedRun) -> None:
        made = {name: digest for name, digest in digests_below(planned.tasks).items() if name.endswith(".jsonl")}
        self._of(cell).ask(functools.partial(_require_unchanged, planned, made))
        self._of(cell).ask(functools.partial(self._require_same_models, planned))
        self._of(cell).ask(functools.partial(self._require_same, cell, made))

    def _require_same_models(self, planned: PlannedRun) -> None:
        """Raise RunError for models that a run's finished phases had not."""
        run, scratch = planned.run, planned.tasks.parent  # of other models, only headers lie there
        if not run.has_results() or not run.inputs.exists():
            return
        base = Identity.read(run.input_record()["base"])
        if not planned.base.is_relative_to(scratch) and base.changed(planned.base, whole=False):
            raise _changed(run, f"The base model {planned.recipe.base_model} has")
        trained = [place for _, place in run.places() if isinstance(place, ExpertPlace) and place.is_done("train")]
        for record in (place.record("train") for place in trained):
            folder, files = planned.given.get(record.get("expert", "")), record.get("given_files", {})
            here = self._digests(folder) if folder and files and not folder.is_relative_to(scratch) else files
            if any(here.get(name) != digest for name, digest in files.items()):
                raise _changed(run, f"The expert {record['expert']} has")

    def _require_same(self, cell: StudyCell, made: Mapping[str, str]) -> None:
        """Raise RecipeError for a task with other documents than in another setting."""
        for name, digest in made.items():
            other, known = self._made.setdefault((cell.seed, name), (cell.setting, digest))
            if known != digest:
                raise RecipeError(
                    f"The task {name.removesuffix('.jsonl')} has other documents than in setting {other}, and scores "
                    "of different documents cannot be compared. Give all settings the same, or make a study of each."
                )


def _check_reference(folder: StudyFolder) -> None:
    """Raise RecipeError for a reference that is no line of the study."""
    from hf_contmerge.loop._entries import kinds_of
    from hf_contmerge.report.study import line_names

    asked, known = folder.study.reference, set[str]()
    recipes = {cell.setting: cell.recipe for cell in folder.cells} if asked else {}
    for setting, recipe in recipes.items():
        names = line_names(recipe, kinds_of(recipe).values())
        known |= names | {f"{setting}: {name}" for name in names}
    if asked and asked not in known:
        raise RecipeError(unknown("line", asked, known, where="`reference`"))


def _require_unchanged(planned: PlannedRun, made: Mapping[str, str]) -> None:
    """Raise RunError for data that a run's finished phases had not."""
    run = planned.run
    if not run.has_results():
        return
    before = run.input_record()["tasks"] if run.inputs.exists() else {}
    tasks = {name.removesuffix(".jsonl") for name, digest in made.items() if before.get(name, digest) != digest}
    trained = {name: data.train for name, data in planned.data.items()}
    digest = functools.cache(lambda name: rows_sha256(trained[name]))
    for t, place in run.places():
        known = t and isinstance(place, ExpertPlace) and place.kind != JOINT and place.is_done("train")
        recorded = place.record("train").get("examples_sha256") if known else None
        stage = run.stage(t).name if t else ""
        if recorded and stage in trained and recorded != digest(stage):
            raise _changed(run, f"The data of stage {stage} have")
    if tasks:
        raise _changed(run, f"The data behind the task {min(tasks)} have")


def _changed(run: Run, what: str) -> RunError:
    return RunError(
        f"{what} changed since {run.folder} was made, and a study must not mix the two. Restore the files, undo what "
        f"was made with the old ones (`contmerge redo {shell_word(run.folder)} train`, and so on for each run), or "
        "name another folder with --out."
    )


class _Once(logging.Filter):
    """Lets each line of a handler through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.name, record.getMessage()
        known = line in self._seen
        self._seen.add(line)
        return not known


@contextmanager
def _saying_once() -> Iterator[None]:
    """Say each log line once: settings share most of their data."""
    filters = [(handler, _Once()) for handler in logging.root.handlers]
    for handler, once in filters:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler, once in filters:
            handler.removeFilter(once)


@contextmanager
def _silence() -> Iterator[None]:
    """Leave warnings to the runs, which check again."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


# Sums


@dataclass
class _Shared:
    """Experts that a study trains once for all runs."""

    stored: set[str]
    """Keys of those that are there."""
    needed: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Key -> seconds and bytes of those that are not."""

    @classmethod
    def of(cls, folder: StudyFolder) -> _Shared:
        if not folder.experts.is_dir():  # `keep: scores` has removed them
            return cls(set())
        runs = [folder.run(cell) for cell in folder.cells]
        places = [(run.recipe, t, place) for run in runs for t, place in run.places() if place.is_done("train")]
        return cls({_key(recipe, t, p.kind) for recipe, t, p in places if isinstance(p, ExpertPlace)})

    def need(self, recipe: Recipe, step: Step, phase: Mapping[str, Any]) -> None:
        """Count an unfinished training, once for all runs that need its expert."""
        assert isinstance(step.place, ExpertPlace)
        key = _key(recipe, step.t, step.place.kind)
        if key not in self.stored:
            self.needed[key] = phase["seconds"], phase["disk_kept_bytes"]


def _left(run: Run, phases: Sequence[Mapping[str, Any]], planned: Recipe) -> Iterator[tuple[Step, Mapping[str, Any]]]:
    """Yield a run's unfinished steps, each with the estimate of its like.

    Another order of the stages has the same steps. A training's time is that of the same stage.
    """
    from hf_contmerge.loop._entries import kinds_of

    names = [stage.name for stage in planned.stages]
    of_stage = {(names[p["stage"] - 1], _kind(p) == JOINT): p for p in phases if p["phase"] == "train"}
    for step, phase in zip(run_steps(run, kinds_of(run.recipe)), phases, strict=True):
        if not step.done and step.phase == "train" and _kind(phase) != JOINT:
            yield step, of_stage[run.stage(step.t).name, False]
        elif not step.done:
            yield step, phase


def _is_given(recipe: Recipe, step: Step) -> bool:
    """Say if a step takes an expert that is not trained."""
    joint = isinstance(step.place, ExpertPlace) and step.place.kind == JOINT
    return not joint and recipe.stages[step.t - 1].dataset is None


def _kind(phase: Mapping[str, Any]) -> str:
    return phase["place"].rpartition("/")[2]


def _key(recipe: Recipe, t: int, kind: str) -> str:
    """Return a key of an expert's inputs; equal keys, equal experts."""
    data = [s.model_dump(mode="json", include={"dataset", "expert", "minus"}) for s in recipe.stages[:t]]
    if kind == JOINT:  # in any order of the stages
        key = [recipe.seed, joint_train(recipe).model_dump(mode="json"), sorted(map(json.dumps, data))]
        return json.dumps([JOINT, recipe.base_model, *key], sort_keys=True)
    trains = [recipe.train_of(stage) for stage in recipe.stages[:t]]
    stages = [[own, train.model_dump(mode="json")] for own, train in zip(data, trains, strict=True)]
    entry = [m.model_dump(mode="json") for m in recipe.merge if f"merged-{m.name}" == kind]
    remembers = t == 1 and bool(make_strategies(trains[0]).overriding("remember"))  # what later stages need
    start = ["base", stages[-1:], remembers] if kind == "base" else [kind, stages, entry]
    return json.dumps([recipe.base_model, recipe.seed, start], sort_keys=True)
