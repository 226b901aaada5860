"""Expected and real effects of each stage's expert (`evaluate: {relevance: 16}`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_contmerge.report._results import Results
from hf_contmerge.report._tables import Cell, Section, Table, change_cell
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.run.scores import Block
from hf_contmerge.scoring.forgetting.lines import Line

_INTRO = (
    "Before a merge, the new expert is looked at from the merge so far, on training examples of the stages. Relevance "
    "is the cosine of its task vector with the direction in which the loss falls fastest; it tells whom an expert "
    "is for. Gains are in nats per token: of a quarter of the task vector, by the gradient and measured; of all of it, "
    "with the curvature that the two imply. The last columns are what the merge then did to the stage's tasks, with "
    "95 % intervals. At such steps the prediction can have the wrong sign: it explains, and decides nothing."
)


def relevance_section(run: Run, results: Results) -> Section:
    """Return what experts were expected to do and did; empty without it."""
    blocks = results.stage_blocks()
    tables = [
        Table(entry.name, _header(blocks), rows)
        for entry, line in zip(run.recipe.merge, results.merges, strict=True)
        if (rows := [row for t in run.stage_numbers() for row in _rows(run, results, entry, line, t)])
    ]
    return Section("Whom each expert helps", _INTRO, tables)


def _header(blocks: list[Block]) -> tuple[str, ...]:
    shown = ("relevance", "predicted at 0.25", "measured at 0.25", "predicted at 1")
    return ("expert of", "text of", *shown, *(f"after the merge, {block}" for block in blocks))


def _rows(run: Run, results: Results, entry: Merge, line: Line, t: int) -> list[list[Cell]]:
    place = run.merged(t, entry)
    found = place.record("merge").get("relevance", {}) if place.is_done("merge") else {}
    texts = found.get("texts", {})
    return [[Cell(run.stage(t).name), Cell(text), *_effect(effect), *_done(results, line, t, text)]
            for text, effect in texts.items()]  # fmt: skip


def _done(results: Results, line: Line, t: int, text: str) -> list[Cell]:
    """Return the change of a stage's tasks by the merge, per block."""
    tasks = next(stage.task_names() for stage in results.stages if stage.name == text)
    if t >= len(line.rows):
        return [Cell() for _ in results.stage_blocks()]
    now, before = line.rows[t], line.rows[t - 1]
    return [change_cell(results.change(now, before, tasks, block), block) for block in results.stage_blocks()]


def _effect(effect: Mapping[str, Any]) -> list[Cell]:
    relevance = effect["relevance"]
    groups = ", ".join(f"{name} {cosine:+.3f}" for name, cosine in effect["groups"].items() if cosine is not None)
    shade = {"helps": 0.4, "hurts": -0.4}.get(effect["verdict"], 0.0)
    return [
        Cell("" if relevance is None else f"{relevance:+.3f}", groups),
        Cell(f"{effect['predicted']:+.3f}"),
        Cell(f"{effect['real']:+.3f}", _interval(effect), shade),
        Cell(f"{effect['at_1']:+.3f}"),
    ]


def _interval(effect: Mapping[str, Any]) -> str:
    low, high = effect["low"], effect["high"]
    return "" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
