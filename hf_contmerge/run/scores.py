"""Scores of one model, per task and per document.

Utilities are higher-is-better: an accuracy unchanged, a perplexity as -ln(perplexity) (nats).

A place's record holds each task's numbers, and a digest of its rows in score.parquet: task, document (its digest),
gain, weight, answer, text. Only `write_scores` and `load_scores` know this format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hf_contmerge.errors import RunError
from hf_contmerge.run.places import Place
from hf_contmerge.runtime.digests import text_digest
from hf_contmerge.runtime.files import replacing

Block = Literal["accuracy", "perplexity"]
BLOCKS: tuple[Block, ...] = ("accuracy", "perplexity")

DOCUMENTS_FILE = "score.parquet"
_COLUMNS = {"documents": "document", "gains": "gain", "weights": "weight", "answers": "answer", "texts": "text"}
"""Per-document field of TaskScore -> column."""
_NUMBERS = ("block", "metric", "value", "utility", "stderr", "details")
"""Fields of TaskScore in the record."""
_LARGEST = 1e100
_DIGEST = "documents_digest"
_FIX = "Restore the file, or score again with `contmerge redo RUN score`, then `contmerge run`."


@dataclass(frozen=True)
class Sample:
    """A task's per-document results: utility = sum(gains) / sum(weights).

    Accuracy: gain 0 or 1, weight 1. Perplexity per word: the gain is the document's log-likelihood (nats), the
    weight its number of words.
    """

    gains: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def utility(self) -> float:
        return sum(self.gains) / sum(self.weights)

    def stderr(self) -> float | None:
        """Return the utility's standard error over documents (ratio estimator).

        None for one document.
        """
        return ratio_stderr(self.gains, self.weights)


@dataclass(frozen=True)
class TaskScore:
    """One task's score for one model."""

    block: Block
    metric: str
    value: float
    """lm-eval's metric: an accuracy, or a perplexity per word."""
    utility: float
    stderr: float | None
    """Standard error of the utility."""
    gains: tuple[float, ...]
    weights: tuple[float, ...]
    details: Mapping[str, Any]
    """The task's other metrics, its version and the digest of its documents."""
    documents: tuple[str, ...] = ()
    """Digest of each document, in the order of `gains`; () if not kept."""
    texts: tuple[str, ...] = ()
    """Beginning of each document (a question, a text), for display; () if not kept."""
    answers: tuple[str, ...] = ()
    """The model's answer to each document; () for a perplexity."""

    @property
    def sample(self) -> Sample:
        return Sample(self.gains, self.weights)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def documents_digest(self) -> str:
        """Return a digest of the per-document results."""
        return text_digest(json.dumps([getattr(self, field) for field in _COLUMNS]))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskScore:
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
        return cls(**fields)


Scores = Mapping[str, TaskScore]
"""Task name -> score of one model."""


def write_scores(place: Place, scores: Scores, *, texts: bool = False) -> dict[str, Any]:
    """Write score.parquet; return the tasks' entries for the record.

    The caller writes the record next. `texts`: keep the beginnings of the documents as well; one place with all tasks
    is enough for a run.
    """
    import pyarrow as pa
    from pyarrow import parquet

    kept = {name: score if texts else replace(score, texts=()) for name, score in scores.items()}
    columns: dict[str, list[Any]] = {"task": [name for name, score in kept.items() for _ in score.gains]}
    for field, column in _COLUMNS.items():
        columns[column] = [v for score in kept.values() for v in getattr(score, field) or [None] * len(score.gains)]
    types = {"task": pa.dictionary(pa.int32(), pa.string()), "gain": pa.float64(), "weight": pa.float64()}
    fields = [pa.field(name, types.get(name, pa.string())) for name in columns]
    with replacing(place.folder / DOCUMENTS_FILE) as file:
        table = pa.table(columns, schema=pa.schema(fields))
        parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
    return {
        name: {k: v for k, v in score.to_json().items() if k not in _COLUMNS} | {_DIGEST: score.documents_digest()}
        for name, score in kept.items()
    }


def scored_tasks(place: Place) -> tuple[str, ...]:
    """Return the tasks scored at a place, without reading score.parquet."""
    return tuple(place.record("score")["tasks"]) if place.is_done("score") else ()


def load_scores(place: Place) -> Scores:
    """Return the scores at a place, possibly none.

    Raises RunError if score.parquet is missing, damaged, or does not match the record.
    """
    if not place.is_done("score"):
        return {}
    tasks: Mapping[str, Any] = place.record("score")["tasks"]
    file = place.folder / DOCUMENTS_FILE
    documents = _read_documents(file)
    scores = {}
    for name, task in tasks.items():
        if name not in documents:
            raise RunError(f"{file} has no document of the task {name}. {_FIX}")
        _require_sense(place, name, task, documents[name])
        scores[name] = TaskScore.from_json({**{field: task[field] for field in _NUMBERS}, **documents[name]})
        # Not the file's digest: a run that is killed while it measures more tasks has a newer file than record.
        if scores[name].documents_digest() != task[_DIGEST]:
            raise RunError(f"{file} has other results of the task {name} than were measured: it is damaged. {_FIX}")
    return scores


def _require_sense(place: Place, name: str, task: Mapping[str, Any], documents: Mapping[str, list[Any]]) -> None:
    """Raise RunError for a score beyond its metric's range."""
    gains, weights = documents["gains"], documents["weights"]
    plain = all(isinstance(x, float) and abs(x) < _LARGEST for x in (*gains, *weights, float(task["utility"])))
    if task["block"] not in BLOCKS or not plain or min(weights) < 0 or sum(weights) == 0:
        raise RunError(f"The score of {name} at {place.folder} is damaged: it is no {' or '.join(BLOCKS)}. {_FIX}")


def _read_documents(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Return task -> field of TaskScore -> values, in document order."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:  # `read_table` imports pandas
            table = file.read().to_pydict()
        columns = {field: table[column] for field, column in _COLUMNS.items()}
        tasks: list[str] = table["task"]
    except (OSError, ArrowException, KeyError, ValueError, MemoryError) as error:
        raise RunError(f"Cannot read {path}: {error}. {_FIX}") from error
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        rows.setdefault(task, []).append(row)
    return {
        task: {field: [values[i] for i in of] if values[of[0]] is not None else [] for field, values in columns.items()}
        for task, of in rows.items()
    }


def ratio_stderr(gains: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return the standard error of sum(gains) / sum(weights) over documents.

    None for fewer than two documents.
    """
    n, total = len(gains), sum(weights)
    if n < 2:
        return None
    ratio = sum(gains) / total
    squares = sum((g - ratio * w) ** 2 for g, w in zip(gains, weights, strict=True))
    return math.sqrt(n / (n - 1) * squares) / total
