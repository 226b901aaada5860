"""Forgetting metrics of a utility matrix.

R[i,j] is the utility on stage j's tasks after stage i; row 0 is the base. Utilities are higher-is-better: accuracies
unchanged, perplexities as -ln(perplexity) (nats). Pure functions of numbers; a metric is None if a value it needs was
not measured. Accuracies and perplexities are never averaged: each block has a separate matrix and metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_contmerge.run.scores import Sample
from hf_contmerge.runtime.notebook import html_table

Row = tuple[float | None, ...]
Fraction = tuple[float, float]
"""A metric's dividend and divisor."""


@dataclass(frozen=True)
class ScoreMatrix:
    """Rows 0..T over columns 1..T (the stages); `None` where not measured.

    A column without values belongs to a stage without tasks in this block; metrics skip it.
    """

    stages: tuple[str, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows}
        if not self.rows or widths != {len(self.stages)}:
            raise ValueError(f"each row needs one value per stage ({len(self.stages)}); got widths {sorted(widths)}")

    def _repr_html_(self) -> str:
        """Return the utilities as a table, for notebooks."""
        names = ["base", *self.stages[: self.last]]
        rows = [
            (f"{t}. {name}" if t else name, *row) for t, (name, row) in enumerate(zip(names, self.rows, strict=True))
        ]
        return html_table("Utility on each stage, after each stage", ("after", *self.stages), rows)

    @property
    def last(self) -> int:
        """T, the number of stages with a row."""
        return len(self.rows) - 1

    def average(self, t: int | None = None) -> float | None:
        """ACC_t = 1/t sum_{j<=t} R[t,j] (Lopez-Paz & Ranzato 2017).

        `t` defaults to T.
        """
        t = self.last if t is None else t
        return mean([self._at(t, j) for j in self._columns(1, t)])

    def average_incremental(self) -> float | None:
        """AIA = 1/T sum_t ACC_t (as iCaRL, Rebuffi et al. 2017)."""
        return mean([self.average(t) for t in range(1, self.last + 1) if self._columns(1, t)])

    def learning_score(self) -> float | None:
        """LA = 1/T sum_i R[i,i]: each stage's score right after learning it."""
        return mean([self._at(i, i) for i in self._columns(1, self.last)])

    def backward_transfer(self) -> float | None:
        """BWT = 1/(T-1) sum_{j<T} (R[T,j] - R[j,j]); negative is forgetting.

        Lopez-Paz & Ranzato 2017.
        """
        return mean([_minus(self._at(self.last, j), self._at(j, j)) for j in self._columns(1, self.last - 1)])

    def backward_transfer_per_stage(self) -> float | None:
        """BWT = 1/T sum_{j<=T} (R[T,j] - R[j,j]) (TRACE, arXiv 2310.06762).

        It counts the last stage's 0 as well.
        """
        if not self._columns(1, self.last - 1):
            return None
        return mean([_minus(self._at(self.last, j), self._at(j, j)) for j in self._columns(1, self.last)])

    def forgetting(self) -> float | None:
        """F = 1/(T-1) sum_{j<T} (max_{l<T} R[l,j] - R[T,j]).

        Chaudhry et al. 2018; l counts from 1.
        """
        drops = []
        for j in self._columns(1, self.last - 1):
            earlier = [v for l in range(1, self.last) if (v := self._at(l, j)) is not None]
            drops.append(_minus(max(earlier, default=None), self._at(self.last, j)))
        return mean(drops)

    def forward_transfer(self) -> float | None:
        """FWT = 1/(T-1) sum_{j>=2} (R[j-1,j] - R[0,j]).

        The reference is the base model. Needs `matrix: full`.
        """
        return mean([_minus(self._at(j - 1, j), self._at(0, j)) for j in self._columns(2, self.last)])

    def intransigence(self, joint: Row) -> float | None:
        """I_T = J[T] - R[T,T] (Chaudhry et al. 2018): the last stage.

        `joint` is J, the model trained on all data up to stage T at once.
        """
        return mean([_minus(joint[j - 1], self._at(j, j)) for j in self._columns(self.last, self.last)])

    def against_alone(self, alone: Row) -> float | None:
        """1/T sum_j (e_j - R[j,j]): the gain of training alone.

        `alone` is e_j, the utility of the expert trained on stage j alone.
        """
        return mean([_minus(alone[j - 1], self._at(j, j)) for j in self._columns(1, self.last)])

    def normalised(self, alone: Row, floor: Row | None = None) -> float | None:
        """sum_j (R[T,j] - c_j) / sum_j (e_j - c_j).

        0 is the floor, 1 equals each stage's expert.

        Args:
            alone: e_j, the utility of stage j's expert, trained on stage j alone, or of the joint model.
            floor: c_j, such as chance; default: the base model.

        Returns:
            The ratio; None if the experts are no better than the floor.
        """
        return ratio(self.kept_and_gain(alone, floor))

    def kept_and_gain(self, alone: Row, floor: Row | None = None) -> Fraction | None:
        """Return the parts of `normalised`, each a mean over stages."""
        floor, columns = self.rows[0] if floor is None else floor, self._columns(1, self.last)
        kept = mean([_minus(self._at(self.last, j), floor[j - 1]) for j in columns])
        gain = mean([_minus(alone[j - 1], floor[j - 1]) for j in columns])
        return None if kept is None or gain is None else (kept, gain)

    def metrics(self, alone: Row | None = None, joint: Row | None = None) -> dict[str, float | None]:
        """Return all metrics under their names in summary.json.

        Args:
            alone: e_j, if known.
            joint: J, of the model trained on all these stages at once, if known.
        """
        unknown: Row = (None,) * len(self.stages)
        alone, joint = alone or unknown, joint or unknown
        return {
            "acc": self.average(),
            "aia": self.average_incremental(),
            "la": self.learning_score(),
            "bwt": self.backward_transfer(),
            "bwt_per_stage": self.backward_transfer_per_stage(),
            "forgetting": self.forgetting(),
            "fwt": self.forward_transfer(),
            "intransigence": self.intransigence(joint),
            "against_alone": self.against_alone(alone),
            "normalised": self.normalised(alone),
            "joint_kept": self.normalised(joint),
        }

    def _at(self, row: int, column: int) -> float | None:
        return self.rows[row][column - 1]

    def _columns(self, first: int, last: int) -> list[int]:
        return [j for j in range(first, last + 1) if any(row[j - 1] is not None for row in self.rows)]


def general_delta(first: Sequence[float | None], last: Sequence[float | None]) -> float | None:
    """Return mean_g R[T,g] - R[0,g] over general tasks (TRACE, arXiv 2310.06762)."""
    return mean([_minus(b, a) for a, b in zip(first, last, strict=True)])


def facts(lost: Sequence[tuple[Sample, Sample]], learnt: Sequence[tuple[Sample, Sample]]) -> Fraction | None:
    """Return FUAR's parts, in documents (forgotten per acquired fact; CKL, arXiv 2110.03215).

        sum max(0, right before - right after) over old tasks / sum max(0, right after - right before) over new tasks

    As in CKL (Jang et al. 2022), a task's losses on some documents and gains on others cancel. CKL sums shares of right
    answers and has one new corpus; here each document is one fact, and every stage of a run is new once.

    Args:
        lost: (before, after) of each old task.
        learnt: (before, after) of each new task.

    Returns:
        Both sums; None if a document is not simply right or wrong. Without anything learnt there is no ratio ("no gain"
        in CKL).
    """
    pairs = [*lost, *learnt]
    if any(gain not in (0, 1) for pair in pairs for sample in pair for gain in sample.gains):
        return None
    forgotten = sum(max(0.0, sum(before.gains) - sum(after.gains)) for before, after in lost)
    acquired = sum(max(0.0, sum(after.gains) - sum(before.gains)) for before, after in learnt)
    return forgotten, acquired


def ratio(parts: Fraction | None) -> float | None:
    """Return the quotient, None unless the divisor is above 0."""
    return parts[0] / parts[1] if parts and parts[1] > 0 else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if values are empty or any is missing."""
    numbers = [v for v in values if v is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
