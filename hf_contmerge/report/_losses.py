"""The losses of a run's trainings, as its records have them."""

from __future__ import annotations

from itertools import accumulate

from hf_contmerge.report._pictures import LossCurve, draw_losses
from hf_contmerge.report._results import line_label
from hf_contmerge.report._tables import Picture, Section
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace

_INTRO = "Mean training loss of each stage since the last point. A stage's experts train on the same examples."


def loss_section(run: Run) -> Section:
    """Return the learning curves; empty without trainings."""
    losses: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for t, place in run.places():
        if isinstance(place, ExpertPlace) and place.is_done("train") and place != run.joint:
            points = [(p["step"], p["loss"]) for p in place.record("train").get("log", ()) if "loss" in p]
            if points:
                losses.setdefault(place.kind, {})[t] = points
    if not losses:
        return Section("Learning curves")
    stages = run.stage_numbers()
    most = [max((of[t][-1][0] for of in losses.values() if t in of), default=0) for t in stages]
    first = dict(zip(stages, accumulate([0, *most]), strict=False))
    curves = [
        LossCurve(line_label(kind), [[(first[t] + step, loss) for step, loss in points] for t, points in of.items()])
        for kind, of in losses.items()
    ]
    names = {run.stage(t).name: first[t] for t, steps in zip(stages, most, strict=True) if steps}
    alt = f"Training losses of {', '.join(curve.name for curve in curves)}, stage after stage"
    return Section("Learning curves", _INTRO, pictures=[Picture(draw_losses(curves, names), alt)])
