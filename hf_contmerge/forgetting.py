"""Forgetting, from a matrix of utilities: R[i][j] is the utility on stage j's tasks after stage i; row 0 is the base.

Utilities are higher-is-better: an accuracy as it is, a perplexity as -ln(perplexity) (nats). Pure functions of numbers;
where a number that a metric needs was not measured, the metric is None. Accuracies and perplexities are never averaged:
each makes a block, with a matrix and metrics of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_contmerge.recipe import Stage
from hf_contmerge.run_folder import Run
from hf_contmerge.task_scores import Block, Sample, Scores, load_scores

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

    def average_incremental(self) -> float | None:
        """AIA = 1/T sum_t ACC_t: the average after each stage, averaged (as iCaRL, Rebuffi et al. 2017)."""
        return _mean([self.average(t) for t in range(1, self.last + 1) if self._columns(1, t)])

    def learning_score(self) -> float | None:
        """LA = 1/T sum_i R[i][i]: how well each stage was learnt when it was learnt."""
        return _mean([self._at(i, i) for i in self._columns(1, self.last)])

    def backward_transfer(self) -> float | None:
        """BWT = 1/(T-1) sum_{j<T} (R[T][j] - R[j][j]); negative is forgetting (Lopez-Paz & Ranzato 2017)."""
        return _mean([_minus(self._at(self.last, j), self._at(j, j)) for j in self._columns(1, self.last - 1)])

    def backward_transfer_per_stage(self) -> float | None:
        """BWT = 1/T sum_{j<=T} (R[T][j] - R[j][j]): TRACE's (arXiv 2310.06762), which counts the last stage's 0 too."""
        if not self._columns(1, self.last - 1):
            return None
        return _mean([_minus(self._at(self.last, j), self._at(j, j)) for j in self._columns(1, self.last)])

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

    def intransigence(self, alone: Row) -> float | None:
        """I = 1/T sum_j (e_j - R[j][j]): what a stage would have gained more by itself (after Chaudhry et al. 2018).

        Their reference was trained on all data so far; here e_j, `alone`, is the expert trained on stage j alone.
        """
        return _mean([_minus(alone[j - 1], self._at(j, j)) for j in self._columns(1, self.last)])

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
        kept = _mean([_minus(self._at(self.last, j), floor[j - 1]) for j in columns])
        gain = _mean([_minus(alone[j - 1], floor[j - 1]) for j in columns])
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
    return _mean([_minus(b, a) for a, b in zip(first, last, strict=True)])


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


@dataclass(frozen=True)
class Line:
    """The scores of one way of learning, stage after stage: an expert kind or a merge entry. Row 0 is the base."""

    name: str
    rows: tuple[Scores, ...]
    alone: tuple[Scores, ...] = ()
    """Of each stage's expert, trained from the base on that stage alone: what there is to reach."""

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
        """Return the metrics of one block by name: those of ScoreMatrix, general_delta and fuar."""
        general = self.general(tasks, block)
        delta = general_delta(general.rows[0], general.rows[-1]) if general else None
        found = self.matrix(stages, block).metrics(self._alone(stages, block))
        return {**found, "general_delta": delta, "fuar": self._fuar(stages, tasks, block)}

    def _alone(self, stages: Sequence[Stage], block: Block) -> Row:
        """Return e_j of each stage."""
        alone = [self.alone[j] if j < len(self.alone) else {} for j in range(len(stages))]
        return tuple(_utility(scores, s.task_names(), block) for s, scores in zip(stages, alone, strict=True))

    def _fuar(self, stages: Sequence[Stage], tasks: Sequence[str], block: Block) -> float | None:
        """Return FUAR: old are the general tasks, known by the base, and each earlier stage, since it was learnt."""
        last = len(self.rows) - 1
        if block != "accuracy" or last < 1:
            return None
        base, end = self.rows[0], self.rows[last]
        old = [(base, end, task) for task in tasks]
        old += [(self.rows[t], end, k) for t in range(1, last) for k in stages[t - 1].task_names()]
        new = [(base, self.rows[t], k) for t in range(1, last + 1) for k in stages[t - 1].task_names()]
        here = [(a, b, k) for a, b, k in (*old, *new) if any(k in x and x[k].block == block for x in (a, b))]
        if any(k not in a or k not in b for a, b, k in here):
            return None
        lost, learnt = ([(a[k].sample, b[k].sample) for a, b, k in x if k in a and a[k].block == block]
                        for x in (old, new))  # fmt: skip
        return facts_ratio(lost, learnt) if lost else None


def load_lines(run: Run, expert_kinds: Sequence[str]) -> tuple[list[Line], list[Line]]:
    """Return the lines of the expert kinds and of the merge entries, as far as they have been measured."""
    base = load_scores(run.base)
    alone = tuple(load_scores(run.expert(t, "base")) for t in run.stage_numbers())

    def line(name: str, rows: Iterable[Scores]) -> Line:
        rows = list(rows)
        while rows and not rows[-1]:  # stages still to come
            rows.pop()
        return Line(name, (base, *rows), alone)

    def experts_of(kind: str) -> Iterable[Scores]:
        """Yield the scores of each stage's expert; in the first stage every kind is one."""
        return alone if kind == "base" else (alone[0], *(load_scores(run.expert(t, kind)) for t in later))

    later = run.stage_numbers()[1:]
    experts = [line(kind, experts_of(kind)) for kind in expert_kinds]
    merges = [line(e.name, (load_scores(run.merged(t, e)) for t in run.stage_numbers())) for e in run.recipe.merge]
    return experts, merges


def _utility(scores: Scores, tasks: Sequence[str], block: Block) -> float | None:
    return _mean([scores[t].utility for t in tasks if t in scores and scores[t].block == block])


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if there is nothing to average or a part was not measured."""
    numbers = [v for v in values if v is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
