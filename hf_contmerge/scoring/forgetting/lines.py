"""Scores per stage of one merge or of sequential fine-tuning, for reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import IN_CONTEXT, JOINT, ORACLE, ROUTED
from hf_contmerge.run.recipe.schema import Stage
from hf_contmerge.run.scores import Block, Scores, load_scores
from hf_contmerge.scoring.forgetting.matrix import Fraction, Row, ScoreMatrix, facts, general_delta, mean, ratio
from hf_contmerge.scoring.forgetting.paired import Change, Group, flips, level, mean_change

SIDES = ("lost", "regained", "general_lost", "general_gained")
"""Metrics of the documents that changed sides."""
RATIOS = ("normalised", "joint_kept", "fuar")
"""Metrics that are quotients: over several runs, of means."""

_DIRECTIONS: dict[str, Literal["wrong", "right"]] = {
    "lost": "wrong", "regained": "right", "general_lost": "wrong", "general_gained": "right",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Stage-by-stage scores of an expert kind or merge entry.

    Row 0 is the base.
    """

    name: str
    rows: tuple[Scores, ...]
    alone: tuple[Scores, ...] = ()
    """Scores of each stage's expert, trained from the base on the stage alone: the target."""
    joint: Scores = field(default_factory=dict)
    """Scores of the expert trained on all stages at once, if the line has come that far."""

    def matrix(self, stages: Sequence[Stage], block: Block) -> ScoreMatrix:
        """Return the score matrix R of one block.

        A stage's utility is the mean over its tasks in the block.
        """
        rows = tuple(tuple(_utility(scores, s.task_names(), block) for s in stages) for scores in self.rows)
        return ScoreMatrix(tuple(s.name for s in stages), rows)

    def general(self, tasks: Sequence[str], block: Block) -> ScoreMatrix | None:
        """Return the score matrix over general tasks, if any.

        None without tasks in the block. Its columns are tasks, so only `rows` is meaningful.
        """
        here = [t for t in tasks if any(t in row and row[t].block == block for row in self.rows)]
        rows = tuple(tuple(row[t].utility if t in row else None for t in here) for row in self.rows)
        return ScoreMatrix(tuple(here), rows) if here else None

    def metrics(self, stages: Sequence[Stage], tasks: Sequence[str], block: Block) -> dict[str, float | None]:
        """Return one block's metrics by name.

        They are ScoreMatrix's metrics, general_delta, the documents that changed sides, and fuar.
        """
        general = self.general(tasks, block)
        delta = general_delta(general.rows[0], general.rows[-1]) if general else None
        metrics = self.matrix(stages, block).metrics(self._alone(stages, block), self._joint(stages, block))
        sides = self._sides(stages, tasks, block)
        return {**metrics, "general_delta": delta, **sides, "fuar": ratio(self._facts(stages, tasks, block))}

    def fractions(self, stages: Sequence[Stage], tasks: Sequence[str], block: Block) -> dict[str, Fraction | None]:
        """Return the parts of RATIOS."""
        matrix, (normalised, joint_kept, fuar) = self.matrix(stages, block), RATIOS
        return {
            normalised: matrix.kept_and_gain(self._alone(stages, block)),
            joint_kept: matrix.kept_and_gain(self._joint(stages, block)),
            fuar: self._facts(stages, tasks, block),
        }

    def estimate(self, metric: str, stages: Sequence[Stage], tasks: Sequence[str], block: Block) -> Change | None:
        """Return a metric with its interval over documents.

        None if it was not measured. ACC, BWT, FWT, general_delta and SIDES have one.
        """
        end, last = self.rows[-1], len(self.rows) - 1
        names = [stage.task_names() for stage in stages[:last]]
        if metric == "acc":
            return level([(end, each) for each in names], block)
        if metric in SIDES:
            return flips(self._side_groups(metric, stages, tasks), _DIRECTIONS[metric]) if block == "accuracy" else None
        groups = {
            "bwt": [(end, self.rows[j], names[j - 1]) for j in range(1, last)],
            "fwt": [(self.rows[j - 1], self.rows[0], names[j - 1]) for j in range(2, last + 1)],
            "general_delta": [(end, self.rows[0], tasks)],
        }
        return mean_change(groups[metric], block)

    def since(self, t: int, task: str, stages: Sequence[Stage]) -> Scores | None:
        """Return the reference scores of a task's flips after stage t.

        These are the ones right after its stage was learnt; general tasks count from the base. None before that.
        """
        learnt = next((j for j, stage in enumerate(stages, 1) if task in stage.task_names()), 0)
        return self.rows[learnt] if learnt < t < len(self.rows) else None

    def _sides(self, stages: Sequence[Stage], tasks: Sequence[str], block: Block) -> dict[str, float | None]:
        """Return the shares of documents lost and gained, by name."""
        changes = {metric: self.estimate(metric, stages, tasks, block) for metric in SIDES}
        return {metric: None if change is None else change.mean for metric, change in changes.items()}

    def _side_groups(self, metric: str, stages: Sequence[Stage], tasks: Sequence[str]) -> list[Group]:
        end, last = self.rows[-1], len(self.rows) - 1
        if metric.startswith("general"):
            return [(end, self.rows[0], tasks)] if last else []
        return [(end, self.rows[j], stages[j - 1].task_names()) for j in range(1, last)]

    def _joint(self, stages: Sequence[Stage], block: Block) -> Row:
        return tuple(_utility(self.joint, s.task_names(), block) for s in stages)

    def _alone(self, stages: Sequence[Stage], block: Block) -> Row:
        """Return e_j of each stage."""
        alone = [self.alone[j] if j < len(self.alone) else {} for j in range(len(stages))]
        return tuple(_utility(scores, s.task_names(), block) for s, scores in zip(stages, alone, strict=True))

    def _facts(self, stages: Sequence[Stage], tasks: Sequence[str], block: Block) -> Fraction | None:
        """Return the parts of one block's FUAR.

        Old tasks: general tasks (since the base) and those of earlier stages (since learnt). New tasks: each stage's.
        """
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
        return facts(lost, learnt) if lost else None


def load_lines(run: Run, expert_kinds: Sequence[str]) -> tuple[list[Line], list[Line]]:
    """Load the measured lines of expert kinds and of merge entries.

    Baselines come last among experts. They have scores after the last stage only.
    """
    base, joint = load_scores(run.base), load_scores(run.joint)
    alone = tuple(_own(run, t, load_scores(run.expert(t, "base"))) for t in run.stage_numbers())

    def line(name: str, rows: Iterable[Scores]) -> Line:
        rows = list(rows)
        while rows and not rows[-1]:  # stages not measured yet
            rows.pop()
        return Line(name, (base, *rows), alone, joint if len(rows) == len(run.stage_numbers()) else {})

    def experts_of(kind: str) -> Iterable[Scores]:
        """Yield each stage's expert scores; all kinds share the first stage's expert."""
        return alone if kind == "base" else (alone[0], *(load_scores(run.expert(t, kind)) for t in later))

    later = run.stage_numbers()[1:]
    experts = [line(kind, experts_of(kind)) for kind in expert_kinds]
    at_the_end = {JOINT: joint, **{name: load_scores(run.baseline(name)) for name in (ROUTED, ORACLE, IN_CONTEXT)}}
    experts += [line(name, [*({} for _ in alone[1:]), scores]) for name, scores in at_the_end.items() if scores]
    merges = [line(e.name, (load_scores(run.merged(t, e)) for t in run.stage_numbers())) for e in run.recipe.merge]
    return experts, merges


def _own(run: Run, t: int, scores: Scores) -> Scores:
    """Leave out independent experts' scores measured for a router."""
    return scores if t == 1 else {k: score for k, score in scores.items() if k in run.stage(t).task_names()}


def _utility(scores: Scores, tasks: Sequence[str], block: Block) -> float | None:
    return mean([scores[t].utility for t in tasks if t in scores and scores[t].block == block])
