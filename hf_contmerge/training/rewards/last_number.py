"""Last number: the answer's last number equals a column's, as in GSM8K."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hf_contmerge.training.rewards import Answers, Reward

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass
class LastNumber(Reward):
    """1 if the last numbers of answer and column agree, else 0.

    Commas between thousands do not count. None where the column has no number.
    """

    column: str = "answer"

    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, answers: Answers) -> Sequence[float | None]:
        return [
            None if (right := _last(expected)) is None else float(_last(text) == right)
            for text, expected in zip(answers.texts, answers.columns[self.column], strict=True)
        ]


def _last(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
