"""The lines of a report: the scores of one merge, or of fine-tuning alone, stage after stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Stage
from hf_contmerge.run.scores import Block, Scores, load_scores
from hf_contmerge.scoring.forgetting.matrix import Row, ScoreMatrix, facts_ratio, general_delta, mean


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
    return mean([scores[t].utility for t in tasks if t in scores and scores[t].block == block])
