"""One function per phase: finetune_stage, merge_stage, score_stage.

    from hf_contmerge import finetune_stage, merge_stage, score_stage

    law = finetune_stage("owner/base", "law.jsonl", "experts/law", learning_rate=1e-5, max_steps=500)
    merge_stage("state", law, rule="magmax", export="merged/law")
    scores = score_stage("merged/law", ["arc_easy"])

    code = finetune_stage(law, "code.jsonl", "experts/code", learning_rate=1e-5, max_steps=500)  # continues from law
    merge_stage("state", code, export="merged/code")

A stopped script can be rerun unchanged: finished work is not repeated, and training resumes from its newest checkpoint.
Under `torchrun` or `accelerate launch` all ranks call each function together and share the work.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import ValidationError

from hf_contmerge.errors import RecipeError, RunError, unknown
from hf_contmerge.loop._outside import clear_others, finished, is_trained, publish, working_folder
from hf_contmerge.loop._record import Recorder
from hf_contmerge.loop.plan.rehearsal import rehearse
from hf_contmerge.loop.stages import train_at
from hf_contmerge.merging.lineage import LINEAGE, read_lineage
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.layout import check_loads
from hf_contmerge.run.places import ExpertPlace
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.files import alone
from hf_contmerge.runtime.launching import join_ranks, leave_ranks
from hf_contmerge.runtime.versions import check_versions
from hf_contmerge.scoring.files import write_task
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.score import score_loaded, score_model
from hf_contmerge.scoring.tasks import check_tasks
from hf_contmerge.training.job import OWN, Data, ModelName, TrainedExpert, base_of, look_up, recipe_of
from hf_contmerge.training.synthesis import check_synthesis
from hf_contmerge.training.tokenizer import stage_tokenizer

# Fine-tuning


def finetune_stage(
    model: ModelName,
    data: Data,
    out: ModelName,
    *,
    base: ModelName | None = None,
    strategy: str | Sequence[str] = "full",
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    **training: Any,
) -> TrainedExpert:
    """Train one expert, unless an equal call did.

    Args:
        model: model to start from. A TrainedExpert also passes on the strategies' memory of earlier stages.
        data: training data. All of it is trained on, unless the fields of a dataset hold some out.
        out: folder for the expert; appears when complete.
        base: the pretrained model, source of the tokenizer. Required if `model` is neither it nor names it.
        strategy: one or several names, as in recipes: full, lora, [lora, replay] ...
        parameters: parameters of the strategy.
        seed: seed for data order, dropout and sampling.
        training: fields of TRL's SFTConfig (DPOConfig for preference pairs), as in recipes: learning_rate, max_steps,
            ...; and `trust_remote_code`.

    Raises:
        RecipeError: an unknown field, strategy or parameter.
        DataError: the data are missing or unusable for training.
        ModelError: the model is missing, damaged, or does not fit the base.
        RunError: `out` holds other files.
        ResourceError: the machine has too little memory, or the Hub cannot be reached.
    """
    recipe = recipe_of(data, strategy, parameters or {}, seed, training)
    ranks, crew = _join(recipe.train)
    out = Path(out)
    job = crew.ranks.main_first(look_up, recipe, model, data, base)
    load = partial(stage_tokenizer, job.base, job.train, trust_remote_code=job.trust_remote_code)
    crew.ranks.all(check_synthesis, job.train, job.data, load, "finetune_stage")
    inputs = crew.ranks.first(job.inputs)
    with ExitStack() as held:
        crew.ranks.first(held.enter_context, alone(out.absolute()))  # another call would remove what this one trains
        record = crew.ranks.first(finished, out, inputs)
        if record is None:
            work = ExpertPlace(working_folder(out, inputs), "base")
            crew.ranks.first(clear_others, out, work.folder)
            if not crew.ranks.first(is_trained, work):
                crew.ranks.all(
                    rehearse, job.train, job.data, job.base, "finetune_stage", trust_remote_code=job.trust_remote_code
                )
                recorder = Recorder(work.folder, ranks, crew, quiet=True)
                train_at(work, job, recorder, more={"inputs": inputs})
            record = crew.ranks.first(publish, work, out)
    memory = out / OWN / "memory"
    kept = crew.ranks.first(memory.is_dir)
    numbers = (record["loss"], record["steps"], record["examples"], record["tokens"])
    return TrainedExpert(out, job.base, *numbers, memory if kept else None, job.stage)


# Merging


def merge_stage(
    state: ModelName,
    expert: ModelName,
    *,
    base: ModelName | None = None,
    rule: str | None = None,
    stage: str | None = None,
    export: ModelName | None = None,
    dtype: str | None = None,
    rounding: str | None = None,
    **parameters: Any,
) -> MergeState:
    """Fold an expert into a state; write the model.

    An expert already in the state is not folded again, so scripts can be rerun.

    Args:
        state: folder of the state; created if missing.
        expert: a full model or a peft adapter of the base.
        base: the pretrained model. Required for the first expert, unless it is a TrainedExpert.
        rule: magmax, opcm, average ... Required for the first expert.
        stage: the expert's name in the log (default: the last part of its path or Hub id).
        export: a new folder for the merged model.
        dtype: dtype of the merged weights (default: the base's).
        rounding: stochastic (default) or nearest, for weights of 16 bits.
        parameters: parameters of the rule, as in recipes (`lambda` is written `lambda_`).

    Raises:
        RecipeError: an unknown rule or parameter, or a value other than the state's.
        ModelError: the expert does not fit the base, or is damaged. The state is unchanged.
        RunError: `state` or `export` holds other files.
    """
    crew, folder = _join(Train())[1], Path(state)
    base = base or (expert.base if isinstance(expert, TrainedExpert) else None)
    opened = open_state(folder, base=base, rule=rule, parameters=parameters, crew=crew)
    expert_folder = crew.ranks.local_main_first(lambda: resolve_model(os.fspath(expert), adapters=True))
    digest = crew.ranks.first(expert_sha256, expert_folder)
    number = next((i for i, e in enumerate(opened.log().experts, 1) if e.sha256 == digest), None)
    if number is None:
        opened.add(os.fspath(expert), stages=[stage] if stage else (), crew=crew)
    if export:
        out, wanted = Path(export), number or len(opened.log().experts)
        if not crew.ranks.first(_is_exported, opened, out, wanted, (dtype, rounding)):
            opened.export(out, dtype=dtype, rounding=rounding, crew=crew)
    return opened


def open_state(
    folder: Path, *, base: ModelName | None, rule: str | None, parameters: Mapping[str, Any], crew: Crew
) -> MergeState:
    """Open the state in a folder, or create it.

    Raises:
        RecipeError: the state has another base, rule or parameter value.
    """
    if crew.ranks.first((folder / "state.json").is_file):
        state = MergeState(folder)
        crew.ranks.first(_check_same_start, state, base, rule, parameters)
        return state
    if not base or not rule:
        lacking = " and ".join(word for word, value in (("base", base), ("rule", rule)) if not value)
        raise RecipeError(f"{folder} holds no state yet. To start one, pass {lacking}, such as rule='magmax'.")
    return MergeState.create(folder, base=os.fspath(base), rule=rule, crew=crew, **parameters)


def _check_same_start(
    state: MergeState, base: ModelName | None, rule: str | None, parameters: Mapping[str, Any]
) -> None:
    log = state.log()
    asked = {word.rstrip("_"): value for word, value in parameters.items()}
    have = {word.rstrip("_"): value for word, value in log.parameters.items()}
    wrong = [f"{word} {value!r}, not {have[word]!r}" for word, value in asked.items() if have.get(word, value) != value]
    for word in asked:
        if word not in have:
            raise RecipeError(unknown("parameter", word, have, where=f"rule {log.rule} of {state.folder}"))
    if rule and rule != log.rule:
        wrong.append(f"rule {rule!r}, not {log.rule!r}")
    if base and resolve_model(os.fspath(base)).resolve() != Path(log.base_folder).resolve():
        wrong.append(f"base {os.fspath(base)!r}, not {log.base!r}")
    if wrong:
        raise RecipeError(
            f"{state.folder} was started with other settings: this call has {'; '.join(wrong)}. Omit these arguments "
            "to continue the state, or choose a new folder."
        )


def _is_exported(state: MergeState, out: Path, count: int, asked: tuple[str | None, str | None]) -> bool:
    """Check for an export of the first `count` experts, as asked.

    Raises:
        RunError: it is stored otherwise, or it is missing and later experts are already folded.
    """
    experts = [e.sha256 for e in state.log().experts]
    file = out / LINEAGE
    if file.is_file():
        exported = read_lineage(out)
        if [e["sha256"] for e in exported["experts"]] == experts[:count] and exported["rule"] == state.log().rule:
            have = tuple(exported["stored"][word] for word in ("dtype", "rounding"))
            if any(word and mine not in (word, "none") for word, mine in zip(asked, have, strict=True)):
                raise RunError(
                    f"{out} holds this merge in {' and '.join(have)}; this call asks for "
                    f"{' and '.join(word for word in asked if word)}. Choose a new folder, or remove this one."
                )
            return True
    if count < len(experts):
        later = ", ".join(e.stage for e in state.log().experts[count:])
        raise RunError(
            f"{state.folder} already holds later experts ({later}), so the merge without them can no longer be "
            f"written to {out}. Omit `export`, or drop those stages first."
        )
    return False


# Scoring


def score_stage(
    model: ModelName | Any,
    tasks: Sequence[str | Mapping[str, Any] | Task],
    *,
    tasks_folder: ModelName | None = None,
    base: ModelName | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    **evaluate: Any,
) -> dict[str, TaskScore]:
    """Measure a model with lm-eval.

    Args:
        model: a full model, a peft adapter, or a model in memory (left unchanged).
        tasks: lm-eval task names, suite names, or tasks made from datasets, with the fields of a recipe's task:
            {"name": "law", "kind": "perplexity", "dataset": "law-heldout.jsonl"}.
        tasks_folder: folder with further lm-eval task files.
        base: base of an adapter whose config names none.
        tokenizer: tokenizer of a model in memory.
        trust_remote_code: allow the model, and task files, to run their own code.
        evaluate: limit, batch_size, max_length, dtype, ... as under `evaluate` in recipes.

    Raises:
        RecipeError: an unknown task or field.
        DataError: a task's data are unreadable, or its score is not a number.
        ModelError: the model is missing or damaged.
        ResourceError: the Hub with a task's data cannot be reached.
    """
    how = evaluate_of(evaluate, tasks_folder)
    wanted = tasks_of(tasks)
    _, crew = _join(Train())
    check_versions(crew.ranks)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        crew.ranks.main_first(lambda: write_tasks(wanted, made, how, trust_remote_code=trust_remote_code))
        if not isinstance(model, str | os.PathLike):
            if tokenizer is None:
                raise RecipeError("score_stage: a model in memory needs a tokenizer. Pass `tokenizer`.")
            request = ScoreRequest(wanted, made, how, trust_remote_code=trust_remote_code)
            scores = score_loaded(model, tokenizer, request, ranks=crew.ranks)
        else:
            folder = crew.ranks.local_main_first(lambda: resolve_model(os.fspath(model), adapters=True))
            base_name = os.fspath(base) if base else model.base if isinstance(model, TrainedExpert) else None
            whole = crew.ranks.local_main_first(lambda: resolve_model(str(base_name)) if base_name else base_of(folder))
            crew.ranks.all(check_loads, whole, trusted=trust_remote_code)
            scores = score_model(
                folder, wanted, task_folder=made, evaluate=how, ranks=crew.ranks, base=whole,
                trust_remote_code=trust_remote_code,
            )[1]  # fmt: skip
        return crew.ranks.first(lambda: scores)


def write_tasks(tasks: Sequence[Task], folder: Path, evaluate: Evaluate, *, trust_remote_code: bool = False) -> None:
    """Write tasks made from datasets; check all tasks.

    Each rank writes its own folder, since temporary folders are not shared between machines. Raises as `check_tasks`.
    """
    for task in tasks:
        if task.dataset:
            write_task(folder, task)
    folders = evaluate.task_folders(folder)
    check_tasks(tasks, folders, limit=evaluate.limit, trust_remote_code=trust_remote_code)


def tasks_of(tasks: Sequence[str | Mapping[str, Any] | Task]) -> list[Task]:
    """Return tasks from names, fields or suites.

    Raises:
        RecipeError: an unknown suite, or invalid fields.
    """
    return list(_checked({"general_tasks": list(tasks)}).general_tasks)


def evaluate_of(fields: Mapping[str, Any], tasks_folder: ModelName | None) -> Evaluate:
    """Return scoring settings.

    Raises:
        RecipeError: an unknown field or invalid value.
    """
    fields = {**fields, "include_path": os.fspath(tasks_folder)} if tasks_folder else fields
    known = [name for name in Evaluate.model_fields if name not in ("general_tasks", "matrix", "validation")]
    for word in fields:
        if word not in known:
            raise RecipeError(unknown("field", str(word), known, where="score_stage"))
    return _checked(fields)


def _checked(fields: Mapping[str, Any]) -> Evaluate:
    try:
        return Evaluate.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("score_stage", *first["loc"])).replace("general_tasks", "tasks")
        raise RecipeError(
            f"{place}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r:.60})"
        ) from error


def _join(train: Train) -> tuple[PartialState, Crew]:
    """Join the process group; leave it at exit."""
    import torch.distributed as dist

    met = dist.is_available() and dist.is_initialized()
    ranks, crew = join_ranks(train.sft_fields)
    if crew.ranks.size > 1 and not met:
        atexit.register(leave_ranks)
    return ranks, crew
