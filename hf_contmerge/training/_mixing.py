"""The examples of a training: the stage's own, and mixed-in ones."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_contmerge.train_strategies import SOURCE, Combined, StageTools
from hf_contmerge.train_strategies.replay import from_source, without_source
from hf_contmerge.training._forms import rows_of
from hf_contmerge.training._sources import LOSS
from hf_contmerge.training.data import StageData
from hf_contmerge.training.job import TrainJob, rows_sha256
from hf_contmerge.training.settings import config_of, sft_settings
from hf_contmerge.training.tokenizer import count_tokens, stage_tokenizer


def mixed(job: TrainJob, strategies: Combined) -> Any:
    """Begin a stage; return its examples, with any sources."""
    data = job.data
    if not strategies.overriding("mix"):
        strategies.begin(job.stage, job.base)
        return _named(data) if len(data.sources) > 1 else data.train
    strategies.begin(job.stage, job.base, _tools(job, strategies))
    return strategies.mix(_named(data), job.memory, seed=job.seed)


def _named(data: StageData) -> Any:
    return from_source(data.train, data.named_sources())


def _tools(job: TrainJob, strategies: Combined) -> StageTools:
    """Return what the strategies of a job may use."""
    general, written = job.data.general, job.written
    load = functools.cache(
        functools.partial(stage_tokenizer, job.base, job.train, trust_remote_code=job.trust_remote_code)
    )
    return StageTools(
        general=_named(general) if general else None,
        written=_named(written) if written else None,
        batch=_batch(job, strategies, load()) if strategies.keeping_order() else 0,
        count_tokens=lambda rows: [sum(count_tokens(load(), row)) for row in rows_of(without_source(rows))],
    )


def _batch(job: TrainJob, strategies: Combined, tokenizer: Any) -> int:
    """Return the examples of an optimizer step; 0 where packing cuts them."""
    settings = sft_settings(job.train, job.data, tokenizer, numel=0, strategies=strategies)
    config = config_of(job.data.form, {**settings, "output_dir": "unused"}, "train")
    if getattr(config, "packing", False):
        return 0
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size


def source_names(examples: Any) -> list[str]:
    """Return the names of the examples' sources, in order."""
    return sorted(set(examples[SOURCE])) if SOURCE in examples.column_names else []


def mixed_record(data: StageData, examples: Any, log: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return counts of general data, and sources' examples and losses."""
    record: dict[str, Any] = {}
    if general := data.general:
        record["general_sources"] = general.source_records()
        record["general_sha256"] = rows_sha256(general.train)
    if len(names := source_names(examples)) > 1:
        counts = Counter(examples[SOURCE])
        losses = {name: [point[LOSS + name] for point in log if LOSS + name in point] for name in names}
        record["mixed"] = [
            {
                "source": name,
                "examples": counts[name],
                "first_loss": _at(losses[name], 0),
                "loss": _at(losses[name], -1),
            }
            for name in names
        ]
    return record


def _at(losses: Sequence[float], place: int) -> float | None:
    return losses[place] if losses else None
