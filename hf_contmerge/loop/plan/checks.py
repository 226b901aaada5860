"""What is looked up and checked before the first phase, so that bad input is told before hours are spent."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hf_contmerge.errors import ContmergeError, ModelError, RecipeError, ResourceError, size
from hf_contmerge.loop._entries import make_entry_rule, merge_kinds, with_replay
from hf_contmerge.loop.plan.disk import Trained, disk_use, peak_disk
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging.rules import make_rule
from hf_contmerge.merging.vectors import check_origin, check_vector
from hf_contmerge.models.experts import check_mergeable
from hf_contmerge.models.folder import is_adapter, resolve_model
from hf_contmerge.models.layout import check_same_layout, check_tokenizer
from hf_contmerge.models.lora.reader import Adapter
from hf_contmerge.models.lora.settings import is_same_base
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.steps import run_steps
from hf_contmerge.runtime.ranks import Ranks
from hf_contmerge.runtime.versions import check_versions
from hf_contmerge.scoring.files import heldout_documents, write_perplexity_task, write_task
from hf_contmerge.scoring.leaks import leaks
from hf_contmerge.scoring.setup import check_evaluate, check_template
from hf_contmerge.scoring.tasks import check_tasks
from hf_contmerge.train_strategies.full import Full
from hf_contmerge.train_strategies.replay import in_form_of
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.settings import check_stages, check_training, make_strategies

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What was looked up and checked before the first phase."""

    base: Path
    rules: dict[str, MergeRule]
    """Merge entry name -> MergeRule."""
    kinds: dict[str, str]
    """Merge entry name -> the kind of expert that it folds."""
    given: dict[str, Path]
    """Model name in the recipe -> its folder, for given experts and what is taken from them."""
    data: dict[str, StageData]
    """Stage name -> StageData."""


def prepare(run: Run, ranks: Ranks) -> Prepared:
    """Resolve and check all that the recipe names, so that bad input is told before hours are spent."""
    recipe = run.recipe
    rules = {e.name: make_entry_rule(e) for e in recipe.merge}
    check_ladder(recipe)
    kinds = merge_kinds(recipe, rules)

    def look_up() -> tuple[Path, dict[str, Path], dict[str, StageData]]:
        base = resolve_model(recipe.base_model)
        check_mergeable(base)
        check_tokenizer(base)
        given = given_models(recipe, base)
        check_scoring(recipe, base, given, processes=ranks.size, per_machine=ranks.per_host)
        if ranks.is_main:
            check_vectors(recipe, base, given)
        if any(s.dataset for s in recipe.stages):
            check_training(recipe.train, base)
            check_kept_adapters(recipe, kinds, given)
        data = load_data(run, base, write=ranks.is_main)
        check_stages(recipe, data)
        check_replay(recipe, data)
        return base, given, data

    check_versions(ranks)
    base, given, data = ranks.main_first(look_up)
    folders = recipe.evaluate.task_folders(run.tasks)
    tasks = list(recipe.measured(run.stage_numbers()))
    check_tasks(tasks, folders, split=recipe.tunes, limit=recipe.evaluate.limit)
    if ranks.is_main:
        check_disk(run, Weights(base), rules, kinds)
        run.link_base(base)
    return Prepared(base, rules, kinds, given, data)


def given_models(recipe: Recipe, base: Path, *, resolve: Callable[..., Path] = resolve_model) -> dict[str, Path]:
    """Find the models and adapters that stages name, and check that they fit the base.

    `resolve`: finds them, as `resolve_model` does.

    Raises ModelError or RecipeError for one that does not, or an adapter where a difference of two models is asked for.
    """
    names = {n for s in recipe.stages for n in (s.expert, s.minus) if n}
    given = {name: resolve(name, adapters=True) for name in sorted(names)}
    for stage in recipe.stages:
        for name in (stage.expert, stage.minus):
            if name and stage.minus and is_adapter(given[name]):
                raise RecipeError(
                    f"Stage {stage.name} takes the difference of two models, and {name} is an adapter, which is a "
                    "difference already. Name it as `expert`, without `minus`; or merge it into its base first."
                )
    for path in given.values():
        if is_adapter(path):
            _check_adapter(path, base, recipe.base_model)
        else:
            check_same_layout(base, path)
            check_mergeable(path)
    for stage in recipe.stages:
        if stage.expert and stage.minus:
            _log(check_vector(base, given[stage.expert], given[stage.minus]))
    for entry in recipe.merge:
        source = given.get(recipe.tokenizer_model(len(recipe.stages), entry) or "")
        if source:
            check_companions(source, entry.tokenizer_from)
    return given


def check_scoring(recipe: Recipe, base: Path, given: Mapping[str, Path], *, processes: int, per_machine: int) -> None:
    """Raise an error unless a job of `processes` ranks can score models in the way that `evaluate` asks for."""
    trained = any(s.dataset for s in recipe.stages) and make_strategies(recipe.train).carrier.keeps_adapter()
    adapter = trained or any(is_adapter(folder) for folder in given.values())
    check_evaluate(recipe.evaluate, processes=processes, per_machine=per_machine, adapter=adapter)
    if recipe.evaluate.chat_template:
        check_template(base)


def check_companions(folder: Path, stage: str | None) -> None:
    """Raise an error unless a given model has a tokenizer for merged ones. `stage`: as the recipe names it."""
    if is_adapter(folder):
        raise RecipeError(
            f"tokenizer_from: {stage} is given as an adapter ({folder}), which is no whole model. Name another stage, "
            "or merge the adapter into its base first."
        )
    check_tokenizer(folder)


def check_vectors(recipe: Recipe, base: Path, given: Mapping[str, Path]) -> None:
    """Look at the weights of models whose difference a stage takes. Raises ModelError for two of different origin."""
    for stage in recipe.stages:
        if stage.expert and stage.minus:
            _log(check_origin(base, given[stage.expert], given[stage.minus]))


def _log(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        LOG.warning(sentence)


def _check_adapter(folder: Path, base: Path, name: str) -> None:
    adapter = Adapter(folder, Weights(base))
    if adapter.base_model and not is_same_base(adapter.base_model, {name, str(base.resolve())}):
        raise ModelError(
            f"{folder} was trained on {adapter.base_model}, and `base_model` is {name}: it would change weights that "
            "it does not belong to. Give an adapter of this base; if the two are copies of one model, write the name "
            f"in the recipe into base_model_name_or_path of {folder / 'adapter_config.json'}."
        )


def check_kept_adapters(recipe: Recipe, kinds: Mapping[str, str], given: Mapping[str, Path]) -> None:
    """Raise RecipeError where experts are to be kept as adapters of the base, and one would start from elsewhere.

    Args:
        recipe: of the run.
        kinds: merge entry -> the kind of expert that it folds.
        given: name of a given model -> its folder.
    """
    if not make_strategies(recipe.train).carrier.keeps_adapter():
        return
    cure = "Remove `keep`, so that each LoRA is folded into a whole model; or set the entry's `start_from: base`"
    for before, stage in itertools.pairwise(recipe.stages):
        for entry, kind in kinds.items() if stage.dataset else ():
            start = f"train.parameters.keep: merge entry {entry} has stage {stage.name} start from"
            if kind.startswith("merged-"):
                raise RecipeError(
                    f"{start} the merged model, and an adapter trained there is none of the base. {cure} or `previous`."
                )
            if kind == "previous" and before.expert and (before.minus or not is_adapter(given[before.expert])):
                raise RecipeError(
                    f"{start} that of stage {before.name}, which is a whole model, and an adapter trained there is "
                    f"none of the base. {cure}."
                )


def check_ladder(recipe: Recipe) -> None:
    """Raise RecipeError for a rung of the guard's ladder with an unknown rule, or a parameter that does not fit."""
    for number, rung in enumerate(recipe.guard.ladder if recipe.guard else ()):
        if rung.rule:
            make_rule(rung.rule, rung.parameters, where=f"guard.ladder.{number}")
        if rung.do == "replay":
            make_strategies(with_replay(recipe.train, rung))


def check_replay(recipe: Recipe, data: Mapping[str, StageData]) -> None:
    """Raise DataError where a stage's examples could not be replayed among those of a later one."""
    stages = [(s.dataset.path, data[s.name].train.select([0])) for s in recipe.stages if s.dataset]
    ladder = recipe.guard.ladder if recipe.guard else ()
    replays = "replay" in recipe.train.strategy or any(rung.do == "replay" for rung in ladder)
    for (path, old), (_, fresh) in itertools.combinations(stages, 2) if replays else ():
        in_form_of(fresh, old, path)


def load_data(run: Run, base: Path, *, write: bool) -> dict[str, StageData]:
    """Load the stages' datasets, and write the tasks that are made from datasets."""
    data = {}
    for stage in run.recipe.stages:
        if stage.dataset:
            data[stage.name] = load_stage_data(stage.dataset, seed=run.recipe.seed)
        if stage.dataset and stage.heldout_task and write:
            chars = stage.dataset.heldout_chars
            documents = heldout_documents(data[stage.name], chars=chars, tokenizer_folder=base)
            write_perplexity_task(run.tasks, stage.heldout_task, documents)
    for task in run.recipe.tasks():
        if task.dataset and write:
            write_task(run.tasks, task)
    if write:
        _log(leaks(run.recipe, data, run.tasks))
    return data


def check_disk(run: Run, base: Weights, rules: Mapping[str, MergeRule], kinds: Mapping[str, str]) -> None:
    """Raise ResourceError if what is still to be written does not fit on the disk."""
    carrier = make_strategies(run.recipe.train).carrier
    # How much an adapter holds is not known without the model; it is little.
    whole = carrier.bytes_per_parameter >= Full.bytes_per_parameter
    trained = Trained(base.numel() if whole else 0, carrier.keeps_adapter())
    uses = (disk_use(s, run, base, rules, trained) for s in run_steps(run, kinds) if not s.done)
    need = peak_disk(uses)[1]
    free = shutil.disk_usage(run.folder).free
    if need > free:
        raise ResourceError(
            f"This run still needs about {size(need)} in {run.folder} and {size(free)} are free. "
            "Free some, name another disk with --run, or use fewer merge entries."
        )


T = TypeVar("T")


@dataclass
class Findings:
    """What is wrong, and what is worth knowing; collected, so that all of it is told at once."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ask(self, do: Callable[[], T], *, ignore: type[ContmergeError] | None = None) -> T | None:
        """Return what `do` returns, or None and keep its error if the user can mend it; not one to be ignored."""
        try:
            return do()
        except ContmergeError as error:
            if not (ignore and isinstance(error, ignore)) and str(error) not in self.errors:
                self.errors.append(str(error))
            return None


# Checks


def check_all(run: Run, findings: Findings, scratch: Path, processes: int) -> Any:
    """Check all that a run's preflight checks, each by itself; return a Subject, or None if the base is no good."""
    from hf_contmerge.loop._entries import make_entry_rule, merge_kinds
    from hf_contmerge.loop.plan.checks import (
        check_kept_adapters,
        check_ladder,
        check_replay,
        check_scoring,
        given_models,
    )
    from hf_contmerge.loop.plan.estimates import Subject
    from hf_contmerge.loop.trackers import check_trackers
    from hf_contmerge.models.experts import check_mergeable
    from hf_contmerge.models.headers import needs_converting, resolve_headers
    from hf_contmerge.models.layout import check_tokenizer
    from hf_contmerge.training.settings import check_stages, make_strategies

    recipe = run.recipe
    findings.ask(run.check_folder)
    findings.ask(lambda: check_trackers(recipe.train))
    resolve = functools.partial(resolve_headers, scratch=scratch / "models")
    made = {e.name: findings.ask(functools.partial(make_entry_rule, e)) for e in recipe.merge}
    findings.ask(lambda: check_ladder(recipe))
    rules = {name: rule for name, rule in made.items() if rule}
    base = findings.ask(lambda: resolve(recipe.base_model))
    if base is None:
        findings.ask(lambda: make_strategies(recipe.train))
        return None
    findings.ask(lambda: check_mergeable(base))
    findings.ask(lambda: check_tokenizer(base))
    if needs_converting(recipe.base_model):
        findings.notes.append(
            f"{recipe.base_model} is a GGUF file: the run converts it to bfloat16 first, once, into the Hub's cache."
        )
    given: dict[str, Path] = {}
    for stage in recipe.stages:
        one = recipe.model_copy(update={"stages": (stage,)})
        given |= findings.ask(functools.partial(given_models, one, base, resolve=resolve)) or {}
    machine = {"processes": processes, "per_machine": int(os.environ.get("LOCAL_WORLD_SIZE", processes))}
    findings.ask(lambda: check_scoring(recipe, base, given, **machine))
    if any(s.dataset for s in recipe.stages):
        _check_training(recipe, base, findings)
    known = len(rules) == len(recipe.merge)
    kinds = merge_kinds(recipe, rules) if known else {}
    data = _checked_data(recipe, base, findings, scratch)
    _check_tasks(recipe, findings, scratch / "tasks")
    if known and not findings.errors:
        findings.ask(lambda: check_kept_adapters(recipe, kinds, given))
        findings.ask(lambda: check_stages(recipe, data))
        findings.ask(lambda: check_replay(recipe, data))
    return None if findings.errors else Subject(run, base, rules, kinds, given, data, scratch / "tasks")


def _check_training(recipe: Recipe, base: Path, findings: Findings) -> None:
    """Check strategies and SFTConfig fields. Whether it fits is judged later, by a better estimate than preflight's."""

    if findings.ask(lambda: make_strategies(recipe.train)) is None:
        return
    findings.ask(lambda: check_training(recipe.train, base), ignore=ResourceError)


def _checked_data(recipe: Recipe, base: Path, findings: Findings, scratch: Path) -> dict[str, Any]:
    """Load each stage's data and the general tasks', and write their task files."""

    quiet = recipe.evaluate.model_copy(update={"general_tasks": ()})
    parts = [recipe.model_copy(update={"stages": (stage,), "evaluate": quiet}) for stage in recipe.stages]
    parts += [
        recipe.model_copy(
            update={"stages": (), "evaluate": recipe.evaluate.model_copy(update={"general_tasks": (task,)})}
        )
        for task in recipe.evaluate.general_tasks
    ]
    data: dict[str, Any] = {}
    for part in parts:
        data |= findings.ask(functools.partial(load_data, Run(scratch, part), base, write=True)) or {}
    return data


def _check_tasks(recipe: Recipe, findings: Findings, tasks: Path) -> None:
    """Check lm-eval's own tasks, together first: indexing them takes seconds."""
    from hf_contmerge.scoring.tasks import check_tasks

    made = {s.heldout_task for s in recipe.stages} | {t.name for t in recipe.tasks() if t.dataset}
    ours = [t for t in recipe.measured(range(1, len(recipe.stages) + 1)) if t.name not in made]
    folders = recipe.evaluate.task_folders(tasks)
    trial = Findings()
    if ours:
        trial.ask(lambda: check_tasks(ours, folders, split=recipe.tunes, limit=recipe.evaluate.limit))
    if len(ours) == 1:
        findings.errors += trial.errors
    for task in ours if trial.errors and len(ours) > 1 else ():
        findings.ask(functools.partial(check_tasks, [task], folders, split=recipe.tunes))
