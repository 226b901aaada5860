"""`contmerge remix`: weights of stages, searched after a run.

    RUN/remix/<what was asked>/
      remix.json    the question, every attempt, the front, scores on test documents, digests of the files
      front.png     learning against keeping
      state/        a merge state with the chosen weights (merging/state.py)
      merged/       its model, with its lineage in merge.json

Choices see validation documents alone; the result is measured on the others. The scores of attempts lie in the score
cache, so that a stopped search resumes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_contmerge.errors import RecipeError, RunError, shell_word, unknown
from hf_contmerge.loop._entries import kinds_of, make_entry_rule
from hf_contmerge.loop.functions import open_state
from hf_contmerge.loop.inputs import check_same_base
from hf_contmerge.merge_rules import MergeRule, rule_class, rule_names
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge, require_linear
from hf_contmerge.merging.mixing import separated
from hf_contmerge.merging.rules import make_rule
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.layout import check_loads
from hf_contmerge.models.statistics import check_statistics
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.run.scores import Scores
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.digests import digests_below
from hf_contmerge.runtime.files import make_folder, remove
from hf_contmerge.runtime.records import Record, read_record, write_record
from hf_contmerge.runtime.shapes import REMIX
from hf_contmerge.runtime.versions import check_versions, versions
from hf_contmerge.scoring.cache import ScoreCache
from hf_contmerge.scoring.forgetting.budget import GENERAL, Shift
from hf_contmerge.scoring.forgetting.paired import CONFIDENCE, Change
from hf_contmerge.scoring.forgetting.search import (
    Kept,
    Point,
    allowed,
    best_weights,
    front,
    gain_kept,
    losses,
    what_is_kept,
)
from hf_contmerge.scoring.keys import DocumentPart, ScoreRequest
from hf_contmerge.scoring.score import score_model
from hf_contmerge.scoring.tasks import check_tasks
from hf_contmerge.scoring.trials import Trials, check_in_memory

LOG = logging.getLogger(__name__)

RECORD = "remix.json"
NOTHING = "nothing"
"""Kept alone, the word for no group at all, unless the run has a stage or task of that name."""
_CURE = "Remove its folder, and give the command again."
_PARTS = ("state", "merged", ".parts")


@dataclass(frozen=True)
class Wish:
    """The question of a remix."""

    want: Mapping[str, float]
    """Stage -> how much its learning counts; folded in the run's order. 0: its expert may help, its tasks do not
    count."""
    keep: tuple[str, ...] | None = None
    """Groups of tasks that must not fall below the base: general, stages, tasks. None: general, if measured."""
    entry: str | None = None
    """The merge entry whose rule and experts are used; default: the first with a linear rule."""
    rule: str | None = None
    """Another linear rule, with its defaults."""
    tries: int = 64

    def folder_name(self) -> str:
        """Return a name for the result."""
        words = [f"{stage}-{weight:g}" for stage, weight in self.want.items()]
        words += [f"keep-{'-'.join(self.keep) or NOTHING}"] if self.keep is not None else []
        return "_".join([*words, *filter(None, (self.entry, self.rule))])[:120]


@dataclass(frozen=True)
class Candidate:
    """Weights of stages and their effect on validation documents."""

    weights: Point
    learning: Change
    """Share of the experts' gain; 1 is all."""
    changes: tuple[Shift, ...]
    """Of each kept group against the base."""
    kept: Kept
    seconds: float

    @property
    def worst(self) -> Shift | None:
        """The kept group with the lowest change."""
        return min(self.changes, key=lambda shift: shift.change.mean, default=None)

    @property
    def point(self) -> tuple[float, float]:
        return self.learning.mean, self.worst.change.mean if self.worst else 0.0

    def to_json(self, keeps: bool) -> dict[str, Any]:
        """Return the fields of the record.

        `keeps`: no kept group falls below the base, beyond noise.
        """
        change = self.learning
        return {
            "weights": list(self.weights),
            "learning": {"mean": change.mean, "low": change.low, "high": change.high},
            "kept": [shift.to_json() for shift in self.changes], "keeps": keeps, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Remix:
    """A run's stored experts, and the question asked of them."""

    run: Run
    wish: Wish
    base: Path
    rule_name: str
    rule: MergeRule
    entry: Merge
    kind: str
    """Of the experts."""
    experts: tuple[FoldedExpert, ...]
    groups: Mapping[str, tuple[str, ...]]
    """Kept group -> its tasks."""
    crew: Crew

    @classmethod
    def find(cls, run: Run, wish: Wish, crew: Crew, *, trust_remote_code: bool = False) -> Remix:
        """Find a wish's experts, rule and tasks.

        Raises:
            RecipeError: an unknown stage, group or entry; a rule that is not linear.
            RunError: an expert is missing or damaged.
            ModelError: the base has changed, or an expert lacks statistics that the rule needs.
        """
        recipe = run.recipe
        if recipe.continue_from:
            raise RecipeError(
                f"{run.folder} continues {recipe.continue_from}, whose experts are not in the run: their weights "
                "cannot be searched."
            )
        run.require_same_plugins()
        if recipe.trust_remote_code and not trust_remote_code:
            raise RecipeError(
                f"The run lets {recipe.base_model} run its own code; read that code, then add --trust-remote-code."
            )
        check_in_memory(recipe.evaluate)
        _check_wanted(run, wish)
        wish = replace(wish, want={s.name: wish.want[s.name] for s in recipe.stages if s.name in wish.want})
        groups = _kept_groups(run, wish)
        entry, rule = _linear_entry(run, wish)
        kind = _kind(run, wish, entry)
        experts = tuple(_expert(run, stage, kind) for stage in wish.want)
        check_statistics(rule, [expert.folder for expert in experts])
        base = resolve_model(recipe.base_model)
        check_same_base(run, base, whole=False)
        check_loads(base, trusted=recipe.trust_remote_code)
        run.settle()
        run.check_tasks()
        found = cls(run, wish, base, entry.rule, rule, entry, kind, experts, groups, crew)
        check_tasks(
            found.tasks, recipe.evaluate.task_folders(run.tasks), split=True, limit=recipe.evaluate.limit,
            trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip
        return found

    @cached_property
    def stages(self) -> dict[str, tuple[str, ...]]:
        """Wanted stage -> its tasks."""
        return {s.name: s.task_names() for s in self.run.recipe.stages if self.wish.want.get(s.name)}

    @property
    def tasks(self) -> list[Task]:
        """The tasks behind choices."""
        names = {name for tasks in (*self.stages.values(), *self.groups.values()) for name in tasks}
        return [task for task in self.run.recipe.measured(self.run.stage_numbers()) if task.name in names]

    def inputs(self) -> dict[str, Any]:
        """Return the inputs of the result."""
        return {
            "want": dict(self.wish.want), "keep": list(self.groups), "tries": self.wish.tries, "rule": self.rule_name,
            "parameters": self.rule.parameters(), "experts": [e.sha256 for e in self.experts],
            "evaluate": self.run.recipe.evaluate.measured_by(),
        }  # fmt: skip

    def measure(self, model: Path, tasks: Sequence[Task], part: DocumentPart) -> Scores:
        """Return a stored model's scores on all ranks."""
        recipe, ranks = self.run.recipe, self.crew.ranks
        scores = score_model(
            model, tasks, task_folder=self.run.tasks, evaluate=recipe.evaluate, ranks=ranks, base=self.base,
            trust_remote_code=recipe.trust_remote_code, part=part,
        )[1]  # fmt: skip
        return ranks.first(lambda: scores)

    def trained_seconds(self) -> list[float]:
        """Return the seconds of training per stage, as far as recorded."""
        places = (_place(self.run, e.stage, self.kind) for e in self.experts)
        return [seconds for place in places if (seconds := place.record("train").get("seconds")) is not None]


def remix(of: Remix, out: Path) -> Record:
    """Search weights and write the merge, once; return the record.

    All ranks call this together.

    Raises:
        RunError: `out` holds something else.
    """
    done = of.crew.ranks.first(_begin, of, out)
    if done:
        return done
    check_versions(of.crew.ranks)
    start = time.monotonic()
    of.crew.ranks.first(make_folder, out / ".parts")
    search = Search(of, out / ".parts")
    chosen = search.run()
    seconds = round(time.monotonic() - start, 1)
    of.crew.ranks.first(remove, out / ".parts")
    _write_merge(of, chosen, out)
    judged = _judged(of, out / "merged")
    record = {"inputs": of.inputs(), **search.to_json(chosen), "search_seconds": seconds, **judged}
    return of.crew.ranks.first(_finish, record, out)


class Search:
    """Attempts at weights for one wish."""

    def __init__(self, of: Remix, scratch: Path) -> None:
        self._of, self.tries = of, list[Candidate]()
        recipe, crew = of.run.recipe, of.crew
        self._base = of.measure(of.base, of.tasks, "validation")
        self._alone = {
            e.stage: of.measure(e.folder, [t for t in of.tasks if t.name in of.stages[e.stage]], "validation")
            for e in of.experts
            if e.stage in of.stages
        }
        merge = RunningMerge(of.base, of.rule_name, of.rule)
        self._parts = separated(merge, of.experts, scratch, crew)
        request = ScoreRequest(of.tasks, of.run.tasks, recipe.evaluate, "validation", recipe.trust_remote_code)
        self._trials = Trials(of.base, request, crew.ranks, ScoreCache.open(use=recipe.evaluate.cache))

    def run(self) -> Candidate:
        """Return the best of the allowed candidates."""
        self._tell_idle()
        tops = [max(1.0, 1 / share) if share else 0.0 for share in self._parts.shares]  # 0: nothing to try
        many = len(tops)
        alone = [tuple(top * (i == j) for j in range(many)) for i, top in enumerate(tops)]
        weights = self._of.entry.weights
        own = tuple(weights.get(e.stage, 1.0) * (top > 0) for e, top in zip(self._of.experts, tops, strict=True))
        best = best_weights(self._attempt, tops, [own, *alone], self._of.wish.tries)
        return next(t for t in self.tries if t.weights == best)

    def _tell_idle(self) -> None:
        """Warn of stages whose weights do nothing.

        Raises RecipeError if no weight does anything.
        """
        of, shares = self._of, self._parts.shares
        idle = [e.stage for e, share in zip(of.experts, shares, strict=True) if not share]
        settings = ", ".join(f"{word} {value}" for word, value in of.rule.parameters().items())
        told = (
            f"{of.rule_name} ({settings}) takes nothing of the stage{'s' * (len(idle) > 1)} {', '.join(idle)}, whose "
            "weights therefore do nothing"
        )
        if len(idle) == len(shares):
            raise RecipeError(f"{told}. Name another rule with --rule, such as average.")
        if idle and of.crew.ranks.is_main:
            LOG.warning("Warning: %s and are 0. To weigh them, name another rule with --rule, such as average.", told)

    def to_json(self, chosen: Candidate) -> dict[str, Any]:
        """Return the fields of the record."""
        shown = {id(self.tries[i]) for i in front([t.point for t in self.tries])}
        tries = zip(self.tries, allowed(t.kept for t in self.tries), strict=True)
        return {
            "stages": [e.stage for e in self._of.experts], "weights": list(chosen.weights),
            "tries": [{**t.to_json(ok), "front": id(t) in shown, "taken": t is chosen} for t, ok in tries],
            "trained_seconds": self._of.trained_seconds(),
        }  # fmt: skip

    def _attempt(self, weights: Point) -> tuple[Kept, float]:
        start, of = time.monotonic(), self._of
        made_of = [
            of.rule_name,
            of.rule.parameters(),
            [[e.sha256, w] for e, w in zip(of.experts, weights, strict=True)],
        ]
        scores = self._trials.score(made_of, self._parts.model.at(weights).tensor)
        learning = gain_kept(scores, self._base, self._alone, of.stages, of.wish.want)
        assert learning
        kept = what_is_kept(scores, self._base, of.groups, CONFIDENCE)
        seconds = round(time.monotonic() - start, 2)
        changes = tuple(losses(scores, self._base, of.groups))
        self.tries.append(Candidate(weights, learning, changes, kept, seconds))
        if of.crew.ranks.is_main:
            words = ", ".join(f"{e.stage} {w:.3g}" for e, w in zip(of.experts, weights, strict=True))
            LOG.info("remix %d of %d: %s: %.3f of the gain", len(self.tries), of.wish.tries, words, learning.mean)
        return kept, learning.mean


def _begin(of: Remix, out: Path) -> Record | None:
    """Return a finished remix's record; clear a stopped one's rest."""
    file = out / RECORD
    if not file.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty and holds no remix. Name another folder with --out.")
    if file.exists():
        record = read_record(file, _CURE, REMIX)
        if record["inputs"] != json.loads(json.dumps(of.inputs())):
            raise RunError(f"{out} holds another remix (see {RECORD}). Name another folder with --out, or remove it.")
        if "weights" in record:
            return record
    for name in _PARTS:
        remove(out / name)
    make_folder(out)
    write_record(file, {"inputs": of.inputs()})
    return None


def _write_merge(of: Remix, chosen: Candidate, out: Path) -> None:
    """Write state and model with the chosen weights."""
    recipe, entry = of.run.recipe, of.entry
    parameters, weights = of.rule.parameters(), chosen.weights
    state = open_state(out / "state", base=recipe.base_model, rule=of.rule_name, parameters=parameters, crew=of.crew)
    folders = [str(e.folder.resolve()) for e in of.experts]
    stages = [e.stage for e in of.experts]
    state.add(*folders, stages=stages, weights=weights, force=True, crew=of.crew)
    last = len(recipe.stages)
    tokenizer = recipe.tokenizer_model(last, entry)
    dtype = None if entry.dtype == "auto" else entry.dtype
    state.export(
        out / "merged", dtype=dtype, rounding=entry.rounding, shard_size=entry.shard_size, tokenizer_from=tokenizer,
        crew=of.crew,
    )  # fmt: skip


def _judged(of: Remix, merged: Path) -> dict[str, Any]:
    """Measure the result on test documents, next to the run's merge."""
    run, recipe = of.run, of.run.recipe
    tasks = list(recipe.measured(run.stage_numbers()))
    groups = {s.name: s.task_names() for s in recipe.stages if s.task_names()}
    if recipe.evaluate.general_tasks:
        groups[GENERAL] = recipe.evaluate.general_names
    base = of.measure(of.base, tasks, "test")
    models = {"remix": merged}
    own = next((entry for entry in recipe.merge if entry.name == of.entry.name), None)
    place = run.merged(len(recipe.stages), own) if own else None
    if place and place.is_done("merge") and place.model.is_dir():
        models[f"{of.entry.name} of the run"] = place.model
    found = {name: losses(of.measure(model, tasks, "test"), base, groups) for name, model in models.items()}
    return {"test": {name: [shift.to_json() for shift in shifts] for name, shifts in found.items()}}


def _finish(record: Record, out: Path) -> Record:
    from hf_contmerge.report.front import write_front

    write_front(record, out / "front.png")
    files = {name: digest for name, digest in digests_below(out).items() if name != RECORD}
    write_record(out / RECORD, {**record, "versions": versions([record["inputs"]["rule"]]), "files": files})
    return read_record(out / RECORD, _CURE, REMIX)


# Checks


def _check_wanted(run: Run, wish: Wish) -> None:
    stages = {stage.name: stage for stage in run.recipe.stages}
    for name, weight in wish.want.items():
        if name not in stages:
            raise RecipeError(unknown("stage", name, stages, where=f"--want; the run is {run.folder}"))
        if not (math.isfinite(weight) and weight >= 0):
            raise RecipeError(f"--want {name}={weight:g}: expected a number of 0 or more.")
        if weight and not stages[name].task_names():
            raise RecipeError(
                f"--want {name}: the stage has no tasks (`heldout` text or `tasks`), so what it learns is not known. "
                "Leave it out, or give it the weight 0."
            )
    if not any(wish.want.values()):
        raise RecipeError("--want names no stage with a weight above 0: there is nothing to search for.")
    if wish.tries < 1:
        raise RecipeError(f"--tries {wish.tries}: expected 1 or more.")


def _kept_groups(run: Run, wish: Wish) -> dict[str, tuple[str, ...]]:
    """Return kept group -> its tasks."""
    recipe = run.recipe
    general = recipe.evaluate.general_names
    if wish.keep is None:
        return {GENERAL: general} if general else {}
    every = [task.name for task in recipe.measured(run.stage_numbers())]
    known = {**{name: (name,) for name in every}, **{s.name: s.task_names() for s in recipe.stages}, GENERAL: general}
    if wish.keep == (NOTHING,) and NOTHING not in known:
        return {}
    for name in wish.keep:
        if name not in known:
            raise RecipeError(unknown("group of tasks", name, known, where="--keep"))
        if not known[name]:
            raise RecipeError(f"--keep {name}: the run measures no such tasks. Leave it out.")
    return {name: known[name] for name in wish.keep}


def _linear_entry(run: Run, wish: Wish) -> tuple[Merge, MergeRule]:
    """Return the entry to use and its rule.

    Raises RecipeError for a rule that is not linear.
    """
    entries = {entry.name: entry for entry in run.recipe.merge}
    if wish.rule:
        rule = make_rule(wish.rule, {}, where="--rule")
        require_linear(wish.rule, rule, [0.0], where="--rule")
        return Merge(rule=wish.rule), rule
    if wish.entry and wish.entry not in entries:
        raise RecipeError(unknown("merge entry", wish.entry, entries, where="--merge"))
    rules = {name: make_entry_rule(entry) for name, entry in entries.items()}
    linear = [name for name, rule in rules.items() if rule.linear]
    name = wish.entry or next(iter(linear), None)
    if name is None or not rules[name].linear:
        given = entries[name].rule if name else " and ".join(entry.rule for entry in entries.values())
        known = ", ".join(n for n in rule_names() if rule_class(n).linear)
        raise RecipeError(
            f"{given} is not linear in the experts, so they cannot be weighted afterwards. Name a rule that is with "
            f"--rule: {known}."
        )
    return entries[name], rules[name]


def _kind(run: Run, wish: Wish, entry: Merge) -> str:
    """Return the kind of the experts to mix."""
    if not wish.rule:
        return kinds_of(run.recipe)[entry.name]
    kinds = run.expert_kinds()
    return next((k for k in (rule_class(wish.rule).start_from, *kinds) if k in kinds), "base")


def _place(run: Run, stage: str, kind: str) -> ExpertPlace:
    return run.expert([s.name for s in run.recipe.stages].index(stage) + 1, kind)


def _expert(run: Run, stage: str, kind: str) -> FoldedExpert:
    """Return a stored expert.

    Raises RunError if it is not there, or damaged.
    """
    place = _place(run, stage, kind)
    if not place.is_done("train"):
        raise RunError(f"The run {run.folder} stores no expert of stage {stage} yet. Train it first: {run.command}")
    missing = [file for file in place.damaged("train", "expert") if not file.exists()]
    if missing or not place.model.is_dir():
        raise RunError(
            f"The expert of stage {stage} was deleted ({missing[0] if missing else place.model} is missing). Restore "
            f"it, or train it again with `contmerge redo {shell_word(run.folder)} train --stage {stage}` and "
            "`contmerge run`; or leave the stage out of --want."
        )
    place.check("train", "expert")
    return FoldedExpert(stage, place.model, place.record("train")["model_sha256"], name=f"Stage {stage}")
