"""Scores models with lm-eval and measures forgetting per document."""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.scoring.forgetting.matrix import ScoreMatrix as ScoreMatrix
    from hf_contmerge.scoring.score import score_model as score_model

attach(__name__, {"ScoreMatrix": "forgetting.matrix", "score_model": "score"})
