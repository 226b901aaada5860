"""Predicts and measures a stage's expert before its merge (`evaluate.relevance`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from hf_contmerge.merging.merge import RunningMerge
from hf_contmerge.merging.mixing import MergedWeights
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.layout import check_loads
from hf_contmerge.models.loading import load_model
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import StatisticsSettings
from hf_contmerge.runtime.device import cpu_only, free_memory
from hf_contmerge.scoring.relevance import Direction, Ranking, Text, readable
from hf_contmerge.training.data import StageData
from hf_contmerge.training.statistics import Measured, tokenized

if TYPE_CHECKING:
    from hf_contmerge.loop._job import MergeJob

MAX_LENGTH = 256
"""Tokens at which a document is cut."""
STEP = 0.25
"""Share of the expert's task vector, to measure."""


@dataclass(frozen=True)
class Reader:
    """Tokenizes documents for a model."""

    base: Path
    documents: int
    max_length: int = MAX_LENGTH
    trusted: bool = False
    """Whether the model's own code may run."""

    def text(self, name: str, data: StageData) -> Text:
        """Return the first training examples, never held-out ones.

        Raises:
            DataError: no document has two tokens.
        """
        settings = StatisticsSettings(examples=self.documents, max_length=self.max_length)
        rows = data.train.select(range(min(self.documents, len(data.train))))
        return readable(name, tokenized(Measured(self.base, self.base, data, settings, self.trusted), rows))


def open_ranking(merge: RunningMerge, *, trusted: bool) -> Ranking:
    """Load a merged model in float32."""
    check_loads(merge.base, trusted=trusted)
    model = load_model(merge.base, merge.base, dtype=torch.float32, trust_remote_code=trusted)
    return Ranking(model.to(PartialState(cpu=cpu_only()).device), MergedWeights.of(merge))


def effects_at(job: MergeJob) -> dict[str, Any]:
    """Return the effects of the stage's expert on the merge before it.

    The texts are training examples of the stages so far. The first stage has nothing to hurt.
    """
    documents, run = job.run.recipe.evaluate.relevance, job.run
    known = {run.stage(t).name: job.prepared.data.get(run.stage(t).name) for t in range(1, job.t + 1)}
    if not documents or job.t == 1 or not any(known.values()):
        return {}
    base, reader = job.prepared.base, Reader(job.prepared.base, documents, trusted=run.recipe.trust_remote_code)
    texts = [reader.text(name, data) for name, data in known.items() if data]
    start = run.start_of(job.t, job.kind)
    weights = Weights(base)
    direction = Direction(
        run.stage(job.t).name,
        open_expert(job.newest().folder, weights, force=True),
        weights,
        open_expert(start, weights, force=True) if start else None,
    )
    (found,) = open_ranking(job.previous(), trusted=reader.trusted).effects([direction], texts, STEP)
    free_memory()
    return {"step": STEP, "documents": documents, "texts": {name: effect.to_json() for name, effect in found.items()}}
