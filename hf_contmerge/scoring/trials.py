"""Scores of many variants of one model in memory.

The model is loaded once, when the first variant is missing in the cache. A variant is named by what it is made of, so
that its scores are found again without making it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ResourceError
from hf_contmerge.models.filling import HeldTensor, Read, whole_tensors
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import Evaluate
from hf_contmerge.run.scores import Scores
from hf_contmerge.runtime.ranks import Ranks
from hf_contmerge.scoring.cache import ScoreCache, digest
from hf_contmerge.scoring.keys import ModelKey, ScoreRequest, model_key
from hf_contmerge.scoring.known import keep_scores, scores_of
from hf_contmerge.scoring.locate import ModelFolders
from hf_contmerge.scoring.score import load_to_score, own_listing, score_loaded


def check_in_memory(evaluate: Evaluate) -> None:
    """Raise ResourceError unless a loaded model's weights can be replaced."""
    asked = [f"backend: {evaluate.backend}"] * (evaluate.backend != "hf")
    asked += [f"parallel: {evaluate.parallel}"] * (evaluate.parallel == "tensor")
    if asked:
        raise ResourceError(
            f"`evaluate.{asked[0]}` does not let the weights of a loaded model be replaced, which is how many merges "
            "are measured. Use a run with `backend: hf` and `parallel: data` or `layers`."
        )


@dataclass
class Trials:
    """Variants of a base model, measured on the same tasks."""

    base: Path
    request: ScoreRequest
    ranks: Ranks
    cache: ScoreCache
    _loaded: tuple[Any, Any, Sequence[HeldTensor], Collection[str]] | None = field(default=None, init=False)
    _key: ModelKey | None = field(default=None, init=False)

    def score(self, made_of: Sequence[Any], read: Read) -> Scores:
        """Return a variant's scores, on all ranks.

        Args:
            made_of: JSON values that say what the variant is, beyond the base.
            read: stored name -> its values.
        """
        known = self.ranks.first(lambda: scores_of(self._named(made_of), self.request, self.cache))
        missing = known.missing(self.request.tasks)
        fresh: Scores = {}
        if missing:
            model, tokenizer = self._filled(read)
            request = replace(self.request, tasks=missing)
            scores = score_loaded(model, tokenizer, request, ranks=self.ranks)
            fresh = self.ranks.first(
                lambda: keep_scores(request, known, scores, self.cache, own_listing(known, self.cache))
            )
        scores = {**known.scores, **fresh}
        return {task.name: scores[task.name] for task in self.request.tasks}

    def _named(self, made_of: Sequence[Any]) -> ModelKey:
        base = self._base_key()
        return ModelKey(digest(["made of", base.sha256, *made_of]), base.dtype)

    def _base_key(self) -> ModelKey:
        if self._key is None:
            self._key = model_key(ModelFolders(self.base), self.request, self.cache.store)
        assert self._key  # None only with read=False
        return self._key

    def _filled(self, read: Read) -> tuple[Any, Any]:
        """Return the model with other weights, and its tokenizer."""
        if self._loaded is None:
            how, dtype = self.request, self.ranks.first(self._base_key).dtype
            model, tokenizer = load_to_score(
                ModelFolders(self.base), how.evaluate, dtype, trust_remote_code=how.trust_remote_code
            )
            base = Weights(self.base)
            self._loaded = (model, tokenizer, whole_tensors(model, base), set(base.floating()))
        model, tokenizer, tensors, names = self._loaded
        for each in tensors:
            each.fill(read, names)
        return model, tokenizer
