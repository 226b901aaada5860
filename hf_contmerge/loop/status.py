"""Finished phases of a run, the next one, the time left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.phases import PHASES, Phase
from hf_contmerge.run.steps import Step, TimeLeft, run_steps, time_left


@dataclass(frozen=True)
class RunStatus:
    """A run and its phases in order; the report comes last."""

    run: Run
    steps: tuple[Step, ...]
    complete: bool

    @property
    def done(self) -> int:
        """Number of finished phases."""
        return sum(step.done for step in self.steps) + self.complete

    @property
    def total(self) -> int:
        """Number of phases, with the report."""
        return len(self.steps) + 1

    @property
    def next(self) -> Step | None:
        """The first unfinished phase; None if only the report is left."""
        return next((step for step in self.steps if not step.done), None)

    def folder_of(self, step: Step) -> str:
        return str(step.place.folder.relative_to(self.run.folder / "stages"))

    def time_left(self) -> TimeLeft:
        """Estimate the time of the unfinished phases."""
        return time_left(self.run, self.steps)

    def marks(self) -> dict[tuple[int, str], dict[Phase, str]]:
        """Return (stage, folder) -> phase -> done, next or open."""
        rows: dict[tuple[int, str], dict[Phase, str]] = {}
        for step in self.steps:
            mark = "✓" if step.done else "→" if step is self.next else "·"
            rows.setdefault((step.t, self.folder_of(step)), {})[step.phase] = mark
        return rows

    def to_json(self) -> dict[str, Any]:
        left, following = self.time_left(), self.next
        return {
            "folder": str(self.run.folder), "complete": self.complete, "done": self.done, "phases": self.total,
            "next": following and {"phase": following.phase, "stage": following.t, "place": self.folder_of(following)},
            "seconds_left": round(left.seconds, 1), "not_timed_yet": list(left.unmeasured),
            "resume": None if self.complete else self.run.command,
            "steps": [
                {"phase": s.phase, "stage": s.t, "place": self.folder_of(s), "done": s.done, "seconds": s.seconds()}
                for s in self.steps
            ],
        }  # fmt: skip


def run_status(run: Run) -> RunStatus:
    """Read a run's finished phases.

    The rules are loaded for an unfinished run only.

    Raises:
        RecipeError: an unknown rule, of a plugin that is not given.
    """
    if run.is_complete():
        done = [Step(phase, t, place) for t, place in run.places() for phase in PHASES if place.is_done(phase)]
        return RunStatus(run, tuple(done), complete=True)
    from hf_contmerge.loop._entries import kinds_of

    return RunStatus(run, tuple(run_steps(run, kinds_of(run.recipe))), complete=False)
