"""How merges were chosen: attempts of a budget, curves of a coefficient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_contmerge.report._findings import amount, interval
from hf_contmerge.report._results import SHOWN
from hf_contmerge.report._tables import Cell, Table
from hf_contmerge.run.folder import Run, evenly_spread
from hf_contmerge.run.places import MergePlace
from hf_contmerge.scoring.forgetting.paired import Change

_WHAT = {
    "fold": "as in the recipe", "auto": "a coefficient", "shrink": "a smaller share of the merge",
    "rule": "another rule", "replay": "trained again, with replay", "earlier": "an earlier step of the stage",
    "keep_previous": "the previous merge, unchanged",
}  # fmt: skip

_HEAD = (
    "attempt", "scale", "within budget", "largest loss", "not ruled out", "gain on the newest stage",
    "share of the experts' gain", "rule",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One try of a coefficient: value, objective, general abilities held, taken."""

    value: float
    objective: float
    allowed: bool
    taken: bool


@dataclass(frozen=True)
class Curve:
    """The tries of one merge entry's coefficient, stage by stage."""

    entry: str
    word: str
    stages: Mapping[str, Sequence[Point]]


def choices_intro(run: Run) -> str:
    """Name the criterion of the choice."""
    recipe, parts = run.recipe, []
    if recipe.guard:
        limit, on = f"{recipe.guard.max_forgetting:g}", " and ".join(recipe.guard.on)
        how = "" if recipe.guard.measure == "mean" else (
            " Answers that are right or wrong are counted: what went from right to wrong, beyond guessing; other tasks "
            "have their mean."
        )  # fmt: skip
        parts.append(
            f"Budget: a loss of at most {limit} (share of right answers, or nats) on {on}, at "
            f"{100 * recipe.guard.confidence:g} % confidence.{how} The first attempt within the budget is taken."
        )
    if any(entry.auto for entry in recipe.merge):
        parts.append(
            "The coefficient keeps the largest share of the stage experts' gain over the base, among those that lose "
            "no more than noise on the general tasks."
        )
    share = f"{100 * recipe.evaluate.validation:g} %"
    parts.append(f"Decisions use validation documents ({share} of each task); results use the other documents.")
    return " ".join(parts)


def choice_tables(run: Run) -> list[Table]:
    """Return a table per chosen or failed merge, one try a row."""
    return [
        Table(f"{place.entry.name} of {run.stage(t).name}{'' if done else ': over the budget, the run stopped'}",
              _HEAD, [_row(attempt, done) for attempt in tries])
        for t, place, tries, done in _chosen(run)
    ]  # fmt: skip


def curves(run: Run) -> list[Curve]:
    """Return a curve per entry and searched coefficient.

    Of two that were searched together, each curve shows all tries.
    """
    by_entry: dict[tuple[str, str], Curve] = {}
    shown = evenly_spread(len(run.recipe.stages), SHOWN)
    for t, place, tries, _ in _chosen(run):
        if t not in shown:
            continue
        searched = [x for x in tries if x["what"] == "auto" and x["objective"] is not None]
        for word in place.entry.auto if searched else ():
            points = [
                Point(x["parameters"].get(word, 1.0), x["objective"], x["keeps_general"], bool(x.get("taken")))
                for x in searched
            ]
            key = (place.entry.name, word)
            curve = by_entry.setdefault(key, Curve(*key, {}))
            by_entry[key] = Curve(*key, {**curve.stages, run.stage(t).name: _sorted(points)})
    return list(by_entry.values())


def _sorted(points: Sequence[Point]) -> list[Point]:
    return sorted(points, key=lambda p: p.value)


def _chosen(run: Run) -> Iterator[tuple[int, MergePlace, list[dict[str, Any]], bool]]:
    """Yield (stage, place, tries, taken) of each chosen or failed merge."""
    for t, place in run.places():
        if not isinstance(place, MergePlace):
            continue
        if place.is_done("merge"):
            if tries := place.record("merge").get("tries"):
                yield t, place, tries, True
        elif tries := place.failed_tries():
            yield t, place, tries, False


def _row(attempt: Mapping[str, Any], done: bool) -> list[Cell]:
    """Return a try's row, without times: they belong to the machine."""
    parameters = ", ".join(
        f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in attempt["parameters"].items()
    )
    share = (
        Cell() if attempt.get("objective") is None else Cell(f"{100 * attempt['objective']:.0f} %".replace("-", "−"))
    )
    held = {None: Cell(), True: Cell("yes", shade=0.4), False: Cell("no", shade=-0.4)}[attempt.get("held")]
    what = _WHAT[attempt["what"]] + " ← taken" * (done and bool(attempt.get("taken")))
    rule = f"{attempt['rule']} ({parameters})" if parameters else attempt["rule"]
    losses = attempt.get("losses", ())
    return [Cell(what), Cell(f"{attempt['scale']:.3g}"), held, _worst(losses), _not_ruled_out(losses),
            _gain(attempt.get("gains", ())), share, Cell(rule)]  # fmt: skip


def _worst(losses: Sequence[Mapping[str, Any]]) -> Cell:
    """Return the largest loss beyond the noise, with its interval."""
    if not losses:
        return Cell()
    worst = min(losses, key=lambda x: x["mean"] if x["high"] is None else x["high"])
    return Cell(f"{_group(worst)} {_shift_text(worst)}")


def _not_ruled_out(losses: Sequence[Mapping[str, Any]]) -> Cell:
    """Return the largest loss inside its interval: unproven with few documents."""
    if not losses:
        return Cell()
    if any(x["low"] is None for x in losses):
        return Cell("too few documents")
    most = min(losses, key=lambda x: x["low"])
    return Cell(f"{_group(most)} {amount(most['low'], most['block'])}" if most["low"] < 0 else "")


def _group(shift: Mapping[str, Any]) -> str:
    return f"{shift['group']}, right → wrong" if shift.get("lost") else shift["group"]


def _gain(gains: Sequence[Mapping[str, Any]]) -> Cell:
    return Cell("; ".join(_shift_text(x) for x in gains)) if gains else Cell()


def _shift_text(shift: Mapping[str, Any]) -> str:
    change, block = Change(shift["mean"], None, shift["low"], shift["high"]), shift["block"]
    return amount(change.mean, block) + ("" if change.low is None else f" ({interval(change, block)})")
