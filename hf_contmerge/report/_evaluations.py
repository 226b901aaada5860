"""`.eval_results` of a published model: its scores on datasets of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from hf_contmerge.report._contents import EVALUATIONS, Contents
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.run.scores import TaskScore, load_scores
from hf_contmerge.scoring.sources import HubData, hub_datasets


def task_data(run: Run) -> dict[str, HubData]:
    """Return the Hub datasets behind a run's tasks, by task."""
    return hub_datasets(run.recipe.measured(run.stage_numbers()), run.tasks)


def evaluations(run: Run, entry: Merge, t: int, data: Mapping[str, HubData]) -> dict[str, Contents]:
    """Return the file with a stage's scores; empty without Hub datasets.

    `data`: of `task_data`.
    """
    from huggingface_hub import eval_result_entries_to_yaml

    scores, tasks = load_scores(run.merged(t, entry)), run.recipe.measured(run.stage_numbers())
    entries = [
        _entry(task, scores[task.name], data[task.name])
        for task in tasks
        if task.name in data and task.name in scores and scores[task.name].block == "accuracy"
    ]
    if not entries:
        return {}
    return {EVALUATIONS: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()}


def _entry(task: Task, score: TaskScore, data: HubData) -> Any:
    """Return a score as the Hub reads it."""
    from huggingface_hub import EvalResultEntry

    shots = f"{task.num_fewshot} examples in the prompt, " if task.num_fewshot else ""
    error = "" if score.stderr is None else f", 95 % interval about ± {1.96 * score.stderr:.4f}"
    return EvalResultEntry(
        dataset_id=data.path, task_id=data.config or "default", dataset_revision=data.commit, value=score.value,
        notes=f"lm-evaluation-harness task {task.name}, {score.metric}, {shots}{len(score.gains)} documents{error}",
    )  # fmt: skip
