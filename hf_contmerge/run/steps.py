"""The phases of a run, in the loop's order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hf_contmerge.errors import duration
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
    done = [step.done for step in steps]
    times = _times(run, [(step, step.seconds()) for step, over in zip(steps, done, strict=True) if over])
    return _estimate(run, [step for step, over in zip(steps, done, strict=True) if not over], times)


_Times = dict[tuple[Phase, bool], list[tuple[float, int]]]
"""Kind of a phase -> seconds and efforts of the finished ones."""


def _times(run: Run, finished: Sequence[tuple[Step, float | None]]) -> _Times:
    times: _Times = {}
    for step, seconds in finished:
        if seconds is not None:
            times.setdefault(_alike(run, step), []).append((seconds, step.effort()))
    return times


def _estimate(run: Run, steps: Sequence[Step], times: _Times) -> TimeLeft:
    left, unmeasured = 0.0, {}
    for step in steps:
        if measured := times.get(_alike(run, step)):
            seconds, efforts = map(sum, zip(*measured, strict=True))
            left += seconds / efforts * step.effort()
        else:
            unmeasured[step.phase] = True
    return TimeLeft(left, tuple(unmeasured))


class Course:
    """A run on its way through its phases."""

    def __init__(self, run: Run, steps: Sequence[Step]) -> None:
        self._run, self._steps, self._at = run, tuple(steps), 0
        self._seconds = {i: step.seconds() for i, step in enumerate(steps) if step.done}
        self._left, self._own, self._since = TimeLeft(0.0, ()), 0.0, time.monotonic()

    def reach(self, number: int) -> None:
        """Begin phase `number`, counted from 0; the ones before are over."""
        for i in range(self._at, number):
            if i not in self._seconds and self._steps[i].done:
                self._seconds[i] = self._steps[i].seconds()
        self._at, self._since = number, time.monotonic()
        if number in self._seconds:
            return  # nothing to do
        times = _times(self._run, [(self._steps[i], seconds) for i, seconds in self._seconds.items()])
        rest = [step for i, step in enumerate(self._steps) if i >= number and i not in self._seconds]
        self._left = _estimate(self._run, rest, times)
        self._own = _estimate(self._run, rest[:1], times).seconds

    def position(self) -> str:
        """Return the position, such as "phase 7 of 19, 12 min left"."""
        words = f"phase {self._at + 1} of {len(self._steps) + 1}"  # the report comes last
        seconds = self._left.seconds - min(self._own, time.monotonic() - self._since)
        if not self._left.seconds:
            return words
        return f"{words}, {'at least ' * bool(self._left.unmeasured)}{duration(seconds)} left"


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
