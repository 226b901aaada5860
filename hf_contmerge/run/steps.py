"""The phases of a run, in the loop's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import IN_CONTEXT, ORACLE, ROUTED, Place
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.phases import Phase


@dataclass(frozen=True)
class Step:
    """One phase at one place.

    `t`: the stage, 0 for the base model.
    """

    phase: Phase
    t: int
    place: Place
    tasks: tuple[Task, ...] = ()
    """Tasks measured by a score phase."""

    @property
    def done(self) -> bool:
        return self.place.is_done(self.phase)

    def seconds(self) -> float | None:
        """Return a finished phase's time, if it was recorded."""
        return self.place.record(self.phase).get("seconds") if self.done else None

    def effort(self) -> int:
        """Return the phase's size in units of its kind: a score's tasks."""
        return max(len(self.tasks), 1)


class TimeLeft(NamedTuple):
    """The time of unfinished phases."""

    seconds: float
    unmeasured: tuple[Phase, ...]
    """Phases to come of which none has been timed; their time is left out."""


def time_left(run: Run, steps: Sequence[Step]) -> TimeLeft:
    """Estimate unfinished phases by the mean time of finished ones.

    Experts that are given take no training; scores count by their tasks.
    """
    times: dict[tuple[Phase, bool], list[tuple[float, int]]] = {}
    for step in steps:
        if (seconds := step.seconds()) is not None:
            times.setdefault(_alike(run, step), []).append((seconds, step.effort()))
    left, unmeasured = 0.0, {}
    for step in (step for step in steps if not step.done):
        if measured := times.get(_alike(run, step)):
            seconds, efforts = map(sum, zip(*measured, strict=True))
            left += seconds / efforts * step.effort()
        else:
            unmeasured[step.phase] = True
    return TimeLeft(left, tuple(unmeasured))


def _alike(run: Run, step: Step) -> tuple[Phase, bool]:
    """Return what phases of about the same time have in common."""
    return step.phase, step.phase == "train" and run.stage(step.t).dataset is not None


def run_steps(run: Run, kinds: Mapping[str, str]) -> Iterator[Step]:
    """Yield a run's phases, in the loop's order.

    `kinds`: merge entry -> kind of its experts.
    """
    recipe, every = run.recipe, run.stage_numbers()
    yield Step("score", 0, run.base, tuple(recipe.measured(every)))
    for t in every:
        experts = {run.expert(t, kind).folder: run.expert(t, kind) for kind in kinds.values()}
        merges = [run.merged(t, entry) for entry in recipe.merge]
        yield from (Step("train", t, place) for place in experts.values())
        yield from (Step("merge", t, place) for place in merges)
        stages = every if recipe.evaluate.matrix == "full" else range(1, t + 1)
        for place in experts.values():
            if place.kind == "base" and recipe.evaluate.routed:
                yield Step("score", t, place, tuple(recipe.measured(every)))
                continue
            alone = place.alone(t)  # an independent expert has learnt its own stage only
            yield Step("score", t, place, tuple(recipe.measured([t] if alone else stages, general=not alone)))
        yield from (Step("score", t, place, tuple(recipe.measured(stages))) for place in merges)
    for name in (ORACLE, ROUTED) if recipe.evaluate.routed else ():
        yield Step("score", every[-1], run.baseline(name), tuple(recipe.measured(every)))
    if "joint" in recipe.baselines:
        yield Step("train", every[-1], run.joint)
        yield Step("score", every[-1], run.joint, tuple(recipe.measured(every)))
    if IN_CONTEXT in recipe.baselines:  # no stage teaches general tasks
        yield Step("score", every[-1], run.baseline(IN_CONTEXT), tuple(recipe.measured(every, general=False)))
