"""A merge's gains and losses for its card, with paired intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hf_contmerge.report._findings import amount, interval
from hf_contmerge.report._results import Results
from hf_contmerge.report._tables import Cell, Table
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.run.scores import Block, Scores
from hf_contmerge.scoring.forgetting.paired import Change

_HEADER = ("on", "score", "since", "change", "95 % interval", "seen")


class _Pair(NamedTuple):
    """A merge's scores and earlier ones on the same tasks."""

    name: str
    since: str
    new: Scores
    old: Scores
    tasks: tuple[str, ...]


def change_tables(run: Run, results: Results, entry: Merge, t: int) -> dict[str, Table]:
    """Return what was learnt, and what was lost since, by title."""
    rows = next(line.rows for line in results.merges if line.name == entry.name)
    rows = (*rows, *({} for _ in range(t + 1 - len(rows))))
    stages = [(run.stage(s), s) for s in range(1, t + 1)]
    learnt = [_Pair(stage.name, "the base", rows[s], rows[0], stage.task_names()) for stage, s in stages]
    lost = [_Pair(stage.name, "it was learnt", rows[t], rows[s], stage.task_names()) for stage, s in stages if s < t]
    lost.append(_Pair("general tasks", "the base", rows[t], rows[0], results.general_tasks))
    tables = {"Learnt": _table(results, learnt), "Known losses": _table(results, lost)}
    return {title: table for title, table in tables.items() if table.rows}


def seen_losses(tables: dict[str, Table]) -> str:
    """Return the losses of a card's table in a sentence."""
    if not (table := tables.get("Known losses")):
        return "Not measured."
    lost = [f"{row[0].text} ({row[1].text} {row[3].text})" for row in table.rows if row[5].text == "worse"]
    return f"Lost: {', '.join(lost)}." if lost else "No loss was seen in what was measured."


def _table(results: Results, pairs: list[_Pair]) -> Table:
    return Table("", _HEADER, [row for pair in pairs for row in _rows(results, pair)])


def _rows(results: Results, pair: _Pair) -> Iterator[list[Cell]]:
    for block in results.blocks():
        if change := results.change(pair.new, pair.old, pair.tasks, block):
            yield [Cell(pair.name), Cell(block), Cell(pair.since), *_cells(change, block)]


def _cells(change: Change, block: Block) -> list[Cell]:
    return [Cell(amount(change.mean, block)), Cell(interval(change, block)), Cell(change.seen)]
