"""Finds the cached scores of a model, and caches new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.scoring._formats import Listing
from hf_contmerge.scoring.cache import ScoreCache
from hf_contmerge.scoring.keys import ModelKey, ScoreRequest, model_key, score_keys
from hf_contmerge.scoring.locate import ModelFolders, local_folders


@dataclass(frozen=True)
class KnownScores:
    """Cached scores of a model, found before loading it."""

    model: ModelKey
    keys: Mapping[str, str | None]
    """Task -> key of its score; None if only loading the task can identify it."""
    scores: Mapping[str, TaskScore]
    """Task -> cached score."""

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        return [task for task in tasks if task.name not in self.scores]


def known_scores(
    model: ModelFolders, request: ScoreRequest, cache: ScoreCache, *, read: bool = True
) -> KnownScores | None:
    """Look a model's scores up in the cache.

    Args:
        model: its folders.
        request: tasks and settings.
        cache: earlier scores.
        read: allow hashing weights. If False and a hash is missing, return None.
    """
    key = model_key(model, request, cache.store, read=read)
    return key and scores_of(key, request, cache)


def scores_of(key: ModelKey, request: ScoreRequest, cache: ScoreCache) -> KnownScores:
    """Look the scores of an identified model up in the cache."""
    keys = score_keys(key, request, cache.store)
    cached = {name: cache.find(key) for name, key in keys.items() if key}
    return KnownScores(key, keys, {name: score for name, score in cached.items() if score})


def known_at_once(name: str, base: str | None, request: ScoreRequest, cache: ScoreCache) -> KnownScores | None:
    """Return a named model's scores if all are cached.

    Nothing is fetched, converted, hashed or measured; torch, transformers and lm-eval are not loaded. Raises as
    `local_folders`.
    """
    model = local_folders(name, base, cache.store)
    known = known_scores(model, request, cache, read=False) if model else None
    return known if known and not known.missing(request.tasks) else None


def keep_scores(
    request: ScoreRequest,
    known: KnownScores,
    scores: Mapping[str, TaskScore],
    cache: ScoreCache,
    own: Listing | None = None,
) -> dict[str, TaskScore]:
    """Cache new scores; return them with their keys in `details`.

    Keys are computed again, because measuring may have fetched a dataset. Tasks changed meanwhile get no key.

    Args:
        request: tasks and settings.
        known: the lookup before measuring.
        scores: new scores by task.
        cache: where to keep them.
        own: as in `score_keys`.
    """
    keys, marked = score_keys(known.model, request, cache.store, own), {}
    for name, score in scores.items():
        key = keys[name] if known.keys[name] in (None, keys[name]) else None
        marked[name] = replace(score, details={**score.details, "key": key})
        if key:
            cache.keep(key, marked[name])
    return marked
