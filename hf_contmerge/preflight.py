"""What is looked up and checked before the first phase, so that bad input is told before hours are spent."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_contmerge import corpus, experts, finetune, lm_tasks, model_folder, scoring_setup, task_files, vector_guards
from hf_contmerge.adapter_files import Adapter, is_adapter
from hf_contmerge.adapter_settings import is_same_base
from hf_contmerge.corpus import StageData
from hf_contmerge.errors import ModelError, RecipeError, ResourceError, size
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merge_words import make_entry_rule, make_rule
from hf_contmerge.model_folder import resolve_model
from hf_contmerge.recipe import Recipe, Train
from hf_contmerge.recipe_measure import Rung
from hf_contmerge.run_folder import Run
from hf_contmerge.run_phases import Trained, disk_use, peak_disk, run_steps
from hf_contmerge.tensor_files import Weights
from hf_contmerge.train_strategies.full import Full
from hf_contmerge.train_strategies.replay import in_form_of
from hf_contmerge.work_sharing import Ranks, main_first

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
        experts.check_mergeable(base)
        model_folder.check_tokenizer(base)
        given = given_models(recipe, base)
        check_scoring(recipe, base, given, processes=ranks.size, per_machine=ranks.per_host)
        if ranks.rank == 0:
            check_vectors(recipe, base, given)
        if any(s.dataset for s in recipe.stages):
            finetune.check_training(recipe.train, base)
            check_kept_adapters(recipe, kinds, given)
        data = load_data(run, base, write=ranks.rank == 0)
        finetune.check_stages(recipe, data)
        check_replay(recipe, data)
        return base, given, data

    scoring_setup.check_versions(ranks)
    base, given, data = main_first(ranks, look_up)
    folders = recipe.evaluate.task_folders(run.tasks)
    tasks = list(recipe.measured(run.stage_numbers()))
    lm_tasks.check_tasks(tasks, folders, split=recipe.tunes, limit=recipe.evaluate.limit)
    if ranks.rank == 0:
        check_disk(run, Weights(base), rules, kinds)
        run.link_base(base)
    return Prepared(base, rules, kinds, given, data)


def given_models(recipe: Recipe, base: Path, *, resolve: Callable[..., Path] = resolve_model) -> dict[str, Path]:
    """Find the models and adapters that stages name, and check that they fit the base.

    `resolve`: finds them, as `model_folder.resolve_model` does.

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
            model_folder.check_same_layout(base, path)
            experts.check_mergeable(path)
    for stage in recipe.stages:
        if stage.expert and stage.minus:
            _log(vector_guards.check_vector(base, given[stage.expert], given[stage.minus]))
    for entry in recipe.merge:
        source = given.get(recipe.tokenizer_model(len(recipe.stages), entry) or "")
        if source:
            check_companions(source, entry.tokenizer_from)
    return given


def check_scoring(recipe: Recipe, base: Path, given: Mapping[str, Path], *, processes: int, per_machine: int) -> None:
    """Raise an error unless a job of `processes` ranks can score models in the way that `evaluate` asks for."""
    trained = any(s.dataset for s in recipe.stages) and finetune.make_strategies(recipe.train).carrier.keeps_adapter()
    adapter = trained or any(is_adapter(folder) for folder in given.values())
    scoring_setup.check_evaluate(recipe.evaluate, processes=processes, per_machine=per_machine, adapter=adapter)
    if recipe.evaluate.chat_template:
        scoring_setup.check_template(base)


def check_companions(folder: Path, stage: str | None) -> None:
    """Raise an error unless a given model has a tokenizer for merged ones. `stage`: as the recipe names it."""
    if is_adapter(folder):
        raise RecipeError(
            f"tokenizer_from: {stage} is given as an adapter ({folder}), which is no whole model. Name another stage, "
            "or merge the adapter into its base first."
        )
    model_folder.check_tokenizer(folder)


def check_vectors(recipe: Recipe, base: Path, given: Mapping[str, Path]) -> None:
    """Look at the weights of models whose difference a stage takes. Raises ModelError for two of different origin."""
    for stage in recipe.stages:
        if stage.expert and stage.minus:
            _log(vector_guards.check_origin(base, given[stage.expert], given[stage.minus]))


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
    if not finetune.make_strategies(recipe.train).carrier.keeps_adapter():
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
            finetune.make_strategies(with_replay(recipe.train, rung))


def with_replay(train: Train, rung: Rung) -> Train:
    """Return how a stage is trained when a guard has it trained again with examples of earlier stages."""
    own = train.parameters_of()
    strategies = (*train.strategy, *(() if "replay" in train.strategy else ("replay",)))
    parameters = {**own, "replay": {**own.get("replay", {}), **rung.parameters}}
    return Train.model_validate({**train.model_dump(), "strategy": strategies, "parameters": parameters})


def check_replay(recipe: Recipe, data: Mapping[str, StageData]) -> None:
    """Raise DataError where a stage's examples could not be replayed among those of a later one."""
    stages = [(s.dataset.path, data[s.name].train.select([0])) for s in recipe.stages if s.dataset]
    ladder = recipe.guard.ladder if recipe.guard else ()
    replays = "replay" in recipe.train.strategy or any(rung.do == "replay" for rung in ladder)
    for (path, old), (_, fresh) in itertools.combinations(stages, 2) if replays else ():
        in_form_of(fresh, old, path)


def merge_kinds(recipe: Recipe, rules: Mapping[str, MergeRule]) -> dict[str, str]:
    """Return merge entry name -> the kind of expert that it folds."""
    starts = {entry.name: entry.start_from or rules[entry.name].start_from for entry in recipe.merge}
    return {name: f"merged-{name}" if start == "merged" else start for name, start in starts.items()}


def load_data(run: Run, base: Path, *, write: bool) -> dict[str, StageData]:
    """Load the stages' datasets, and write the tasks that are made from datasets."""
    data = {}
    for stage in run.recipe.stages:
        if stage.dataset:
            data[stage.name] = corpus.load_stage_data(stage.dataset, seed=run.recipe.seed)
        if stage.dataset and stage.heldout_task and write:
            chars = stage.dataset.heldout_chars
            documents = task_files.heldout_documents(data[stage.name], chars=chars, tokenizer_folder=base)
            task_files.write_perplexity_task(run.tasks, stage.heldout_task, documents)
    for task in run.recipe.tasks():
        if task.dataset and write:
            task_files.write_task(run.tasks, task)
    return data


def check_disk(run: Run, base: Weights, rules: Mapping[str, MergeRule], kinds: Mapping[str, str]) -> None:
    """Raise ResourceError if what is still to be written does not fit on the disk."""
    carrier = finetune.make_strategies(run.recipe.train).carrier
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
