"""Three functions for people who keep their own script; each is what the loop does for one phase of one stage.

    from hf_contmerge import finetune_stage, merge_stage, score_stage

    law = finetune_stage("owner/base", "law.jsonl", "experts/law", learning_rate=1e-5, max_steps=500)
    merge_stage("state", law, rule="magmax", export="merged/law")
    scores = score_stage("merged/law", ["arc_easy"])

    code = finetune_stage(law, "code.jsonl", "experts/code", learning_rate=1e-5, max_steps=500)  # goes on from law
    merge_stage("state", code, export="merged/code")

A script that was stopped is started again as it is: what is done is found and not done twice, training goes on from its
newest checkpoint. Under `torchrun` or `accelerate launch` all ranks call each function together, and share the work.
"""

from __future__ import annotations

import atexit
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import ValidationError

from hf_contmerge.errors import RecipeError, RunError, unknown
from hf_contmerge.loop._outside import clear_others, finished, is_trained, publish, working_folder
from hf_contmerge.loop._record import Recorder
from hf_contmerge.loop.stages import train_at
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.run.places import ExpertPlace
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.launching import join_ranks, leave_ranks
from hf_contmerge.runtime.versions import check_versions
from hf_contmerge.scoring.files import write_task
from hf_contmerge.scoring.score import score_loaded, score_model
from hf_contmerge.scoring.tasks import check_tasks
from hf_contmerge.training.job import OWN, Data, ModelName, TrainedExpert, base_of, look_up, recipe_of

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
    """Train one expert, or return it if this very call has trained it before.

    Args:
        model: what to start from. Given a TrainedExpert, the strategies remember the stages before.
        data: what to train on. Nothing is held out of it, unless the fields of a dataset say so.
        out: a folder for the expert, which appears when it is whole.
        base: the pretrained model, if it is not `model` itself and not known of it: its tokenizer goes with the expert.
        strategy: one name or several, as in recipes: full, lora, [lora, replay] ...
        parameters: of the strategy.
        seed: of the data order, dropout and whatever is drawn.
        training: fields of TRL's SFTConfig (with preference pairs DPOConfig): learning_rate, max_steps, ...; and
            `trust_remote_code`.

    Raises:
        RecipeError: an unknown field, strategy or parameter.
        DataError: the data are missing, or not what can be trained on.
        ModelError: the model is missing, damaged, or does not fit the base.
        RunError: `out` holds something else.
        ResourceError: the machine has too little memory, or the Hub cannot be reached.
    """
    recipe = recipe_of(data, strategy, parameters or {}, seed, training)
    ranks, crew = _join(recipe.train)
    out = Path(out)
    job = crew.ranks.main_first(look_up, recipe, model, data, base)
    inputs = crew.ranks.first(job.inputs)
    record = crew.ranks.first(finished, out, inputs)
    if record is None:
        work = ExpertPlace(working_folder(out, inputs), "base")
        crew.ranks.first(clear_others, out, work.folder)
        if not crew.ranks.first(is_trained, work):
            recorder = Recorder(work.folder, ranks, crew, quiet=True)
            train_at(work, job, recorder, more={"inputs": inputs})
        record = crew.ranks.first(publish, work, out)
    memory = out / OWN / "memory"
    kept = crew.ranks.first(memory.is_dir)
    seen = (record["loss"], record["steps"], record["examples"], record["tokens"])
    return TrainedExpert(out, job.base, *seen, memory if kept else None, job.stage)


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
    **parameters: Any,
) -> MergeState:
    """Fold an expert into the state in a folder, which is made if it is not there; write the merged model.

    An expert that the state holds already is not folded again, so that a script can be started again.

    Args:
        state: the folder of the state.
        expert: a full model or a peft adapter of the base.
        base: the pretrained model. Needed for the first expert, unless that is a TrainedExpert.
        rule: magmax, opcm, average ... Needed for the first expert.
        stage: what the expert is called in the log; by default the last word of its name.
        export: a new folder for the merged model.
        dtype: of the merged model's weights; the base's own by default.
        parameters: of the rule, as in recipes (`lambda` is written `lambda_`).

    Raises:
        RecipeError: an unknown rule or parameter, or one that the state was not started with.
        ModelError: the expert does not fit the base, or is damaged. The state is as it was.
        RunError: `state` or `export` holds something else.
    """
    crew, folder = _join(Train())[1], Path(state)
    base = base or (expert.base if isinstance(expert, TrainedExpert) else None)
    opened = open_state(folder, base=base, rule=rule, parameters=parameters, crew=crew)
    found = crew.ranks.local_main_first(lambda: resolve_model(os.fspath(expert), adapters=True))
    digest = crew.ranks.first(expert_sha256, found)
    number = next((i for i, e in enumerate(opened.log().experts, 1) if e.sha256 == digest), None)
    if number is None:
        opened.add(os.fspath(expert), stages=[stage] if stage else (), crew=crew)
    if export:
        out, wanted = Path(export), number or len(opened.log().experts)
        if not crew.ranks.first(_is_exported, opened, out, wanted):
            opened.export(out, dtype=dtype, crew=crew)
    return opened


def open_state(
    folder: Path, *, base: ModelName | None, rule: str | None, parameters: Mapping[str, Any], crew: Crew
) -> MergeState:
    """Return the state in a folder, or start one. Raises RecipeError if it was started with other words."""
    if crew.ranks.first((folder / "state.json").is_file):
        state = MergeState(folder)
        crew.ranks.first(_check_same_start, state, base, rule, parameters)
        return state
    if not base or not rule:
        lacking = " and ".join(word for word, value in (("base", base), ("rule", rule)) if not value)
        raise RecipeError(f"{folder} holds no state yet: to start one takes {lacking}, such as rule='magmax'.")
    words = {word.rstrip("_"): value for word, value in parameters.items()}
    return MergeState.create(folder, base=os.fspath(base), rule=rule, crew=crew, **words)


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
            f"{state.folder} was started otherwise: you ask for {'; '.join(wrong)}. Leave these words out to go on "
            "with it, or name a new folder."
        )


def _is_exported(state: MergeState, out: Path, count: int) -> bool:
    """Say whether a folder holds the merge of the first experts of a state. Raises RunError if it no longer can."""
    experts = [e.sha256 for e in state.log().experts]
    file = out / "merge.json"
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        if [e["sha256"] for e in there["experts"]] == experts[:count] and there["rule"] == state.log().rule:
            return True
    if count < len(experts):
        later = ", ".join(e.stage for e in state.log().experts[count:])
        raise RunError(
            f"{state.folder} holds later experts already ({later}), so the merge without them cannot be written to "
            f"{out} any more. Leave `export` out, or drop those stages first."
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
    """Measure a model with lm-eval; return each task's score, on all ranks.

    Args:
        model: a full model or a peft adapter; or a model in memory, which is left as it was.
        tasks: names that lm-eval knows, names of suites, or tasks made from datasets, with the fields of a recipe's
            task: {"name": "law", "kind": "perplexity", "dataset": "law-heldout.jsonl"}.
        tasks_folder: more lm-eval task files.
        base: of an adapter that does not name its own.
        tokenizer: of a model in memory.
        trust_remote_code: let the model run code of its own.
        evaluate: limit, batch_size, max_length, dtype, ... as under `evaluate` in recipes.

    Raises:
        RecipeError: an unknown task or field.
        DataError: a task's data cannot be read, or it gave no number.
        ModelError: the model is missing or damaged.
        ResourceError: the Hub, where a task's data lie, cannot be reached.
    """
    how = evaluate_of(evaluate, tasks_folder)
    wanted = tasks_of(tasks)
    ranks, crew = _join(Train())
    check_versions(crew.ranks)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        crew.ranks.main_first(write_tasks, wanted, made, how)
        if not isinstance(model, str | os.PathLike):
            if tokenizer is None:
                raise RecipeError("score_stage: a model in memory needs its `tokenizer`.")
            scores = score_loaded(model, tokenizer, wanted, task_folder=made, evaluate=how, ranks=ranks)
        else:
            folder = crew.ranks.local_main_first(lambda: resolve_model(os.fspath(model), adapters=True))
            known = os.fspath(base) if base else model.base if isinstance(model, TrainedExpert) else None
            whole = crew.ranks.local_main_first(lambda: resolve_model(str(known)) if known else base_of(folder))
            scores = score_model(
                folder, wanted, task_folder=made, evaluate=how, ranks=ranks, base=whole,
                trust_remote_code=trust_remote_code,
            )[1]  # fmt: skip
        return crew.ranks.first(lambda: scores)


def write_tasks(tasks: Sequence[Task], folder: Path, evaluate: Evaluate) -> None:
    """Write the tasks that are made from datasets into a folder, and see that all can be loaded. Raises as check_tasks.

    Each rank has a folder of its own: a temporary one is not seen from other machines.
    """
    for task in tasks:
        if task.dataset:
            write_task(folder, task)
    check_tasks(tasks, evaluate.task_folders(folder), limit=evaluate.limit)


def tasks_of(tasks: Sequence[str | Mapping[str, Any] | Task]) -> list[Task]:
    """Return tasks from their names, their fields, and names of suites. Raises RecipeError for what makes none."""
    return list(_checked({"general_tasks": list(tasks)}).general_tasks)


def evaluate_of(fields: Mapping[str, Any], tasks_folder: ModelName | None) -> Evaluate:
    """Return how to measure; `tasks_folder` has more task files. Raises RecipeError for what is no field or value."""
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
    """Meet the other ranks; part from them when the process ends, if it was here that they met."""
    import torch.distributed as dist

    met = dist.is_available() and dist.is_initialized()
    ranks, crew = join_ranks(train.sft_fields)
    if crew.ranks.size > 1 and not met:
        atexit.register(leave_ranks)
    return ranks, crew
