"""Mixes of datasets by shares, with each row's source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import datasets
import numpy as np
import pyarrow

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.parts import DataSource
from hf_contmerge.runtime.shares import split_by_shares
from hf_contmerge.train_strategies.replay import widest, with_features
from hf_contmerge.training._forms import Form

_ROUNDING = 1e-9
"""Of 0.7 * 10, say, which must count as 7."""


@dataclass(frozen=True)
class Portion:
    """The training and held-out examples of one dataset."""

    source: DataSource
    share: float
    form: Form
    train: datasets.Dataset
    heldout: datasets.Dataset
    left_out: Counter[str]
    """Why rows of the split are neither -> how many."""

    def keeping(self, train: datasets.Dataset, why: str) -> Portion:
        """Return the portion with these training examples. `why`: reason for others."""
        dropped = Counter({why: len(self.train) - len(train)})
        return replace(self, train=train, left_out=self.left_out + dropped)

    def first(self, count: int, why: str) -> Portion:
        """Return the portion with its first examples. `why`: reason for others."""
        return self.keeping(self.train.select(range(min(count, len(self.train)))), why)


def in_proportion(portions: Sequence[Portion], *, at_most: int | None) -> list[Portion]:
    """Return portions in the ratio of their shares, as large as possible.

    Raises DataError for a share that comes to no example.
    """
    shares = [portion.share for portion in portions]
    size = min(math.floor(len(portion.train) / portion.share + _ROUNDING) for portion in portions)
    size = min(size, at_most or size)
    counts = split_by_shares(size, shares)
    for portion, count in zip(portions, counts, strict=True):
        if not count:
            raise DataError(
                f"A mix of {size} examples has none of {portion.source.path}, whose share is {portion.share:g}. Raise "
                "`max_examples` or the share, or give more examples."
            )
    return [
        portion.first(count, "are more than the mix takes") for portion, count in zip(portions, counts, strict=True)
    ]


def alike(portions: Sequence[Portion]) -> list[Portion]:
    """Return portions with equal columns. Raises DataError for other forms."""
    first = portions[0]
    for other in portions[1:]:
        if other.form != first.form:
            raise DataError(
                f"The datasets of a mix must have one form: {first.source.path} has {first.form} and "
                f"{other.source.path} has {other.form}. Name a column or a format with `text`, or leave one out."
            )
    features = widest([portion.train for portion in portions])
    return [
        portion if portion.train.features == features else _cast(portion, features, portions) for portion in portions
    ]


def _cast(portion: Portion, features: datasets.Features, portions: Sequence[Portion]) -> Portion:
    try:
        train, heldout = (with_features(rows, features) for rows in (portion.train, portion.heldout))
    except (ValueError, TypeError, pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        other = next(other for other in portions if other.train.features != portion.train.features)
        raise DataError(
            f"The datasets of a mix must have columns of one type: {portion.source.path} cannot be read like "
            f"{other.source.path} ({error}). Convert one of them, or leave it out."
        ) from error
    return replace(portion, train=train, heldout=heldout)


def joined(
    parts: Sequence[datasets.Dataset], *, seed: int, sources: Sequence[Sequence[int]] = ()
) -> tuple[datasets.Dataset, tuple[int, ...]]:
    """Return all rows shuffled in one dataset, with their sources.

    `sources`: of each part's rows; default: the part's number.
    """
    sources = sources or [(number,) * len(part) for number, part in enumerate(parts)]
    if len(parts) == 1:  # shuffled already
        return parts[0], tuple(sources[0])
    rows = datasets.concatenate_datasets(list(parts))
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(order, keep_in_memory=True), tuple(np.array([*chain(*sources)], dtype=int)[order].tolist())
