"""The picture of a remix: learning against keeping, a dot per candidate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_contmerge.report._pictures import Form, FrontDot, draw_front
from hf_contmerge.report._svg import inlined
from hf_contmerge.report._tables import Cell, Picture, Section, Table, change_cell
from hf_contmerge.run.folder import Run
from hf_contmerge.runtime.files import replacing
from hf_contmerge.runtime.records import read_record
from hf_contmerge.runtime.shapes import REMIX
from hf_contmerge.scoring.forgetting.paired import Change

_CURE = "Remove its folder, and give the command again."
_INTRO = (
    "Weights of the stages, chosen on validation documents. Blue: no candidate learns more and keeps more; hollow: "
    "falls below the base beyond noise; ring: chosen. The table has documents that decided nothing."
)


def write_front(record: Mapping[str, Any], path: Path) -> None:
    """Write the candidates of a remix's record as a PNG file."""
    with replacing(path) as file:
        file.write(_front(record, "png"))


def front_sections(run: Run) -> list[Section]:
    """Return a section for each finished remix of a run."""
    files = sorted(run.folder.glob("remix/*/remix.json"))
    records = {file.parent.name: read_record(file, _CURE, REMIX) for file in files}
    return [_section(name, record) for name, record in records.items() if "weights" in record]


def _section(name: str, record: Mapping[str, Any]) -> Section:
    weights = ", ".join(f"{s} {w:.3g}" for s, w in zip(record["stages"], record["weights"], strict=False))
    picture = Picture(inlined(_front(record, "svg").decode()), f"Learning against keeping of the remix {name}")
    groups = list(dict.fromkeys(shift["group"] for shifts in record["test"].values() for shift in shifts))
    rows = [[Cell(model), *_shift_cells(shifts, groups)] for model, shifts in record["test"].items()]
    table = Table("Change against the base", ("model", *groups), rows)
    return Section(f"Remix {name}", f"Weights: {weights}. {_INTRO}", tables=[table], pictures=[picture])


def _shift_cells(shifts: list[dict[str, Any]], groups: list[str]) -> list[Cell]:
    cells = {s["group"]: change_cell(Change(s["mean"], None, s["low"], s["high"]), s["block"]) for s in shifts}
    return [cells.get(group, Cell()) for group in groups]


def _front(record: Mapping[str, Any], form: Form) -> bytes:
    dots = [_dot(each) for each in record["tries"]]
    units = {shift["block"] for each in record["tries"] for shift in each["kept"]}
    unit = {frozenset(["accuracy"]): "share of right answers", frozenset(["perplexity"]): "nats"}.get(
        frozenset(units), "nats or share of right answers"
    )
    return draw_front(dots, keeping=f"worst change of {', '.join(record['inputs']['keep'])}, {unit}", form=form)


def _dot(candidate: Mapping[str, Any]) -> FrontDot:
    worst = min(candidate["kept"], key=lambda shift: shift["mean"], default={"mean": 0.0, "low": None, "high": None})
    change = candidate["learning"]
    return FrontDot(
        *((each["mean"], each["low"], each["high"]) for each in (worst, change)),
        front=candidate["front"], taken=candidate["taken"], allowed=candidate["keeps"],
    )  # fmt: skip
