"""Repetition: a penalty for repeated n-grams, by TRL.

Yeo et al., arXiv 2502.03373, appendix C.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hf_contmerge.training.rewards import Answers, Reward


@dataclass
class Repetition(Reward):
    """penalty * (1 - distinct n-grams / n-grams), of an answer's tokens."""

    n: Annotated[int, Field(ge=1)] = 3
    penalty: Annotated[float, Field(le=0)] = -1.0

    def score(self, answers: Answers) -> Sequence[float]:
        from trl.rewards.other_rewards import get_repetition_penalty_reward

        return get_repetition_penalty_reward(self.n, self.penalty)(completion_ids=answers.tokens)
