"""Rows of multiple_choice and exact_match tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.parts import DataSource, Task
from hf_contmerge.training._format import Format, read_format, shown
from hf_contmerge.training._forms import checked_text, place_in, require_columns
from hf_contmerge.training._rows import Row, Rows


@dataclass(frozen=True)
class Asked:
    """A task's questions over a dataset's rows."""

    task: Task
    rows: Rows
    question: Format

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns without a use."""
        choices = self.task.choices if isinstance(self.task.choices, str) else ""
        used = {*self.question.columns, self.task.answer, choices}
        return tuple(name for name in self.rows.columns if name not in used)

    def made(self) -> Iterator[Row | None]:
        """Yield a task file's rows; None without question or answer.

        Raises DataError for a row that makes no question; the message has its place.
        """
        make = self._choice if self.task.kind == "multiple_choice" else self._answer
        for number, row in _some(self.rows, self.task.dataset):
            try:
                yield make(row)
            except DataError as error:
                raise DataError(f"{self.rows.place(number)}: {error}") from error

    def _answer(self, row: Row) -> Row | None:
        gold = row.get(self.task.answer)
        if gold is None or self._lacks(row):
            return None
        return {"query": self._query(row), "gold": self._shown(gold, self.task.answer).strip()}

    def _choice(self, row: Row) -> Row | None:
        words, column, gold = self.task.choices, self.task.answer, row.get(self.task.answer)
        choices: Any = row.get(words) if isinstance(words, str) else words
        if self._lacks(row) or choices is None:
            return None
        if not isinstance(choices, list | tuple):
            raise DataError(f"{words} must be a list of continuations; got {choices!r:.60}.")
        index = place_in(gold, choices)
        if index is None and isinstance(gold, str) and gold in choices:
            index = choices.index(gold)
        if index is None:
            raise DataError(
                f"{column} must be the right choice or its index; got {gold!r:.60} for {len(choices)} choices."
            )
        return {"query": self._query(row), "choices": [self._shown(c, str(words)) for c in choices], "gold": index}

    def _lacks(self, row: Row) -> bool:
        return any(row.get(name) is None for name in self.question.columns)

    def _query(self, row: Row) -> str:
        try:
            return checked_text(self.question.fill(row, exact=self.rows.are_records), "question")
        except (ValueError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"`question` does not fit it: {error}.") from error

    def _shown(self, value: Any, column: str) -> str:
        return checked_text(shown(value, exact=self.rows.are_records), column)


def asked_of(task: Task, rows: Rows) -> Asked:
    """Return a task's questions. Raises DataError for unknown columns."""
    question = read_format(task.question, rows.columns, f"`question` of {rows.path}")
    choices = [task.choices] if task.kind == "multiple_choice" and isinstance(task.choices, str) else []
    require_columns(rows.columns, [*question.columns, *choices, task.answer], rows.path)
    return Asked(task, rows, question)


def _some(rows: Rows, spec: DataSource | None) -> Iterator[tuple[int, Row]]:
    """Yield `max_examples` random rows with their numbers, always the same; or all."""
    most = spec.max_examples if spec else None
    if not most or len(rows) <= most:
        yield from enumerate(rows)
        return
    order = np.random.default_rng(0).permutation(len(rows))[:most].tolist()
    wanted = set(order)
    chosen = {number: row for number, row in enumerate(rows) if number in wanted}
    yield from ((number, chosen[number]) for number in order)
