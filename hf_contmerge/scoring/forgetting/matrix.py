"""Forgetting, from a matrix of utilities: R[i][j] is the utility on stage j's tasks after stage i; row 0 is the base.

Utilities are higher-is-better: an accuracy as it is, a perplexity as -ln(perplexity) (nats). Pure functions of numbers;
where a number that a metric needs was not measured, the metric is None. Accuracies and perplexities are never averaged:
each makes a block, with a matrix and metrics of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_contmerge.run.scores import Sample

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
        return mean([self._at(t, j) for j in self._columns(1, t)])

    def average_incremental(self) -> float | None:
        """AIA = 1/T sum_t ACC_t: the average after each stage, averaged (as iCaRL, Rebuffi et al. 2017)."""
        return mean([self.average(t) for t in range(1, self.last + 1) if self._columns(1, t)])

    def learning_score(self) -> float | None:
        """LA = 1/T sum_i R[i][i]: how well each stage was learnt when it was learnt."""
        return mean([self._at(i, i) for i in self._columns(1, self.last)])

    def backward_transfer(self) -> float | None:
        """BWT = 1/(T-1) sum_{j<T} (R[T][j] - R[j][j]); negative is forgetting (Lopez-Paz & Ranzato 2017)."""
        return mean([_minus(self._at(self.last, j), self._at(j, j)) for j in self._columns(1, self.last - 1)])

    def backward_transfer_per_stage(self) -> float | None:
        """BWT = 1/T sum_{j<=T} (R[T][j] - R[j][j]): TRACE's (arXiv 2310.06762), which counts the last stage's 0 too."""
        if not self._columns(1, self.last - 1):
            return None
        return mean([_minus(self._at(self.last, j), self._at(j, j)) for j in self._columns(1, self.last)])

    def forgetting(self) -> float | None:
        """F = 1/(T-1) sum_{j<T} (max_{l<T} R[l][j] - R[T][j]) (Chaudhry et al. 2018); l counts from 1."""
        drops = []
        for j in self._columns(1, self.last - 1):
            earlier = [v for l in range(1, self.last) if (v := self._at(l, j)) is not None]
            drops.append(_minus(max(earlier, default=None), self._at(self.last, j)))
        return mean(drops)

    def forward_transfer(self) -> float | None:
        """FWT = 1/(T-1) sum_{j>=2} (R[j-1][j] - R[0][j]); the reference is the base model. Needs `matrix: full`."""
        return mean([_minus(self._at(j - 1, j), self._at(0, j)) for j in self._columns(2, self.last)])

    def intransigence(self, alone: Row) -> float | None:
        """I = 1/T sum_j (e_j - R[j][j]): what a stage would have gained more by itself (after Chaudhry et al. 2018).

        Their reference was trained on all data so far; here e_j, `alone`, is the expert trained on stage j alone.
        """
        return mean([_minus(alone[j - 1], self._at(j, j)) for j in self._columns(1, self.last)])

    def normalised(self, alone: Row, floor: Row | None = None) -> float | None:
        """sum_j (R[T][j] - c_j) / sum_j (e_j - c_j): 0 is what was there before, 1 is each stage's expert alone.

        This has no unit, so that accuracies and perplexities can be compared by it. Sums are divided, and not stage by
        stage, because a stage of which its expert learnt next to nothing would drown all others.

        Args:
            alone: e_j, the utility of stage j's expert, trained on nothing else.
            floor: c_j, such as chance; the base model's by default.

        Returns:
            None where the experts are no better than the floor: there is nothing to share out.
        """
        floor, columns = self.rows[0] if floor is None else floor, self._columns(1, self.last)
        kept = mean([_minus(self._at(self.last, j), floor[j - 1]) for j in columns])
        gain = mean([_minus(alone[j - 1], floor[j - 1]) for j in columns])
        return None if kept is None or gain is None or gain <= 0 else kept / gain

    def metrics(self, alone: Row | None = None) -> dict[str, float | None]:
        """Return all of the above under the names of summary.json; `alone`: e_j, where they are known."""
        alone = (None,) * len(self.stages) if alone is None else alone
        return {
            "acc": self.average(),
            "aia": self.average_incremental(),
            "la": self.learning_score(),
            "bwt": self.backward_transfer(),
            "bwt_per_stage": self.backward_transfer_per_stage(),
            "forgetting": self.forgetting(),
            "fwt": self.forward_transfer(),
            "intransigence": self.intransigence(alone),
            "normalised": self.normalised(alone),
        }

    def _at(self, row: int, column: int) -> float | None:
        return self.rows[row][column - 1]

    def _columns(self, first: int, last: int) -> list[int]:
        return [j for j in range(first, last + 1) if any(row[j - 1] is not None for row in self.rows)]


def general_delta(first: Sequence[float | None], last: Sequence[float | None]) -> float | None:
    """Return the mean over general tasks of R[T][g] - R[0][g] (TRACE, arXiv 2310.06762)."""
    return mean([_minus(b, a) for a, b in zip(first, last, strict=True)])


def facts_ratio(lost: Sequence[tuple[Sample, Sample]], learnt: Sequence[tuple[Sample, Sample]]) -> float | None:
    """FUAR, forgotten per acquired fact (CKL, Jang et al. 2022, arXiv 2110.03215), counted in documents.

        sum max(0, right before - right after) over old tasks / sum max(0, right after - right before) over new tasks

    As in CKL, what a task loses on some documents and gains on others cancels. CKL sums shares of right answers and has
    one new corpus; here each document is one fact, and all stages of a run are new in their time.

    Args:
        lost: (before, after) of each task that could be forgotten.
        learnt: (before, after) of each task that could be learnt.

    Returns:
        None if nothing was learnt ("no gain" in CKL), or if a document is not simply right or wrong.
    """
    pairs = [*lost, *learnt]
    if any(gain not in (0, 1) for pair in pairs for sample in pair for gain in sample.gains):
        return None
    forgotten = sum(max(0.0, sum(before.gains) - sum(after.gains)) for before, after in lost)
    acquired = sum(max(0.0, sum(after.gains) - sum(before.gains)) for before, after in learnt)
    return forgotten / acquired if acquired else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if there is nothing to average or a part was not measured."""
    numbers = [v for v in values if v is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
