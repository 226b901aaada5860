"""`.eval_results` of a published model: its scores on datasets of the Hub."""

from __future__ import annotations

from typing import Any

import yaml

from hf_contmerge.report._contents import EVALUATIONS, Contents
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.run.scores import TaskScore, load_scores
from hf_contmerge.scoring.sources import hub_data


def evaluations(run: Run, entry: Merge, t: int) -> dict[str, Contents]:
    """Return the file with a stage's scores; empty without Hub datasets."""
    from huggingface_hub import eval_result_entries_to_yaml

    scores, tasks = load_scores(run.merged(t, entry)), run.recipe.measured(run.stage_numbers())
    measured = [(task, scores[task.name]) for task in tasks if task.name in scores]
    entries = [found for task, score in measured if (found := _entry(run, task, score))]
    if not entries:
        return {}
    return {EVALUATIONS: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()}


def _entry(run: Run, task: Task, score: TaskScore) -> Any:
    """Return a score as the Hub reads it; None for local data."""
    from huggingface_hub import EvalResultEntry

    data = hub_data(task, run.tasks)
    if data is None or score.block != "accuracy":
        return None
    shots = f"{task.num_fewshot} examples in the prompt, " if task.num_fewshot else ""
    error = "" if score.stderr is None else f", 95 % interval about ± {1.96 * score.stderr:.4f}"
    return EvalResultEntry(
        dataset_id=data.path, task_id=data.config or "default", dataset_revision=data.commit, value=score.value,
        notes=f"lm-evaluation-harness task {task.name}, {score.metric}, {shots}{len(score.gains)} documents{error}",
    )  # fmt: skip
