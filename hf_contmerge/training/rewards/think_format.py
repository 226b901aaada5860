"""Think format: the reasoning stands between <think> and </think>, by TRL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_contmerge.training.rewards import Answers, Reward


@dataclass
class ThinkFormat(Reward):
    """1 if the answer begins with one <think> ... </think>, else 0."""

    def score(self, answers: Answers) -> Sequence[float]:
        from trl.rewards.format_rewards import think_format_reward

        return think_format_reward([[{"content": text}] for text in answers.texts])
