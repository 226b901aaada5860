"""The examples of a training: the stage's own, and mixed-in ones."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_contmerge.train_strategies import SOURCE, Combined, StageTools
from hf_contmerge.train_strategies.replay import REPLAYED, from_source, without_source
from hf_contmerge.training._forms import rows_of
from hf_contmerge.training._sources import LOSS
from hf_contmerge.training.data import StageData, name_sources
from hf_contmerge.training.job import TrainJob, rows_sha256
from hf_contmerge.training.settings import config_of, sft_settings
from hf_contmerge.training.tokenizer import count_tokens, stage_tokenizer


def mixed(job: TrainJob, strategies: Combined) -> Any:
    """Begin a stage; return its examples, with any sources."""
    data = job.data
    own, *others = _named(data, data.general, job.written)
    if not strategies.overriding("mix"):
        strategies.begin(job.stage, job.base)
        return own if len(data.sources) > 1 else data.train
    strategies.begin(job.stage, job.base, _tools(job, strategies, *others))
    return strategies.mix(own, job.memory, seed=job.seed)


def _named(*parts: StageData | None) -> list[Any]:
    """Return each part's examples with the names of their sources."""
    named = zip(parts, name_sources(*parts, taken=REPLAYED), strict=True)
    return [part and from_source(part.train, [names[place] for place in part.train_sources]) for part, names in named]


def _tools(job: TrainJob, strategies: Combined, general: Any, written: Any) -> StageTools:
    """Return what the strategies of a job may use."""
    load = functools.cache(
        functools.partial(stage_tokenizer, job.base, job.train, trust_remote_code=job.trust_remote_code)
    )
    config = functools.cache(lambda: _config(job, strategies, load()))

    def sizes(rows: Any) -> list[int]:
        longest = _longest(config())
        return [sum(min(n, longest) for n in count_tokens(load(), row)) for row in rows_of(without_source(rows))]

    batch = _batch(config()) if strategies.keeping_order() else 0
    return StageTools(general=general, written=written, batch=batch, count_tokens=sizes)


def _config(job: TrainJob, strategies: Combined, tokenizer: Any) -> Any:
    settings = sft_settings(job.train, job.data, tokenizer, numel=0, strategies=strategies)
    return config_of(job.data.form, {**settings, "output_dir": "unused"}, "train")


def _batch(config: Any) -> int:
    """Return the examples of an optimizer step; 0 where packing cuts them."""
    if getattr(config, "packing", False):
        return 0
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size


def _longest(config: Any) -> int:
    """Return how many tokens of an example are trained on.

    Packing may cut it into several pieces.
    """
    cut_up = getattr(config, "packing", False) and config.packing_strategy in ("wrapped", "bfd_split")
    return sys.maxsize if cut_up else getattr(config, "max_length", None) or sys.maxsize


def source_names(examples: Any) -> list[str]:
    """Return the names of the examples' sources, in order."""
    return sorted(set(examples[SOURCE])) if SOURCE in examples.column_names else []


def mixed_record(job: TrainJob, examples: Any, log: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the sources of all data, with counts and losses."""
    data, general = job.data, job.data.general
    own, others, _ = name_sources(data, general, job.written, taken=REPLAYED)
    record: dict[str, Any] = {"sources": data.source_records(own)}
    if general:
        record["general_sources"] = general.source_records(others)
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
