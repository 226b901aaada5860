"""Replay: train on earlier and general examples among new ones.

Experience replay, Rolnick et al., NeurIPS 2019, arXiv 1811.11682. A fixed random number of each example says which are
remembered, so that the sample never depends on how it was drawn. General data among the new: Roth et al., "A
Practitioner's Guide to Continual Multimodal Pretraining", NeurIPS 2024, arXiv 2408.14471. Shares within each batch:
ConPET's static form, Song et al., arXiv 2309.14763. Documents that the model writes itself: LAMOL, Sun et al., ICLR
2020, arXiv 1909.03329, and SSR, Huang et al., ACL 2024, arXiv 2403.01244.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import pyarrow
from datasets.table import InMemoryTable
from pyarrow import parquet
from pydantic import BeforeValidator, Field, ValidationError
from torch import nn

from hf_contmerge.errors import DataError
from hf_contmerge.models.loading import load_tokenizer, runs_own_code
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.text import explain
from hf_contmerge.runtime.shares import evenly, in_blocks, split_by_shares
from hf_contmerge.train_strategies import SOURCE, StageSize, Synthesis, TrainStrategy
from hf_contmerge.train_strategies._ranks import is_main

LOG = logging.getLogger(__name__)

REPLAYED = "replay"
"""The source of earlier stages' examples."""
_KEY, _SIZE = "replay_key", "replay_size"
_EXAMPLES = 1000
_GENERAL_SHARE = 0.1
_BYTES_PER_TOKEN = 4


def _as_general(value: Any) -> Any:
    """Return general data as a dataset without held-out rows. Raises ValueError."""
    if value is None or isinstance(value, Dataset):
        return value
    fields = {"path": value} if isinstance(value, str) else value
    if not isinstance(fields, dict):
        raise ValueError(f"must be a path or a dataset's fields; got {value!r:.60}")
    try:
        dataset = Dataset.model_validate({"heldout": 0, **fields})
    except ValidationError as error:
        raise ValueError(explain(error, "", Dataset).removeprefix(": ")) from None
    if dataset.holds_out:
        raise ValueError("nothing of general data is held out; remove `heldout` and `heldout_split`")
    return dataset


@dataclass
class Replay(TrainStrategy):
    """Mixes old and general examples in: n = share / (1 - share - general_share) * n_new, and so for general ones.

    The memory holds `examples` in all (1000, if nothing is said), or as many as have `tokens` in all. The stages so far
    share it equally: each keeps the examples with its lowest keys, and fewer with every stage. Held-out examples are
    none of a stage's own. Earlier datasets are not read again and may be gone. General examples need no memory, and are
    mixed in from the first stage on; so are documents that the stage's start model writes, in the place of a memory.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    examples: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    general: Annotated[Dataset | None, BeforeValidator(_as_general)] = None
    """General data, with the fields of a stage's dataset; nothing of it is held out."""
    general_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the examples trained on; 0.1 if there is general data."""
    share_of: Literal["examples", "tokens"] = "examples"
    """What the shares count: examples, or their tokens up to `max_length`, prompts included."""
    synthesise: Annotated[int, Field(ge=1)] | None = None
    """Documents that the stage's start model writes, of which `share` is drawn; no memory is kept then."""
    synthesise_tokens: Annotated[int, Field(ge=8)] = 256
    """The most tokens of a written document, or of a turn of a conversation."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the sampling of `synthesise`."""
    within_batch: bool = False
    """Give every batch the shares, to one example. Each epoch then has the same order."""

    def __post_init__(self) -> None:
        if self.examples and self.tokens:
            raise ValueError("replay has both `examples` and `tokens`; give the memory one size, and remove the other")
        if self.synthesise and (self.examples or self.tokens or not self.share):
            word = "examples" if self.examples else "tokens" if self.tokens else "share: 0"
            raise ValueError(f"replay with `synthesise` keeps no memory and draws `share`; remove `{word}`")
        if self.general_share is not None and not self.general:
            raise ValueError("replay has `general_share` without `general`; name the dataset, or remove the share")
        if self.share + self._general_share() >= 1:
            raise ValueError(
                f"replay's share and general_share leave nothing for the new examples: {self.share:g} + "
                f"{self._general_share():g} must be less than 1"
            )

    def _general_share(self) -> float:
        default = _GENERAL_SHARE if self.general else 0.0
        return default if self.general_share is None else self.general_share

    def general_data(self) -> Dataset | None:
        return self.general if self._general_share() else None

    def synthesis(self) -> Synthesis | None:
        return Synthesis(self.synthesise, self.synthesise_tokens, self.temperature) if self.synthesise else None

    def added_share(self, *, past: bool) -> float:
        return self._general_share() + (self.share if past or self.synthesise else 0.0)

    def keeps_order(self) -> bool:
        return self.within_batch

    def mix(self, fresh: Any, memory: Path | None, *, seed: int) -> Any:
        added = self._added(fresh, memory, seed)
        if not added:
            return fresh
        parts = _alike([fresh, *(pool for _, pool in added)])
        counts = self._counts(parts[0], [share for share, _ in added])
        drawn = [_drawn(pool, count, self._sizes(pool)) for pool, count in zip(parts[1:], counts, strict=True)]
        mixed = datasets.concatenate_datasets([parts[0], *drawn])
        if not self.within_batch:
            return mixed.shuffle(seed=seed, keep_in_memory=True)
        return mixed.select(self._order([parts[0], *drawn]), keep_in_memory=True)

    def _added(self, fresh: Any, memory: Path | None, seed: int) -> list[tuple[float, datasets.Dataset]]:
        """Return shares and examples, in the new ones' form."""
        plain = without_source(fresh)
        pools = []
        if self.synthesise:
            pools.append((self.share, self.tools.written.shuffle(seed=seed + self.stage, keep_in_memory=True)))
        elif memory and self.share:
            olds = [in_form_of(plain, old.remove_columns([_KEY, _SIZE]), path) for path, old in _remembered(memory)]
            old = datasets.concatenate_datasets(_alike([plain, *olds])[1:]).shuffle(seed=seed, keep_in_memory=True)
            pools.append((self.share, from_source(old, [REPLAYED] * len(old))))
        if self.general_data():
            general = self.tools.general.shuffle(seed=seed + self.stage, keep_in_memory=True)
            pools.append((self._general_share(), general))
        return pools

    def _counts(self, fresh: datasets.Dataset, shares: Sequence[float]) -> list[int]:
        """Return how many examples (or tokens) to draw from each pool."""
        total = sum(shares)
        count = round(sum(self._sizes(fresh)) * total / (1 - total))
        return split_by_shares(count, [share / total for share in shares])

    def _sizes(self, rows: datasets.Dataset) -> list[int]:
        return self.tools.count_tokens(rows) if self.share_of == "tokens" else [1] * len(rows)

    def _order(self, parts: Sequence[datasets.Dataset]) -> list[int]:
        """Return the places of joined parts, at even shares throughout."""
        if self.tools.batch and self.share_of == "examples":
            order = list(in_blocks([len(part) for part in parts], self.tools.batch))
        else:
            order = evenly([self.tools.count_tokens(part) for part in parts])
        starts = accumulate((len(part) for part in parts[:-1]), initial=0)
        places = [iter(range(start, start + len(part))) for start, part in zip(starts, parts, strict=True)]
        return [next(places[part]) for part in order]

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        if self.synthesise or not is_main():
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
        if self.synthesise:
            return 0
        if self.tokens:
            return _BYTES_PER_TOKEN * self.tokens
        return round(stage.example_bytes * min(self.examples or _EXAMPLES, stage.examples * stage.number))


def _drawn(pool: datasets.Dataset, count: int, sizes: Sequence[int]) -> datasets.Dataset:
    """Return the first examples up to a count, repeated if too few."""
    chosen: list[int] = []
    total = 0
    while total < count:
        i = len(chosen) % len(pool)
        if total + sizes[i] - count > count - total:  # without it, the number is nearer
            break
        chosen.append(i)
        total += sizes[i]
    if len(chosen) > len(pool):
        LOG.info("replay draws %d examples out of %d, so that some come again", len(chosen), len(pool))
    return pool.select(chosen)


def from_source(rows: datasets.Dataset, names: Sequence[str]) -> datasets.Dataset:
    """Return rows with the name of each one's source."""
    return rows.add_column(SOURCE, list(names))  # pyright: ignore


def without_source(rows: datasets.Dataset) -> datasets.Dataset:
    """Return rows as training sees them."""
    return rows.remove_columns(SOURCE) if SOURCE in rows.column_names else rows


def _alike(parts: Sequence[datasets.Dataset]) -> list[datasets.Dataset]:
    """Return parts with equal columns; sources only where the first has them."""
    named = SOURCE in parts[0].column_names
    parts = [part if named else without_source(part) for part in parts]
    features = widest(parts)
    return [with_features(rows, features) for rows in parts]


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
            f"replay cannot mix the examples of {where} ({_form(old)}) with new ones ({_form(fresh)}). Give all of "
            "them one form (text, messages, or prompt and completion), or leave replay out."
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
