"""General data, in the stage's form, without held-out documents."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.train_strategies.replay import in_form_of
from hf_contmerge.training._forms import Limits
from hf_contmerge.training.data import TWINS, StageData, load_stage_data, not_held_out
from hf_contmerge.training.settings import make_strategies

LOG = logging.getLogger(__name__)


def with_general(
    data: StageData, train: Train, others: Iterable[StageData], *, seed: int, limits: Limits | None = None
) -> StageData:
    """Return a stage's data with its strategies' general data.

    Args:
        data: of the stage.
        train: its settings.
        others: all stages; none of their held-out documents is in the general data.
        seed: of the order.
        limits: of the stage's trainer.

    Raises:
        DataError: the general data is missing, or cannot be mixed with the stage's examples.
    """
    spec = make_strategies(train).general_data()
    if spec is None or not len(data.train):
        return data
    general = in_form(load_stage_data(spec, seed=seed, limits=limits), data, _paths(spec))
    general = without_heldouts(general, (data, *others))
    if not len(general.train):
        raise DataError(f"{_paths(spec)}: all general examples are held-out ones of the stages. Name other data.")
    return replace(data, general=general)


def in_form(added: StageData, data: StageData, where: str) -> StageData:
    """Return added examples in a stage's form. Raises DataError if impossible."""
    return replace(added, form=data.form, train=in_form_of(data.train.select([0]), added.train, where))


def without_heldouts(added: StageData, stages: Iterable[StageData]) -> StageData:
    """Drop the added examples that stages hold out; count them by source."""
    for stage in stages:
        if len(stage.heldout) and len(added.train):
            added = _without(added, stage)
    return added


def _without(general: StageData, stage: StageData) -> StageData:
    """Drop general examples held out by a stage; count by source."""
    keep = not_held_out(general.train, general.form, stage.heldout, stage.form)
    if len(keep) == len(general.train):
        return general
    kept = tuple(general.train_sources[i] for i in keep)
    dropped = Counter(general.train_sources) - Counter(kept)
    sources = [
        replace(s, train=s.train - dropped[i], left_out=_with(s.left_out, dropped[i]))
        for i, s in enumerate(general.sources)
    ]
    for i in dropped:
        LOG.info("%s: %d examples to mix in are left out, for they %s", sources[i].path, dropped[i], TWINS)
    return replace(general, train=general.train.select(keep), train_sources=kept, sources=tuple(sources))


def _with(left_out: Mapping[str, int], twins: int) -> dict[str, int]:
    return {**left_out, TWINS: left_out.get(TWINS, 0) + twins} if twins else dict(left_out)


def _paths(spec: Dataset) -> str:
    return " + ".join(source.path for source in spec.sources())
