"""Merge or route: each merge next to separate experts with a router."""

from __future__ import annotations

from hf_contmerge.report._results import Results, line_label
from hf_contmerge.report._tables import Cell, Section, Table, change_cell
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ORACLE, ROUTED
from hf_contmerge.run.scores import Block
from hf_contmerge.scoring.forgetting.lines import Line

_INTRO = (
    "Separate experts answer each document by the expert of its own stage (oracle), or by the one that a router picks "
    "from the prompt (routed). Three numbers per merge, over all stages, with paired 95 % intervals: the last two "
    "columns are the price of merging. The router is measured on prompts of the datasets it has learnt from, which "
    "flatters it."
)


def route_section(run: Run, results: Results) -> Section:
    """Return the comparison of merges with routed experts; empty without it."""
    tables = [table for block in results.stage_blocks() if (table := route_table(results, block)).rows]
    return Section("Merge or route", _INTRO, [*tables, *_confusion(run)] if tables else [])


def route_table(results: Results, block: Block, entry: str | None = None) -> Table:
    """Return merged, routed and oracle for each finished merge, or one entry's."""
    routed, oracle = (results.expert(name) for name in (ROUTED, ORACLE))
    rows = [_row(results, merge, routed, oracle, block) for merge in results.merges
            if routed and oracle and len(merge.rows) == len(routed.rows)
            and entry in (None, merge.name)]  # fmt: skip
    header = ("merge", "merged", "routed", "oracle", "routed against merged", "oracle against merged")
    return Table(f"{block}, the first three against the base", header, rows)


def _row(results: Results, merge: Line, routed: Line, oracle: Line, block: Block) -> list[Cell]:
    t, base = len(merge.rows) - 1, Line("base", (results.base,) * len(merge.rows))
    against = [(merge, base), (routed, base), (oracle, base), (routed, merge), (oracle, merge)]
    return [Cell(merge.name), *(change_cell(results.overall(new, old, t, block), block) for new, old in against)]


def _confusion(run: Run) -> list[Table]:
    place = run.baseline(ROUTED)
    counts = place.record("score").get("router", {}).get("confusion", {}) if place.is_done("score") else {}
    if not counts:
        return []
    names = list(next(iter(counts.values())))
    rows = [[Cell(source), *(Cell(str(of[name])) for name in names)] for source, of in counts.items()]
    return [Table(f"Documents by the pick of {line_label(ROUTED)}", ("documents of", *names), rows)]
