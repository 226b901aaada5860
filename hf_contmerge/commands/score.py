"""`contmerge score`: measure one model outside a run; cached scores are instant.

    contmerge score runs/x/stages/02-code/merges/opcm/merged --run runs/x
    contmerge score owner/model --tasks arc_easy,piqa --limit 200
    contmerge score path/to/adapter --base owner/model --tasks law --include-path my_tasks
    torchrun --nproc-per-node 2 --no-python contmerge score MODEL --tasks arc_easy

Cached scores are printed without torch, transformers and lm-eval, whose imports take seconds.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_contmerge.commands._arguments import add_cpu_argument, compute_on, print_json, whole_number, words_of
from hf_contmerge.errors import RecipeError, ResourceError
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.ranks import is_launched
from hf_contmerge.runtime.versions import versions
from hf_contmerge.scoring.cache import ScoreCache
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.known import KnownScores, known_at_once

_PER_DOCUMENT = ("gains", "weights", "documents", "texts", "answers")


@dataclass(frozen=True)
class Answer:
    """The scores to print."""

    model: str
    """Digest of the scored model."""
    dtype: str
    scores: dict[str, TaskScore]
    cached: frozenset[str]
    """Tasks with cached scores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge score`."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub id[@revision], a peft adapter or a .gguf file")
    parser.add_argument("--base", metavar="MODEL", help="base of an adapter (default: from its config)")
    parser.add_argument("--json", metavar="OUT", nargs="?", const="", help="print JSON; or also write it to a file")
    add_measuring(parser)
    parser.set_defaults(do=score_command)


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the tasks and settings of a measurement; see `score_request`."""
    parser.add_argument("--tasks", metavar="A,B", help="of lm-eval, --include-path or --run (default: all of --run)")
    parser.add_argument("--run", metavar="RUN", help="use this run's tasks, limits and dtype")
    parser.add_argument("--include-path", metavar="DIR", help="a folder of lm-eval task YAML files")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="the first N documents of each task")
    parser.add_argument("--num-fewshot", type=whole_number(0), metavar="N", help="examples before each question")
    parser.add_argument("--batch-size", type=_batch, metavar="N", help="a number or auto (default: 8)")
    parser.add_argument("--max-length", type=whole_number(2), metavar="N", help="tokens per forward pass")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="dtype of the weights")
    parser.add_argument("--no-cache", action="store_true", help="ignore and do not write cached scores")
    add_cpu_argument(parser)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="allow code of the model and of task files to run"
    )


def score_command(args: argparse.Namespace) -> None:
    """Measure a model and print its scores.

    Raises:
        ContmergeError: a user error.
    """
    compute_on(cpu=args.cpu)
    out = output_file("--json", args.json)
    request = score_request(args)
    for answer in measured({args.model: args.base}, request):
        facts = _summary(args.model, request, answer)
        if args.json == "":
            print_json(facts)
        else:
            _show(args.model, request, answer)
        if out:
            write_atomically(out, json.dumps(facts, indent=1) + "\n")


def output_file(option: str, name: str | None) -> Path | None:
    """Return the file to write. Raises ResourceError without its folder."""
    out = Path(name) if name else None
    if out and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ResourceError(f"{option} {out}: give a file in an existing folder; nothing was measured.")
    return out


def score_request(args: argparse.Namespace) -> ScoreRequest:
    """Build the score request; model names are resolved later."""
    run = Run.load(args.run) if args.run else None
    if run:
        run.settle()
        run.check_tasks()
    if not args.tasks and not run:
        raise RecipeError("Nothing to measure: give --tasks (one name, or several with commas), or --run.")
    given = {field: getattr(args, field) for field in ("include_path", "limit", "batch_size", "max_length", "dtype")}
    kept = run.recipe.evaluate.model_dump() if run else {}
    given = {field: value for field, value in given.items() if value is not None}
    evaluate = Evaluate.model_validate(kept | given | ({"cache": False} if args.no_cache else {}))
    if evaluate.include_path and not Path(evaluate.include_path).is_dir():
        raise RecipeError(f"--include-path {evaluate.include_path}: no such folder. Give a folder of task files.")
    here = run.tasks if run else Path(os.devnull)
    return ScoreRequest(
        _tasks(args, run), here, evaluate,
        "test" if run and run.recipe.tunes else "all",
        args.trust_remote_code,
    )  # fmt: skip


def _tasks(args: argparse.Namespace, run: Run | None) -> list[Task]:
    """Return the named tasks, or all tasks of the run.

    The run's own tasks keep the run's number of few-shot examples.
    """
    known = {task.name: task for task in run.recipe.measured(run.stage_numbers())} if run else {}
    names = list(dict.fromkeys(words_of(args.tasks))) if args.tasks else list(known)
    if not names:
        raise RecipeError(f"--tasks {args.tasks!r} names no task. Give one name, or several with commas.")
    try:
        named = Evaluate.model_validate({"general_tasks": names}).general_tasks  # expands suites
    except ValidationError as error:
        wrong = error.errors()[0]["input"]
        raise RecipeError(f"--tasks: {wrong!r} is not a task name. Use commas between names, no blanks.") from error
    tasks = [known.get(task.name, task) for task in named]
    return [t if args.num_fewshot is None else t.model_copy(update={"num_fewshot": args.num_fewshot}) for t in tasks]


def measured(models: Mapping[str, str | None], request: ScoreRequest) -> list[Answer]:
    """Return the scores of models, given with their bases, on all ranks.

    Returns:
        An answer for each model on rank 0, nothing elsewhere.
    """
    cache = ScoreCache.open(use=request.evaluate.cache)
    alone = not is_launched()
    known = {name: known_at_once(name, base, request, cache) for name, base in models.items() if alone}
    if alone and all(known.values()):
        return [_answer(scores, {}) for scores in known.values() if scores]
    from hf_contmerge.runtime.launching import join_ranks, keep_freed_memory, leave_ranks
    from hf_contmerge.scoring.score import measure_named

    keep_freed_memory()
    _, crew = join_ranks()
    found = [measure_named(name, base, request, ranks=crew.ranks, cache=cache) for name, base in models.items()]
    leave_ranks()
    return [_answer(*each) for each in found] if crew.ranks.is_main else []


def _answer(known: KnownScores, scores: Mapping[str, TaskScore]) -> Answer:
    return Answer(known.model.sha256, known.model.dtype, {**known.scores, **scores}, frozenset(known.scores))


def _show(name: str, request: ScoreRequest, answer: Answer) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "value", "documents", "", title=f"{name} ({answer.dtype})")
    for task in request.tasks:
        score = answer.scores[task.name]
        error = _stderr(score)
        value = f"{score.value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
        cached = "from the cache" if task.name in answer.cached else ""
        table.add_row(task.name, score.metric, value, str(len(score.gains)), cached)
    Console().print(table)


def _stderr(score: TaskScore) -> float | None:
    """Return the standard error of a score's value.

    For a perplexity exp(-u), it is the standard error of u times the value (delta method).
    """
    return score.stderr if score.stderr is None or score.block == "accuracy" else score.stderr * score.value


def _summary(name: str, request: ScoreRequest, answer: Answer) -> dict[str, Any]:
    tasks = {}
    for task in request.tasks:
        score = answer.scores[task.name]
        numbers = {field: value for field, value in score.to_json().items() if field not in _PER_DOCUMENT}
        cached = task.name in answer.cached
        tasks[task.name] = {**numbers, "value_stderr": _stderr(score), "documents": len(score.gains), "cached": cached}
    model = {"model": name, "scored_sha256": answer.model, "dtype": answer.dtype}
    return {**model, "evaluate": request.evaluate.model_dump(mode="json"), "tasks": tasks, "versions": versions()}


def _batch(text: str) -> int | str:
    return text if text == "auto" else whole_number(1)(text)
