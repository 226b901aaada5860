"""Replay: train on some examples of earlier stages among the new ones.

Experience replay, Rolnick et al., NeurIPS 2019, arXiv 1811.11682. A fixed random number of each example says which are
remembered, so that the sample never depends on how it was drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import datasets
import pyarrow
from datasets.table import InMemoryTable
from pyarrow import parquet
from pydantic import Field
from torch import nn

from hf_contmerge.errors import DataError
from hf_contmerge.models.loading import load_tokenizer, runs_own_code
from hf_contmerge.train_strategies import StageSize, TrainStrategy
from hf_contmerge.train_strategies._ranks import is_main

_KEY, _SIZE = "replay_key", "replay_size"
_EXAMPLES = 1000
_BYTES_PER_TOKEN = 4


@dataclass
class Replay(TrainStrategy):
    """Mixes old examples in: n_old = share / (1 - share) * n_new.

    The memory holds `examples` in all (1000, if nothing is said), or as many as have `tokens` in all. The stages so far
    share it equally: each keeps the examples with its lowest keys, and fewer with every stage. Held-out examples are
    none of a stage's own. Earlier datasets are not read again and may be gone.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    examples: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.examples and self.tokens:
            raise ValueError("replay has both `examples` and `tokens`; give the memory one size, and remove the other")

    def mix(self, fresh: Any, memory: Path | None, *, seed: int) -> Any:
        if not memory or not self.share:
            return fresh
        olds = [in_form_of(fresh, old.remove_columns([_KEY, _SIZE]), path) for path, old in _remembered(memory)]
        features = widest([fresh, *olds])
        fresh, *olds = (with_features(rows, features) for rows in (fresh, *olds))
        old = datasets.concatenate_datasets(olds).shuffle(seed=seed, keep_in_memory=True)
        count = round(len(fresh) * self.share / (1 - self.share))
        drawn = old.select([i % len(old) for i in range(count)])
        return datasets.concatenate_datasets([fresh, drawn]).shuffle(seed=seed, keep_in_memory=True)

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        if not is_main():
            return
        olds = list(_remembered(memory)) if memory else []
        budget = (self.tokens or self.examples or _EXAMPLES) // (len(olds) + 1)
        keys = [_key(row) for row in data]
        order = sorted(range(len(keys)), key=lambda i: keys[i])
        order = order[:budget]  # each example has a token at least
        own = datasets.Dataset.from_dict(data[order], features=data.features)
        sizes = _token_counts(own, model) if self.tokens else [1] * len(own)
        own = own.add_column(_KEY, [keys[i] for i in order]).add_column(_SIZE, sizes)
        for number, (_, rows) in enumerate([*olds, (out, own)]):
            kept = sum(total <= budget for total in accumulate(rows[_SIZE]))
            if kept:
                rows.select(range(kept)).to_parquet(out / f"{number:03d}.parquet")

    def memory_bytes(self, stage: StageSize) -> int:
        if self.tokens:
            return _BYTES_PER_TOKEN * self.tokens
        return round(stage.example_bytes * min(self.examples or _EXAMPLES, stage.examples * stage.number))


def in_form_of(fresh: datasets.Dataset, old: datasets.Dataset, where: object) -> datasets.Dataset:
    """Return old examples in the columns of fresh ones.

    Raises DataError where one cannot be made of the other: conversations and plain text.
    """
    mine, theirs = set(fresh.column_names), set(old.column_names)
    if mine == {"text"} and theirs == {"prompt", "completion"} and isinstance(old[0]["prompt"], str):
        old = old.map(lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=old.column_names)
    elif mine == {"prompt", "completion"} and theirs == {"text"} and isinstance(fresh[0]["prompt"], str):
        old = old.map(lambda row: {"prompt": "", "completion": row["text"]}, remove_columns=["text"])
    try:
        return with_features(old, widest([fresh, old]))
    except (ValueError, TypeError, pyarrow.ArrowInvalid) as error:
        raise DataError(
            f"replay cannot mix the examples of {where} ({_form(old)}) with new ones ({_form(fresh)}). Give all stages "
            "one form (text, messages, or prompt and completion), or leave replay out."
        ) from error


def widest(parts: Sequence[datasets.Dataset]) -> datasets.Features:
    """Return features for all parts: turns with any fields, some tools."""
    features = datasets.Features(parts[0].features)
    for name, feature in (column for rows in parts[1:] for column in rows.features.items()):
        if name == "tools" or (name in features and "Json(" in str(feature)):
            features[name] = feature
    return features


def with_features(rows: datasets.Dataset, features: datasets.Features) -> datasets.Dataset:
    """Return rows in memory with these columns. Raises ValueError for losses."""
    if lost := set(rows.column_names) - set(features):
        raise ValueError(f"the column {min(lost)} would be lost")
    if "tools" in features and "tools" not in rows.column_names:
        rows = rows.add_column("tools", [None] * len(rows))  # pyright: ignore
    return rows.select_columns(list(features)).cast(features, keep_in_memory=True)


def _form(data: datasets.Dataset) -> str:
    return ", ".join(f"{name}: {type(data[0][name]).__name__}" for name in data.column_names)


def _remembered(memory: Path) -> list[tuple[Path, datasets.Dataset]]:
    """Return each stage's file and examples, lowest keys first."""
    tables = ((path, parquet.read_table(path)) for path in sorted(memory.glob("*.parquet")))
    return [(path, datasets.Dataset(InMemoryTable(table))) for path, table in tables]


def _key(row: Any) -> str:
    """Return an example's random number, a function of its words."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()


def _token_counts(data: datasets.Dataset, model: Any) -> list[int]:
    """Return each example's tokens, without the chat template's."""
    tokenizer = load_tokenizer(model.name_or_path, trust_remote_code=runs_own_code(model))
    return [max(1, sum(len(tokenizer(text)["input_ids"]) for text in _texts(row))) for row in data]


def _texts(value: Any) -> list[str]:
    """Return all strings in an example."""
    if isinstance(value, str):
        return [value]
    items = [item for key, item in value.items() if key not in (_KEY, "role")] if isinstance(value, dict) else value
    return [text for item in items for text in _texts(item)] if isinstance(items, list) else []
