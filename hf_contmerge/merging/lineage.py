"""merge.json: the parents and settings of a merged model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError, RunError
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge
from hf_contmerge.merging.rules import dtype_named, make_rule, rounding_named
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.digests import changed_files, digests_below
from hf_contmerge.runtime.files import clear_lock
from hf_contmerge.runtime.records import Record, read_record, write_record
from hf_contmerge.runtime.shapes import COEFFICIENTS, PARAMETERS

LINEAGE = "merge.json"
"""Record next to a model: base, experts, rule, scale, dtype, rounding, and the digests of the model's files."""


_SHAPE = {
    "rule": str, "parameters": PARAMETERS, "base": str, "base_sha256": str,
    "experts": [{"stage": str, "model": str, "sha256": str, **COEFFICIENTS}], "scale?": float, "factor?": float,
    "dtype?": (str, None),
    "rounding?": (str, None), "versions": {str: str}, "model_sha256?": str,
    "stored?": ({"dtype": str, "rounding": str}, None),
}  # fmt: skip


def read_lineage(model: Path) -> Record:
    """Return a model's lineage. Raises RunError if it is missing or damaged."""
    return read_record(model / LINEAGE, "Write the model again, or fetch it again.", _SHAPE)


def write_lineage(out: Path, lineage: Mapping[str, Any]) -> None:
    """Write merge.json next to a model, with the digests of its files."""
    write_record(out / LINEAGE, {**lineage, "files": digests_below(out)})


def finished_lineage(out: Path, wanted: Mapping[str, Any]) -> Record | None:
    """Return a whole model's lineage with these values; clear its lock."""
    try:
        lineage = read_lineage(out)
    except RunError:
        return None
    same = json.loads(json.dumps(wanted))
    if changed_files(out, lineage["files"]) or {word: lineage.get(word) for word in same} != same:
        return None
    clear_lock(out)
    return lineage


def check_parents(lineage: Record, base: Path, experts: Sequence[Path]) -> None:
    """Raise ModelError for parents with other weights than the merge read."""
    found = [(base, lineage["base"], lineage["base_sha256"], weights_sha256(base))]
    pairs = zip(lineage["experts"], experts, strict=True)
    found += [(folder, e["model"], e["sha256"], expert_sha256(folder)) for e, folder in pairs]
    for folder, name, recorded, now in found:
        if now != recorded:
            raise ModelError(
                f"{name} at {folder} has other weights than when it was merged (SHA-256 {now[:12]}, then "
                f"{recorded[:12]}): the merge cannot be made again from it. Name the old one with --parent."
            )


def merge_again(lineage: Record, base: Path, experts: Sequence[Path], scratch: Path, crew: Crew) -> str:
    """Merge the parents into an empty folder; return the weights' digest."""
    rule = make_rule(lineage["rule"], lineage["parameters"])
    folded = [
        FoldedExpert(
            e["stage"], folder, e["sha256"], name=e["model"], weight=e.get("weight", 1.0), chosen=e.get("chosen", {})
        )
        for e, folder in zip(lineage["experts"], experts, strict=True)
    ]
    merge = RunningMerge(base, lineage["rule"], rule).fold(folded, scratch / "running", crew=crew)
    merge = merge if lineage["factor"] == 1.0 else merge.scaled(lineage["factor"])
    out = Output(scratch / "merged", dtype_named(lineage["dtype"]), rounding=rounding_named(lineage["rounding"]))
    merge.export(out, crew=crew)
    return weights_sha256(out.folder)
