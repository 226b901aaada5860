"""lm-eval's results of one task -> a TaskScore, document by document."""

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
"""What lm-eval logs of one document."""


def task_score(results: Any, name: str, leaves: Mapping[str, Any]) -> TaskScore:
    """Return one task's score; a group's is that of all the documents of its leaves together.

    Args:
        results: what lm-eval's `evaluate` returned.
        name: of the task.
        leaves: lm-eval's own tasks in it, by name.

    Raises:
        DataError: it has no documents, no number for each, or one that is nan or infinite.
    """
    rows = [(row, leaf) for key, leaf in leaves.items() for row in _rows(results, key)]
    samples = [row for row, _ in rows]
    if not samples:
        raise DataError(f"The task {name} has no documents to measure.")
    metric = _metric(name, samples)
    block: Block = "perplexity" if metric in _PERPLEXITIES else "accuracy"
    values = [s[metric] for s in samples]
    pairs = [tuple(map(float, v)) if isinstance(v, tuple | list) else (float(v), 1.0) for v in values]
    sample = Sample(tuple(g for g, _ in pairs), tuple(w for _, w in pairs))
    if not math.isfinite(sample.utility) or any(_is_nan(s) for s in samples):
        raise DataError(f"The task {name} gave nan or infinity on this model: the weights are damaged or diverged.")
    documents = tuple(s["doc_hash"] for s in samples)
    value = math.exp(-sample.utility) if block == "perplexity" else sample.utility
    return TaskScore(
        block, metric, value, sample.utility, sample.stderr(), sample.gains, sample.weights,
        _details(results, name, documents), documents=documents,
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


def _rows(results: Any, leaf: str) -> list[Row]:
    """Return the results of each document, in order; where a task filters answers in several ways, the first way."""
    samples = sorted(results["samples"][leaf], key=lambda s: s["doc_id"])
    return [s for s in samples if s.get("filter") == samples[0].get("filter")]


def _metric(name: str, samples: Sequence[Row]) -> str:
    """Return the metric to take, which all documents must have as a number of their own (or a sum and its weight)."""

    def has(sample: Row, metric: str) -> bool:
        return metric in sample and (metric in _PERPLEXITIES or not isinstance(sample[metric], tuple | list))

    metrics = (*_ACCURACIES, *_PERPLEXITIES)
    found = next((m for m in metrics if all(has(s, m) for s in samples)), None)
    if found is None:
        raise DataError(f"The task {name} reports none of {', '.join(metrics)} for every document; use another.")
    return found


def _is_nan(sample: Row) -> bool:
    """Say whether a log-likelihood is no number: a multiple choice among such ones would still give an accuracy."""
    answers = [r[0] if isinstance(r, tuple | list) else r for r in sample["filtered_resps"]]
    return any(isinstance(a, float) and math.isnan(a) for a in answers)


def _text(row: Row, leaf: Any) -> str:
    """Return what a document says: its question without the examples before it, or its text."""
    question = leaf.doc_to_text(row["doc"])
    if isinstance(question, str) and question.strip():
        return question.strip()
    return str(row["arguments"][0][0]).strip()  # a text to read; or the first of several questions to one answer


def _answer(row: Row, leaf: Any) -> str:
    """Return what the model wrote or chose; where it was given one answer to judge, that one if it would say so."""
    responses = row["filtered_resps"]
    if leaf.OUTPUT_TYPE == "generate_until":
        first = responses[0]
        return str(first[0] if isinstance(first, list | tuple) and first else first)
    if leaf.OUTPUT_TYPE != "multiple_choice":
        return str(row["target"]).strip() if responses[0][1] else ""
    choices = leaf.doc_to_choice(row["doc"])
    likelihoods = [found for found, _ in responses[: len(choices)]]  # others may follow, to compare with
    return str(choices[max(range(len(likelihoods)), key=likelihoods.__getitem__)]).strip()
