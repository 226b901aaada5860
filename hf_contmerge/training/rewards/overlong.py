"""Overlong: a penalty for long answers, by TRL.

DAPO, equation 13 (Yu et al., arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hf_contmerge.training.rewards import Answers, Reward


@dataclass
class Overlong(Reward):
    """0 up to `most - margin` tokens, linear to -1 at `most`."""

    most: Annotated[int, Field(ge=1)] = 256
    margin: Annotated[int, Field(ge=0)] = 64

    def __post_init__(self) -> None:
        if self.margin > self.most:
            raise ValueError(f"overlong's margin {self.margin} is larger than `most`, {self.most}")

    def score(self, answers: Answers) -> Sequence[float]:
        from trl.rewards.other_rewards import get_soft_overlong_punishment

        return get_soft_overlong_punishment(self.most, self.margin)(completion_ids=answers.tokens)
