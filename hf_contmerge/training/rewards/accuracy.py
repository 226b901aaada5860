"""Accuracy: the answer's mathematics equals a column's, by TRL and math-verify."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from hf_contmerge.training.rewards import Answers, Reward


@dataclass
class Accuracy(Reward):
    r"""1 if the answer's formula (\boxed{...}) equals the column's, else 0."""

    column: str = "solution"

    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def require(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "accuracy needs math-verify: `pip install 'hf_contmerge[math]'`, or use last_number or exact_match"
            )

    def score(self, answers: Answers) -> Sequence[float | None]:
        from trl.rewards.accuracy_rewards import accuracy_reward

        texts = [[{"content": text}] for text in answers.texts]
        return accuracy_reward(texts, list(answers.columns[self.column]))
