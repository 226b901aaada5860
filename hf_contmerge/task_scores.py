"""What was measured of one model: a score for each task, with what each document added to it.

Utilities are higher-is-better: an accuracy as it is, a perplexity as -ln(perplexity) (nats).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_contmerge.places import Place

Block = Literal["accuracy", "perplexity"]
BLOCKS: tuple[Block, ...] = ("accuracy", "perplexity")


@dataclass(frozen=True)
class Sample:
    """A task's per-document results: utility = sum(gains) / sum(weights).

    Accuracy: gain 0 or 1, weight 1. Perplexity per word: gain the document's log-likelihood (nats), weight its words.
    """

    gains: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def utility(self) -> float:
        return sum(self.gains) / sum(self.weights)

    def stderr(self) -> float | None:
        """Return the standard error of the utility over documents (ratio estimator); None for one document."""
        return ratio_stderr(self.gains, self.weights)


@dataclass(frozen=True)
class TaskScore:
    """One task's score for one model, as a score record keeps it."""

    block: Block
    metric: str
    value: float
    """The metric as lm-eval reports it: an accuracy, or a perplexity per word."""
    utility: float
    stderr: float | None
    """Of the utility."""
    gains: tuple[float, ...]
    weights: tuple[float, ...]
    details: Mapping[str, Any]
    """The task's other metrics, its version and the digest of its documents."""
    documents: tuple[str, ...] = ()
    """Digest of each document, in the order of `gains`; () where it was not kept."""
    texts: tuple[str, ...] = ()
    """The beginning of each document (a question, a text), to show it; () where it was not kept."""
    answers: tuple[str, ...] = ()
    """What the model chose or wrote for each document; () for a perplexity."""

    @property
    def sample(self) -> Sample:
        return Sample(self.gains, self.weights)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskScore:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


Scores = Mapping[str, TaskScore]
"""Task name -> score of one model."""


def load_scores(place: Place) -> Scores:
    """Return what has been measured of the model at a place; nothing, if nothing has."""
    if not place.is_done("score"):
        return {}
    return {name: TaskScore.from_json(task) for name, task in place.record("score")["tasks"].items()}


def ratio_stderr(gains: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return the standard error of sum(gains) / sum(weights) over documents; None for fewer than two."""
    n, total = len(gains), sum(weights)
    if n < 2:
        return None
    ratio = sum(gains) / total
    squares = sum((g - ratio * w) ** 2 for g, w in zip(gains, weights, strict=True))
    return math.sqrt(n / (n - 1) * squares) / total
