"""lm-eval task files for a recipe's datasets, usable with the stock command:

lm_eval --model hf --model_args pretrained=FOLDER --include_path RUN/tasks --tasks law_heldout
"""

from __future__ import annotations

import functools
import glob
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from datasets import Dataset
from pyarrow import parquet

from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.runtime.files import replacing, write_atomically
from hf_contmerge.training.data import StageData, documents, require_chat_template, task_rows


def write_perplexity_task(folder: Path, name: str, documents: Sequence[str]) -> None:
    """Write an lm-eval perplexity task over documents."""
    data = _write_rows(folder / f"{name}.parquet", [{"text": text} for text in documents])
    aggregations = {"word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity",
                    "bits_per_byte": "bits_per_byte"}  # fmt: skip
    metrics = [{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in aggregations.items()]
    _write_task(folder, name, data, {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": metrics,
    })  # fmt: skip


def write_choice_task(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write an lm-eval multiple-choice task.

    Args:
        folder: the task folder.
        name: name of the task.
        rows: `query`, `choices` and `gold` (index of the right choice).
    """
    data = _write_rows(folder / f"{name}.parquet", rows)
    _write_task(folder, name, data, {
        "output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    })  # fmt: skip


def write_answer_task(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], *, max_new_tokens: int, stop: Sequence[str]
) -> None:
    """Write an lm-eval exact-match generation task.

    Blanks around an answer are ignored.

    Args:
        folder: the task folder.
        name: name of the task.
        rows: `query` (the prompt) and `gold` (the expected text).
        max_new_tokens: generation limit.
        stop: strings that end the answer.
    """
    data = _write_rows(folder / f"{name}.parquet", rows)
    _write_task(folder, name, data, {
        "output_type": "generate_until", "doc_to_text": "query", "doc_to_target": "gold",
        "generation_kwargs": {"until": list(stop), "max_gen_toks": max_new_tokens, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    })  # fmt: skip


def write_task(folder: Path, task: Task) -> None:
    """Write the lm-eval task for a recipe's dataset.

    Raises:
        DataError: the dataset is unusable; see `task_rows`.
    """
    rows = task_rows(task)
    if task.kind == "perplexity":
        write_perplexity_task(folder, task.name, [row["text"] for row in rows])
    elif task.kind == "exact_match":
        write_answer_task(folder, task.name, rows, max_new_tokens=task.max_new_tokens, stop=task.stop)
    else:
        write_choice_task(folder, task.name, rows)


def heldout_documents(data: StageData, *, chars: int, load_tokenizer: Callable[[], Any]) -> list[str]:
    """Return a stage's held-out examples as documents."""
    return stage_documents(data, data.heldout, chars=chars, load_tokenizer=load_tokenizer)


def stage_documents(data: StageData, examples: Dataset, *, chars: int, load_tokenizer: Callable[[], Any]) -> list[str]:
    """Return a stage's examples as documents.

    Conversations use the tokenizer's chat template.
    """
    load = functools.cache(load_tokenizer)  # texts need none

    def render(messages: list[dict[str, Any]], **arguments: Any) -> str:
        tokenizer = load()
        require_chat_template(tokenizer)
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)

    return documents(examples, data.form, chars=chars, render=render)


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows for lm-eval, and as JSON Lines for people.

    The JSON reader of `datasets` takes strings for dates, so that lm-eval reads Parquet.
    """
    write_atomically(path.with_suffix(".jsonl"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with replacing(path) as file:
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return path


def _write_task(folder: Path, name: str, data: Path, fields: Mapping[str, Any]) -> None:
    file = glob.escape(str(data.resolve()))  # lm-eval takes a pattern
    task = {
        "task": name, "dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test", **fields, "metadata": {"version": 1.0},
    }  # fmt: skip
    write_atomically(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
