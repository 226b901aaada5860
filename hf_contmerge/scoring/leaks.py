"""Finds tasks with documents from a stage's training data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from hf_contmerge.errors import RunError
from hf_contmerge.run.recipe.parts import Dataset, DataSource, Task
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.runtime.foreign import parse_json, require_shape
from hf_contmerge.training.data import StageData


def leaks(recipe: Recipe, data: Mapping[str, StageData], folder: Path) -> Iterator[str]:
    """Yield a sentence for each stage trained on a task's documents.

    Found are tasks made from a split that a stage reads, in whatever words, and single documents of perplexity tasks
    and held-out texts among the texts of a stage. What tasks of lm-eval score is not looked at.

    Args:
        recipe: of the run.
        data: the examples of its stages.
        folder: of the files of tasks made from datasets.
    """
    texts = _TaskTexts(recipe, folder)
    for stage in recipe.stages:
        if stage.dataset and stage.name in data:
            shared = texts.among(data[stage.name], without=stage.heldout_task)
            for task in recipe.tasks():
                if task.dataset and _reads(stage.dataset, task.dataset):
                    shared.pop(task.name, None)
                    yield _same_split(task, task.dataset, stage.name)
            for name, count in shared.items():
                yield (
                    f"Stage {stage.name} is trained on {count} of the {texts.count(name)} documents that task {name} "
                    "scores: of these, it measures what was memorised. Remove them from one of the two datasets."
                )


def _same_split(task: Task, dataset: Dataset, stage: str) -> str:
    return (
        f"Task {task.name} scores the split {dataset.split} of {dataset.path}, on which stage {stage} is trained: it "
        f"measures what was memorised. Score another split, `dataset: {{path: {dataset.path}, split: ...}}`, or "
        "another dataset."
    )


def _reads(stage: Dataset, task: Dataset) -> bool:
    return any(_overlap(source, task) for source in stage.sources())


def _overlap(one: DataSource, other: DataSource) -> bool:
    """Say if two sources surely share rows.

    Unknown, and False, for two different slices of a split.
    """
    if (one.path, one.config, one.revision) != (other.path, other.config, other.revision):
        return False
    sliced = "[" in one.split and "[" in other.split
    return one.split == other.split or (not sliced and _whole(one.split) == _whole(other.split))


def _whole(split: str) -> str:
    return split.partition("[")[0]


class _TaskTexts:
    """The documents of the perplexity tasks and held-out texts of a recipe."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        made = {task.name: task.dataset for task in recipe.tasks() if task.kind == "perplexity"}
        made |= {stage.heldout_task: stage.dataset for stage in recipe.stages if stage.heldout_task}
        self._tasks: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        """Where documents are cut -> document -> the tasks that have it."""
        for name, dataset in made.items():
            for text in _documents(folder / f"{name}.jsonl"):
                self._tasks[dataset.heldout_chars if dataset else 0][text].add(name)

    def count(self, task: str) -> int:
        return sum(task in names for texts in self._tasks.values() for names in texts.values())

    def among(self, data: StageData, *, without: str | None) -> dict[str, int]:
        """Return task -> number of its documents among the training examples.

        The task `without` is left out.
        """
        shared: dict[str, set[str]] = defaultdict(set)
        parts = [data, *([data.general] if data.general else [])]
        for text in (text for part in parts if part.form == "text" for text in part.train["text"]):
            for chars, tasks in self._tasks.items():
                for name in tasks.get(text[:chars], ()):
                    shared[name].add(text[:chars])
        return {name: len(texts) for name, texts in shared.items() if name != without}


def _documents(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from (_text(line, path) for line in lines)


def _text(line: str, path: Path) -> str:
    try:
        row = parse_json(line)
        require_shape(row, {"text": str})
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Run the recipe again to write it.") from error
    return row["text"]
