"""Forgetting, from a matrix of utilities: R[i][j] is the utility on stage j's tasks after stage i; row 0 is the base.

Utilities are higher-is-better: an accuracy as it is, a perplexity as -ln(perplexity) (nats). Pure functions of numbers;
where a number that a metric needs was not measured, the metric is None. Accuracies and perplexities are never averaged:
each makes a block, with a matrix and metrics of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_contmerge.places import Place
from hf_contmerge.recipe import Stage
from hf_contmerge.run_folder import Run
from hf_contmerge.task_scores import Block, Scores, load_scores

Row = tuple[float | None, ...]


@dataclass(frozen=True)
class ScoreMatrix:
    """Rows 0..T over columns 1..T (the stages); `None` where not measured.

    A column without a single value belongs to a stage that has no task of this kind: the metrics leave it out.
    """

    stages: tuple[str, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows}
        if not self.rows or widths != {len(self.stages)}:
            raise ValueError(
                f"every row must have one value per stage ({len(self.stages)}); got widths {sorted(widths)}"
            )

    @property
    def last(self) -> int:
        """T, the number of stages that have a row."""
        return len(self.rows) - 1

    def average(self, t: int | None = None) -> float | None:
        """ACC_t = 1/t sum_{j<=t} R[t][j]; t is T by default (Lopez-Paz & Ranzato 2017)."""
        t = self.last if t is None else t
        return _mean([self._at(t, j) for j in self._columns(1, t)])

    def learning_score(self) -> float | None:
        """LA = 1/T sum_i R[i][i]: how well each stage was learnt when it was learnt."""
        return _mean([self._at(i, i) for i in self._columns(1, self.last)])

    def backward_transfer(self) -> float | None:
        """BWT = 1/(T-1) sum_{j<T} (R[T][j] - R[j][j]); negative is forgetting (Lopez-Paz & Ranzato 2017)."""
        return _mean([_minus(self._at(self.last, j), self._at(j, j)) for j in self._columns(1, self.last - 1)])

    def forgetting(self) -> float | None:
        """F = 1/(T-1) sum_{j<T} (max_{l<T} R[l][j] - R[T][j]) (Chaudhry et al. 2018); l counts from 1."""
        drops = []
        for j in self._columns(1, self.last - 1):
            earlier = [v for l in range(1, self.last) if (v := self._at(l, j)) is not None]
            drops.append(_minus(max(earlier, default=None), self._at(self.last, j)))
        return _mean(drops)

    def forward_transfer(self) -> float | None:
        """FWT = 1/(T-1) sum_{j>=2} (R[j-1][j] - R[0][j]); the reference is the base model. Needs `matrix: full`."""
        return _mean([_minus(self._at(j - 1, j), self._at(0, j)) for j in self._columns(2, self.last)])

    def metrics(self) -> dict[str, float | None]:
        """Return all of the above under the names of summary.json."""
        return {
            "acc": self.average(),
            "la": self.learning_score(),
            "bwt": self.backward_transfer(),
            "forgetting": self.forgetting(),
            "fwt": self.forward_transfer(),
        }

    def _at(self, row: int, column: int) -> float | None:
        return self.rows[row][column - 1]

    def _columns(self, first: int, last: int) -> list[int]:
        return [j for j in range(first, last + 1) if any(row[j - 1] is not None for row in self.rows)]


def general_delta(first: Sequence[float | None], last: Sequence[float | None]) -> float | None:
    """Return the mean over general tasks of R[T][g] - R[0][g] (TRACE, arXiv 2310.06762)."""
    return _mean([_minus(b, a) for a, b in zip(first, last, strict=True)])


@dataclass(frozen=True)
class Line:
    """The scores of one way of learning, stage after stage: an expert kind or a merge entry. Row 0 is the base."""

    name: str
    rows: tuple[Scores, ...]

    def matrix(self, stages: Sequence[Stage], block: Block) -> ScoreMatrix:
        """Return R of one block: a stage's utility is the mean over its tasks of that block."""
        rows = tuple(tuple(_utility(scores, s.task_names(), block) for s in stages) for scores in self.rows)
        return ScoreMatrix(tuple(s.name for s in stages), rows)

    def general(self, tasks: Sequence[str], block: Block) -> ScoreMatrix | None:
        """Return the same over general tasks, or None if no task is of this block. Only `rows` has a meaning here."""
        here = [t for t in tasks if any(t in row and row[t].block == block for row in self.rows)]
        rows = tuple(tuple(row[t].utility if t in row else None for t in here) for row in self.rows)
        return ScoreMatrix(tuple(here), rows) if here else None

    def metrics(self, stages: Sequence[Stage], tasks: Sequence[str], block: Block) -> dict[str, float | None]:
        """Return acc, la, bwt, forgetting, fwt and general_delta of one block."""
        general = self.general(tasks, block)
        delta = general_delta(general.rows[0], general.rows[-1]) if general else None
        return {**self.matrix(stages, block).metrics(), "general_delta": delta}


def load_lines(run: Run, expert_kinds: Sequence[str]) -> tuple[list[Line], list[Line]]:
    """Return the lines of the expert kinds and of the merge entries, as far as they have been measured."""
    base = load_scores(run.base)

    def line(name: str, places: Sequence[Place]) -> Line:
        rows = [load_scores(p) for p in places]
        while rows and not rows[-1]:  # stages still to come
            rows.pop()
        return Line(name, (base, *rows))

    experts = [line(kind, [run.expert(t, kind) for t in run.stage_numbers()]) for kind in expert_kinds]
    merges = [line(e.name, [run.merged(t, e) for t in run.stage_numbers()]) for e in run.recipe.merge]
    return experts, merges


def _utility(scores: Scores, tasks: Sequence[str], block: Block) -> float | None:
    return _mean([scores[t].utility for t in tasks if t in scores and scores[t].block == block])


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if there is nothing to average or a part was not measured."""
    numbers = [v for v in values if v is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
