"""All checks of a run.

`run` stops at the first error, `plan` collects all.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hf_contmerge.errors import DataError, RecipeError, ResourceError, size
from hf_contmerge.loop._entries import make_entry_rule, merge_kinds, with_replay
from hf_contmerge.loop.inputs import check_same_base, keep_inputs
from hf_contmerge.loop.plan.disk import Trained, disk_need, disk_use
from hf_contmerge.loop.plan.rehearsal import rehearse
from hf_contmerge.loop.published import Published, check_continued, find_published
from hf_contmerge.loop.trackers import check_trackers
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging.merge import require_linear
from hf_contmerge.merging.rules import make_rule
from hf_contmerge.merging.vectors import check_origin, check_vector
from hf_contmerge.models.experts import check_mergeable
from hf_contmerge.models.folder import is_adapter, resolve_model
from hf_contmerge.models.function import check_function
from hf_contmerge.models.layout import check_loads, check_same_layout, check_tokenizer
from hf_contmerge.models.lora.reader import Adapter, check_base
from hf_contmerge.models.statistics import check_statistics, require_kinds
from hf_contmerge.models.tokenizer import UNCHANGED, TokenizerChange
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import FROM_BASE
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.schema import Merge, Recipe, Stage
from hf_contmerge.run.steps import run_steps
from hf_contmerge.runtime.foreign import expanded
from hf_contmerge.runtime.ranks import Ranks
from hf_contmerge.runtime.refusals import free_bytes
from hf_contmerge.runtime.versions import check_versions
from hf_contmerge.scoring.files import heldout_documents, write_perplexity_task, write_task
from hf_contmerge.scoring.leaks import leaks
from hf_contmerge.scoring.setup import check_evaluate, check_template
from hf_contmerge.scoring.tasks import check_tasks
from hf_contmerge.train_strategies.full import Full
from hf_contmerge.train_strategies.replay import in_form_of
from hf_contmerge.training.data import StageData, load_stage_data, require_answers
from hf_contmerge.training.general import with_general
from hf_contmerge.training.joint import joint_data
from hf_contmerge.training.limits import trainer_limits
from hf_contmerge.training.settings import Check, check_positions, data_checks, make_strategies, training_checks
from hf_contmerge.training.statistics import check_asked
from hf_contmerge.training.synthesis import check_synthesis
from hf_contmerge.training.tokenizer import stage_change

LOG = logging.getLogger(__name__)


@dataclass
class Prepared:
    """Models, rules and data found by the checks."""

    base: Path = Path()
    rules: dict[str, MergeRule] = field(default_factory=dict)
    """By merge entry."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Kind of expert by merge entry."""
    given: dict[str, Path] = field(default_factory=dict)
    """Folders of the recipe's `expert` and `minus` models, by name."""
    data: dict[str, StageData] = field(default_factory=dict)
    """By stage."""
    published: Published | None = None
    """The merge that the run continues."""
    change: TokenizerChange = UNCHANGED
    """Of the base's tokenizer, by the recipe's `train`."""
    tasks_checked: bool = False
    loads: bool = False
    """Whether transformers may load the base."""

    def start(self, t: int) -> Path:
        """Return the start model of a stage without one before it."""
        alone = t > 1 or set(self.kinds.values()) <= set(FROM_BASE)
        return self.base if alone or not self.published else self.published.model

    def is_whole(self, recipe: Recipe) -> bool:
        """Check for all models and data of the recipe."""
        stages = [s.name for s in recipe.stages if s.dataset]
        return bool(self.kinds) and _given_names(recipe) == set(self.given) and set(stages) == set(self.data)


@dataclass(frozen=True)
class Circumstances:
    """Settings of the checks."""

    tasks: Path
    """Folder for tasks made from datasets."""
    processes: int = 1
    per_machine: int = 1
    is_main: bool = True
    """Whether this process writes task files and runs the once-per-job checks."""
    plans: bool = False
    """Whether weights are skipped, and memory and disk are judged by estimates."""
    trust_remote_code: bool = False
    """Whether the user, too, lets models run their own code."""
    resolve: Callable[..., Path] = resolve_model
    """Resolves a model name to a folder."""


def prepare(run: Run, ranks: Ranks, *, trust_remote_code: bool = False) -> Prepared:
    """Run all checks; raise the first error."""
    check_versions(ranks)
    how = Circumstances(run.tasks, ranks.size, ranks.per_host, ranks.is_main, trust_remote_code=trust_remote_code)

    def look_up() -> Prepared:
        prepared = Prepared()
        for check in checks(run, prepared, how):
            check()
        return prepared

    prepared = ranks.main_first(look_up)
    if ranks.size > 1:
        for check in rehearsals(run.recipe, prepared):
            ranks.all(check)
    if ranks.is_main:
        run.settle(tasks=False)  # they have just been written
        run.link_base(prepared.base)
        keep_inputs(run, prepared.base)
    return prepared


def checks(run: Run, prepared: Prepared, how: Circumstances) -> Iterator[Check]:
    """Yield all checks, cheap ones first.

    A check is a callable; it fills `prepared` or raises ContmergeError. Checks after a failed one are left out if they
    depend on it.
    """
    recipe = run.recipe
    yield run.check_folder
    yield partial(_check_trust, recipe, how)
    if recipe.trust_remote_code and not how.trust_remote_code:
        return  # later checks would load that code
    yield partial(check_trackers, recipe.train)
    for entry in recipe.merge:
        yield partial(_make_rule, prepared, entry)
    if len(prepared.rules) == len(recipe.merge):
        prepared.kinds = merge_kinds(recipe, prepared.rules)
        yield partial(_check_routed, recipe, prepared)
    yield partial(check_ladder, recipe)
    yield partial(check_continued, recipe)
    yield partial(make_strategies, recipe.train)
    yield partial(_find_base, prepared, recipe, how)
    if prepared.base == Path():
        return
    yield partial(check_mergeable, prepared.base)
    if how.is_main and not how.plans:
        yield partial(check_same_base, run, prepared.base, whole=False)
    yield partial(check_tokenizer, prepared.base)
    yield partial(_check_loads, prepared, recipe)
    if not prepared.loads:
        return
    if recipe.continue_from and len(prepared.rules) == 1 and not how.plans:
        yield partial(_find_published, run, prepared)
    for stage in recipe.stages:
        yield partial(_find_given, prepared, recipe, stage, how)
    for entry in recipe.merge:
        yield partial(_check_companions, prepared, recipe, entry)
    yield partial(check_scoring, recipe, prepared, how)
    if how.is_main and not how.plans:
        yield partial(check_vectors, recipe, prepared)
    if how.is_main and len(prepared.rules) == len(recipe.merge):
        yield partial(check_given_statistics, recipe, prepared, how)
    if any(s.dataset for s in recipe.stages):
        yield partial(_find_change, prepared, recipe)
        yield from training_checks(recipe.train, prepared.base, memory=not how.plans)
        yield partial(_check_asked, recipe, prepared)
    yield from checks_of_data(recipe, prepared, how)
    yield from _checks_of_tasks(run, prepared, how)
    if how.is_main and not how.plans:
        yield partial(check_disk, run, prepared)


def checks_of_data(recipe: Recipe, prepared: Prepared, how: Circumstances) -> Iterator[Check]:
    """Load the stages' data and write task files, check by check."""
    for stage in recipe.stages:
        yield partial(_load_stage, prepared, recipe, stage, how)
    for task in recipe.tasks():
        if task.dataset and how.is_main:
            yield partial(write_task, how.tasks, task)
    if prepared.is_whole(recipe):
        yield partial(check_kept_adapters, recipe, prepared)
        yield from data_checks(recipe, prepared.data)
        yield partial(check_positions, recipe, prepared.data, prepared.base)
        yield partial(check_replay, recipe, prepared.data)
        if "joint" in recipe.baselines:
            yield partial(joint_data, prepared.data, seed=recipe.seed)
        if "in_context" in recipe.baselines:
            yield partial(require_answers, prepared.data, "in_context")
        yield from (partial(_load_general, prepared, recipe, stage) for stage in recipe.stages if stage.dataset)
        if how.processes == 1 or how.plans:
            yield from rehearsals(recipe, prepared)
    if how.is_main:
        yield partial(_warn_of_leaks, recipe, prepared, how)


def rehearsals(recipe: Recipe, prepared: Prepared) -> Iterator[Check]:
    """Yield a step of TRL's trainer for each form and settings.

    All ranks run these together, so several ranks run them after the other checks.
    """
    rehearsed = set[str]()
    for stage in recipe.stages:
        if not stage.dataset:
            continue
        train, data = recipe.train_of(stage), prepared.data[stage.name]
        key = f"{data.form} {data.train.column_names} {train.model_dump_json()}"
        if key not in rehearsed:
            rehearsed.add(key)
            where = f"train of stage {stage.name}"
            yield partial(rehearse, train, data, prepared.base, where, trust_remote_code=recipe.trust_remote_code)


def _checks_of_tasks(run: Run, prepared: Prepared, how: Circumstances) -> Iterator[Check]:
    """Yield a check of all tasks, then of each.

    Indexing takes seconds, so tasks are checked one by one only if the joint check fails.
    """
    recipe = run.recipe
    made = {s.heldout_task for s in recipe.stages} | {t.name for t in recipe.tasks() if t.dataset}
    whole = prepared.is_whole(recipe)
    tasks = [t for t in recipe.measured(run.stage_numbers()) if whole or t.name not in made]
    if tasks:
        yield partial(_check_tasks, prepared, recipe, tasks, how)
        if not prepared.tasks_checked:
            folders = recipe.evaluate.task_folders(how.tasks)
            check = partial(check_tasks, split=recipe.tunes, trust_remote_code=recipe.trust_remote_code)
            yield from (partial(check, [t], folders) for t in tasks if t.name not in made)


def _check_tasks(prepared: Prepared, recipe: Recipe, tasks: list[Task], how: Circumstances) -> None:
    folders = recipe.evaluate.task_folders(how.tasks)
    try:
        check_tasks(
            tasks, folders, split=recipe.tunes, limit=recipe.evaluate.limit, trust_remote_code=recipe.trust_remote_code
        )
    except (RecipeError, DataError):
        raise
    except ResourceError:  # its message names all affected tasks
        prepared.tasks_checked = True
        raise
    prepared.tasks_checked = True


# Lookup


def _make_rule(prepared: Prepared, entry: Merge) -> None:
    prepared.rules[entry.name] = make_entry_rule(entry)


def _find_base(prepared: Prepared, recipe: Recipe, how: Circumstances) -> None:
    prepared.base = how.resolve(recipe.base_model)


def _find_published(run: Run, prepared: Prepared) -> None:
    prepared.published = find_published(run, prepared.base, next(iter(prepared.rules.values())))


def _find_change(prepared: Prepared, recipe: Recipe) -> None:
    prepared.change = stage_change(prepared.base, recipe.train, trust_remote_code=recipe.trust_remote_code)


def _given_names(recipe: Recipe) -> set[str]:
    return {name for s in recipe.stages for name in (s.expert, s.minus) if name}


def _find_given(prepared: Prepared, recipe: Recipe, stage: Stage, how: Circumstances) -> None:
    """Find a stage's given models; check their fit.

    Raises:
        ModelError: a model does not fit the base.
        RecipeError: an adapter in a difference of two models.
    """
    base, names = prepared.base, [name for name in (stage.expert, stage.minus) if name]
    folders = {name: how.resolve(name, adapters=True) for name in names}
    for name in names:
        if stage.minus and is_adapter(folders[name]):
            raise RecipeError(
                f"Stage {stage.name} takes the difference of two models, but {name} is an adapter, already a "
                "difference. Set it as `expert` without `minus`, or merge it into its base first."
            )
    for path in folders.values():
        if is_adapter(path):
            _check_adapter(path, base, recipe.base_model)
        else:
            check_same_layout(base, path)
            check_mergeable(path)
            check_loads(path, trusted=recipe.trust_remote_code, language=recipe.runs_models())
    if stage.expert and not stage.minus and not is_adapter(folders[stage.expert]):
        check_function(base, folders[stage.expert])
    if stage.expert and stage.minus:
        _log(check_vector(base, folders[stage.expert], folders[stage.minus]))
    prepared.given |= folders


def _load_stage(prepared: Prepared, recipe: Recipe, stage: Stage, how: Circumstances) -> None:
    """Load a stage's dataset and write its held-out task."""
    if not stage.dataset:
        return
    limits = trainer_limits(recipe.train_of(stage), prepared.base, trust_remote_code=recipe.trust_remote_code)
    data = load_stage_data(stage.dataset, seed=recipe.seed, limits=limits)
    if stage.heldout_task and how.is_main:
        chars = stage.dataset.heldout_chars
        documents = heldout_documents(data, chars=chars, load_tokenizer=limits.load_tokenizer)
        write_perplexity_task(how.tasks, stage.heldout_task, documents)
    prepared.data[stage.name] = data


def _load_general(prepared: Prepared, recipe: Recipe, stage: Stage) -> None:
    """Load the general data of a stage, without any stage's held-out documents."""
    train, where = recipe.train_of(stage), f"train of stage {stage.name}"
    limits = trainer_limits(train, prepared.base, trust_remote_code=recipe.trust_remote_code)
    check_synthesis(train, prepared.data[stage.name], limits.load_tokenizer, where)
    data = with_general(prepared.data[stage.name], train, prepared.data.values(), seed=recipe.seed, limits=limits)
    prepared.data[stage.name] = data


# Checks


def _check_trust(recipe: Recipe, how: Circumstances) -> None:
    """Raise RecipeError for code of models without the user's consent."""
    if recipe.trust_remote_code and not how.trust_remote_code:
        raise RecipeError(
            f"`trust_remote_code: true` lets {recipe.base_model} run its own code, which happens only if you say so "
            "too: read that code, then add `--trust-remote-code` (in Python: run_recipe(..., trust_remote_code=True))."
        )


def _check_loads(prepared: Prepared, recipe: Recipe) -> None:
    check_loads(prepared.base, trusted=recipe.trust_remote_code, language=recipe.runs_models())
    prepared.loads = True


def check_scoring(recipe: Recipe, prepared: Prepared, how: Circumstances) -> None:
    """Raise an error for unsupported `evaluate` settings."""
    trained = any(s.dataset for s in recipe.stages) and make_strategies(recipe.train).carrier.keeps_adapter()
    adapter = trained or any(is_adapter(folder) for folder in prepared.given.values())
    check_evaluate(recipe.evaluate, processes=how.processes, per_machine=how.per_machine, adapter=adapter)
    if recipe.evaluate.chat_template:
        check_template(prepared.base, trust_remote_code=recipe.trust_remote_code)


def _check_companions(prepared: Prepared, recipe: Recipe, entry: Merge) -> None:
    """Raise an error if `tokenizer_from` has no tokenizer."""
    folder = prepared.given.get(recipe.tokenizer_model(len(recipe.stages), entry) or "")
    if folder and is_adapter(folder):
        raise RecipeError(
            f"tokenizer_from: {entry.tokenizer_from} is an adapter ({folder}), but a full model is required. Choose "
            "another stage, or merge the adapter into its base first."
        )
    if folder:
        check_tokenizer(folder)


def check_vectors(recipe: Recipe, prepared: Prepared) -> None:
    """Raise ModelError for vectors of different origin."""
    for stage in recipe.stages:
        if stage.expert and stage.minus:
            _log(check_origin(prepared.base, prepared.given[stage.expert], prepared.given[stage.minus]))


def _warn_of_leaks(recipe: Recipe, prepared: Prepared, how: Circumstances) -> None:
    _log(leaks(recipe, prepared.data, how.tasks))


def _log(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        LOG.warning(sentence)


def _check_adapter(folder: Path, base: Path, name: str) -> None:
    cure = f"write the recipe's name into base_model_name_or_path of {folder / 'adapter_config.json'}"
    check_base(Adapter(folder, Weights(base)), (name, str(base.resolve())), cure=cure)


def check_kept_adapters(recipe: Recipe, prepared: Prepared) -> None:
    """Raise RecipeError for kept adapters with another start."""
    if not make_strategies(recipe.train).carrier.keeps_adapter():
        return
    cure = "Remove `keep`, to fold each LoRA into a full model; or set the entry's `start_from: base`"
    for before, stage in itertools.pairwise(recipe.stages):
        for entry, kind in prepared.kinds.items() if stage.dataset else ():
            start = f"train.parameters.keep: for merge entry {entry}, stage {stage.name} starts from"
            if kind.startswith("merged-"):
                raise RecipeError(
                    f"{start} the merged model, and its adapter would not be one of the base. {cure} or `previous`."
                )
            if kind == "previous" and before.expert and (before.minus or not is_adapter(prepared.given[before.expert])):
                raise RecipeError(
                    f"{start} the full model of stage {before.name}, and its adapter would not be one of the base. "
                    f"{cure}."
                )


def _check_routed(recipe: Recipe, prepared: Prepared) -> None:
    """Raise RecipeError for a router without separate experts."""
    if recipe.evaluate.routed and len(recipe.stages) > 1 and "base" not in prepared.kinds.values():
        raise RecipeError(
            "evaluate.routed compares with separate experts, each trained from the base, and no merge entry trains "
            "them here. Set `start_from: base` in one, or remove `routed`."
        )


def check_ladder(recipe: Recipe) -> None:
    """Raise RecipeError for a bad rung in guard.ladder."""
    for number, rung in enumerate(recipe.guard.ladder if recipe.guard else ()):
        if rung.rule:
            rule = make_rule(rung.rule, rung.parameters, where=f"guard.ladder.{number}")
            for entry in recipe.merge:
                require_linear(rung.rule, rule, entry.weights.values(), where=f"guard.ladder.{number}")
        if "general" in rung.parameters:
            raise RecipeError(
                f"guard.ladder.{number}: a rung cannot name `general` data, which is loaded before the run. Set it in "
                "`train.parameters` with `strategy: [..., replay]`; the rung then uses it too."
            )
        if rung.do == "replay":
            make_strategies(with_replay(recipe.train, rung))


def _rules_by_place(recipe: Recipe, prepared: Prepared) -> dict[str, MergeRule]:
    """Return the rules of entries and of the guard's ladder."""
    rules = {f"merge entry {name}": rule for name, rule in prepared.rules.items()}
    for number, rung in enumerate(recipe.guard.ladder if recipe.guard else ()):
        if rung.rule:
            place = f"guard.ladder.{number}"
            rules[place] = make_rule(rung.rule, rung.parameters, where=place)
    return rules


def _check_asked(recipe: Recipe, prepared: Prepared) -> None:
    """Raise RecipeError for rules whose statistics training does not write."""
    check_asked(_rules_by_place(recipe, prepared), recipe.train)
    earlier = recipe.guard is not None and any(rung.do == "earlier" for rung in recipe.guard.ladder)
    for name, rule in prepared.rules.items():
        if earlier and "adam" in rule.needs:
            raise RecipeError(
                f"guard.ladder: `earlier` folds checkpoints, which have no moments of Adam, and merge entry {name} "
                "needs these. Leave the rung out, or use a rule that needs other statistics."
            )


def check_given_statistics(recipe: Recipe, prepared: Prepared, how: Circumstances) -> None:
    """Raise an error for given experts without statistics for a rule.

    A plan reads no weights, and knows nothing of those on the Hub.
    """
    given = [stage for stage in recipe.stages if stage.expert]
    for place, rule in _rules_by_place(recipe, prepared).items():
        for stage in given if rule.needs else ():
            assert stage.expert
            if stage.minus:
                raise RecipeError(
                    f"{place} needs the statistics {rule.needs[0]!r} of each expert, and the stage {stage.name} "
                    "(`expert` with `minus`) is a sum, of which nothing was measured. Use a rule without statistics, "
                    "or store the sum as a model, measure it with `contmerge statistics`, and name it as `expert`."
                )
            folder = prepared.given[stage.expert]
            if not how.plans:
                check_statistics(rule, [folder])
            elif expanded(stage.expert).is_dir():
                require_kinds(rule, folder)


def check_replay(recipe: Recipe, data: Mapping[str, StageData]) -> None:
    """Raise DataError if examples cannot be replayed later."""
    stages = [
        (" + ".join(source.path for source in s.dataset.sources()), data[s.name].train.select([0]))
        for s in recipe.stages
        if s.dataset
    ]
    ladder = recipe.guard.ladder if recipe.guard else ()
    replays = "replay" in recipe.train.strategy or any(rung.do == "replay" for rung in ladder)
    replays = replays and not make_strategies(recipe.train).synthesis()
    for (path, old), (_, fresh) in itertools.combinations(stages, 2) if replays else ():
        in_form_of(fresh, old, path)


def disk_needed(run: Run, prepared: Prepared) -> int:
    """Return an upper bound of the unfinished phases' bytes."""
    base = Weights(prepared.base)
    strategies = make_strategies(run.recipe.train)
    # An adapter's size needs the model; it is small enough to leave out.
    whole = strategies.carrier.bytes_per_parameter >= Full.bytes_per_parameter
    trained = Trained.by(strategies, base.numel() if whole else 0)
    uses = (disk_use(s, run, base, prepared.rules, trained) for s in run_steps(run, prepared.kinds) if not s.done)
    return disk_need(uses).peak


def check_disk(run: Run, prepared: Prepared) -> None:
    """Raise ResourceError if the disk is too small."""
    need = disk_needed(run, prepared)
    free = free_bytes(run.folder)
    if need > free:
        raise ResourceError(
            f"This run still needs about {size(need)} in {run.folder}, but {size(free)} are free. "
            "Free some space, choose another disk with --run, or use fewer merge entries."
        )
