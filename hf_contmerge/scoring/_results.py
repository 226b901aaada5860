"""Converts lm-eval's results to per-document scores."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_contmerge.errors import DataError
from hf_contmerge.run.scores import Block, Sample, TaskScore

_ACCURACIES = ("acc", "exact_match", "f1", "acc_norm", "prompt_level_strict_acc")
_PERPLEXITIES = ("word_perplexity", "perplexity", "byte_perplexity")
_SHOWN = 300, 100  # characters of a document, of an answer

Row = Mapping[str, Any]
"""lm-eval's log entry for one document."""


def task_score(results: Any, name: str, leaves: Mapping[str, Any]) -> TaskScore:
    """Convert one task's results to a score.

    A group counts all documents of its leaves together.

    Args:
        results: return value of lm-eval's `evaluate`.
        name: name of the task.
        leaves: lm-eval's own tasks in it, by name.

    Raises:
        DataError: no documents, no number for each document, or a nan or infinite number.
    """
    rows = [(row, leaf) for key, leaf in leaves.items() for row in _rows(results, key)]
    samples = [row for row, _ in rows]
    if not samples:
        raise DataError(f"The task {name} has no documents. Check its dataset, or remove the task.")
    metric = _metric(name, samples)
    block: Block = "perplexity" if metric in _PERPLEXITIES else "accuracy"
    values = [s[metric] for s in samples]
    pairs = [tuple(map(float, v)) if isinstance(v, tuple | list) else (float(v), 1.0) for v in values]
    sample = Sample(tuple(g for g, _ in pairs), tuple(w for _, w in pairs))
    if not math.isfinite(sample.utility) or any(_is_nan(s) for s in samples):
        raise DataError(f"The task {name} gave nan or infinity on this model: its weights are damaged or diverged.")
    documents = tuple(s["doc_hash"] for s in samples)
    value = math.exp(-sample.utility) if block == "perplexity" else sample.utility
    return TaskScore(
        block, metric, value, sample.utility, sample.stderr(), sample.gains, sample.weights,
        {**_details(results, name, documents), **_guessing(rows)}, documents=documents,
        texts=tuple(_text(row, leaf)[: _SHOWN[0]] for row, leaf in rows),
        answers=tuple(_answer(row, leaf)[: _SHOWN[1]] for row, leaf in rows) if block == "accuracy" else (),
    )  # fmt: skip


def _details(results: Any, name: str, documents: Sequence[str]) -> dict[str, Any]:
    reported = results["results"].get(name, {})
    return {
        "metrics": {k.split(",")[0]: v for k, v in reported.items() if isinstance(v, float)},
        "version": results["versions"].get(name),
        "documents_sha256": hashlib.sha256("".join(documents).encode()).hexdigest(),
    }


def _guessing(rows: Sequence[tuple[Row, Any]]) -> dict[str, float]:
    """Return the mean chance of a right guess, and its variance."""
    chances = [_chance(row, leaf) for row, leaf in rows]
    return {
        "chance": math.fsum(chances) / len(chances),
        "chance_variance": math.fsum(c * (1 - c) for c in chances) / len(chances),
    }


def _chance(row: Row, leaf: Any) -> float:
    return 1 / len(leaf.doc_to_choice(row["doc"])) if leaf.OUTPUT_TYPE == "multiple_choice" else 0.0


def _rows(results: Any, leaf: str) -> list[Row]:
    """Return each document's results, in order.

    A task with several answer filters counts the first.
    """
    samples = sorted(results["samples"][leaf], key=lambda s: s["doc_id"])
    return [s for s in samples if s.get("filter") == samples[0].get("filter")]


def _metric(name: str, samples: Sequence[Row]) -> str:
    """Choose the first known metric reported by every document.

    Accuracies must be plain numbers; perplexities may be (sum, weight).
    """

    def has(sample: Row, metric: str) -> bool:
        return metric in sample and (metric in _PERPLEXITIES or not isinstance(sample[metric], tuple | list))

    metrics = (*_ACCURACIES, *_PERPLEXITIES)
    metric = next((m for m in metrics if all(has(s, m) for s in samples)), None)
    if metric is None:
        raise DataError(f"The task {name} reports none of {', '.join(metrics)} for every document. Use another task.")
    return metric


def _is_nan(sample: Row) -> bool:
    """Check for nan log-likelihoods.

    A multiple-choice task still reports an accuracy among nan values.
    """
    answers = [r[0] if isinstance(r, tuple | list) else r for r in sample["filtered_resps"]]
    return any(isinstance(a, float) and math.isnan(a) for a in answers)


def _text(row: Row, leaf: Any) -> str:
    """Return a document's question without few-shot examples, or its text."""
    question = leaf.doc_to_text(row["doc"])
    if isinstance(question, str) and question.strip():
        return question.strip()
    return str(row["arguments"][0][0]).strip()  # a text to score, or the first of several questions with one answer


def _answer(row: Row, leaf: Any) -> str:
    """Return the generated text or the chosen answer.

    For a single-candidate task: the candidate if greedy decoding would produce it, else "".
    """
    responses = row["filtered_resps"]
    if leaf.OUTPUT_TYPE == "generate_until":
        first = responses[0]
        return str(first[0] if isinstance(first, list | tuple) and first else first)
    if leaf.OUTPUT_TYPE != "multiple_choice":
        return str(row["target"]).strip() if responses[0][1] else ""
    choices = leaf.doc_to_choice(row["doc"])
    likelihoods = [likelihood for likelihood, _ in responses[: len(choices)]]  # unconditional likelihoods may follow
    return str(choices[max(range(len(likelihoods)), key=likelihoods.__getitem__)]).strip()
