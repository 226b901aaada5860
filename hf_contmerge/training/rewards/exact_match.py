"""Exact match: the answer is the text of a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_contmerge.training.rewards import Answers, Reward


@dataclass
class ExactMatch(Reward):
    """1 if the answer, stripped, is the column's text, else 0."""

    column: str = "answer"
    ignore_case: bool = False

    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, answers: Answers) -> Sequence[float]:
        pairs = zip(answers.texts, answers.columns[self.column], strict=True)
        return [float(self._plain(text) == self._plain(right)) for text, right in pairs]

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()
