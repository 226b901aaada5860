"""The sources of the stages' examples: shares, licences, losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_contmerge.report._tables import Cell, Quote, Section, Table
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace

_INTRO = (
    "Examples trained on, by source, and the mean loss of each source's tokens at the first and the last logged step. "
    "Replay: examples of earlier stages. Synthesised: written by the stage's start model. Preference pairs have no "
    "loss by source."
)


@dataclass(frozen=True)
class StageSource:
    """A dataset that a stage was trained on."""

    path: str
    split: str
    license: str | None
    general: bool = False
    written: bool = False

    def in_words(self) -> str:
        """Return split, licence and role."""
        if self.written:
            return "documents that the stage's start model wrote"
        words = [f"split {self.split}", f"licence {self.license or 'not stated'}", *["general data"] * self.general]
        return ", ".join(words)


def stage_sources(run: Run, place: ExpertPlace, t: int) -> list[StageSource]:
    """Return a trained stage's datasets: from its record, or from the recipe."""
    stage = run.stage(t)
    record = place.record("train") if place.is_done("train") else {}
    if not record.get("sources"):
        return [StageSource(s.path, s.split, s.license) for s in stage.dataset.sources()] if stage.dataset else []
    sources = [
        StageSource(source["path"], source["split"], source.get("license"), general)
        for general, sources in ((False, record["sources"]), (True, record.get("general_sources", ())))
        for source in sources
    ]
    written = [StageSource("synthesised", "train", None, written=True)] if record.get("synthesised") else []
    return sources + written


def sources_section(run: Run) -> Section:
    """Return a table of the sources of each expert with several."""
    places = [(t, place) for t, place in run.places() if isinstance(place, ExpertPlace) and place.is_done("train")]
    rows = [row for t, place in places for row in _rows(run, t, place)]
    header = ("expert", "source", "examples", "share", "licence", "first loss", "last loss")
    quotes = [quote for t, place in places for quote in _written(run, t, place)]
    return Section("Sources of the examples", _INTRO, tables=[Table("", header, rows)] if rows else [], quotes=quotes)


def _written(run: Run, t: int, place: ExpertPlace) -> list[Quote]:
    """Return examples of the documents that an expert's start model wrote."""
    found = place.record("train").get("synthesised")
    if not found:
        return []
    name = f"Written by a stage's start model: {run.stage(t).name} ({place.folder.name})"
    reasons = "".join(f"; {count} {why}" for why, count in found["left_out"].items())
    outcome = f"{found['used']} of {found['written']} documents are used{reasons}"
    return [Quote(name, text, outcome) for text in found["examples"]]


def _rows(run: Run, t: int, place: ExpertPlace) -> list[list[Cell]]:
    record = place.record("train")
    mixed, licences = record.get("mixed", ()), _licences(record)
    total = sum(part["examples"] for part in mixed)
    return [
        [
            Cell(f"{run.stage(t).name} ({place.folder.name})"),
            Cell(part["source"]),
            Cell(str(part["examples"])),
            Cell(f"{100 * part['examples'] / (total or 1):.1f} %"),
            Cell(licences.get(part["source"]) or ""),
            *(Cell("" if loss is None else f"{loss:.3f}") for loss in (part["first_loss"], part["loss"])),
        ]
        for part in mixed
    ]


def _licences(record: Mapping[str, Any]) -> dict[str, str | None]:
    sources = [*record.get("sources", ()), *record.get("general_sources", ())]
    return {source.get("name", ""): source.get("license") for source in sources}
