"""Results of each document as a dataset: digests and numbers, no texts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from hf_contmerge.report._repository import MAIN, Revision
from hf_contmerge.report._templates import fill
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.run.scores import load_scores

_COLUMNS = ("stage", "stage_name", "model", "task", "metric", "document", "gain", "weight")


def documents_of(run: Run, entry: Merge, last: int, repo_id: str) -> Revision:
    """Return the results up to a stage as a dataset.

    Texts and answers stay here: they may quote data that is not public.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows = [dict(zip(_COLUMNS, row, strict=True)) for row in _rows(run, entry, last)]
    kinds = {"stage": pa.int32(), "gain": pa.float64(), "weight": pa.float64()}
    schema = pa.schema([pa.field(name, kinds.get(name, pa.string())) for name in _COLUMNS])
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    card = fill("documents.md", repo_id=f"{repo_id}-results", model=repo_id, count=len(rows), tasks=tasks)
    files = {"README.md": card.encode(), "data/results.parquet": file.getvalue()}
    return Revision(MAIN, f"{run.recipe.name}: results of {len(rows)} documents", files)


def _rows(run: Run, entry: Merge, last: int) -> Iterator[tuple[Any, ...]]:
    for t, model, place in _places(run, entry, last):
        for task, score in load_scores(place).items():
            digests = score.documents or (None,) * len(score.gains)
            name = run.stage(t).name if t else "base"
            for document, gain, weight in zip(digests, score.gains, score.weights, strict=True):
                yield t, name, model, task, score.metric, document, gain, weight


def _places(run: Run, entry: Merge, last: int) -> Iterator[tuple[int, str, Place]]:
    """Yield (stage, model, place) of base, experts and merges."""
    yield 0, "base", run.base
    for t in range(1, last + 1):
        for kind in dict.fromkeys("base" if t == 1 else kind for kind in run.expert_kinds()):
            yield t, f"expert-{kind}", run.expert(t, kind)
        yield t, f"merge-{entry.name}", run.merged(t, entry)
