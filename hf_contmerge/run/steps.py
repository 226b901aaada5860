"""The phases of a run, in the loop's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
