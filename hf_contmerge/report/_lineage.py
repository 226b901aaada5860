"""The lineage of a run's merge: parents by public names and digests."""

from __future__ import annotations

from typing import Any

from hf_contmerge.report._public import expert_of, public
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import MergePlace
from hf_contmerge.run.recipe.schema import Merge


def run_lineage(run: Run, entry: Merge, t: int) -> dict[str, Any] | None:
    """Return the fields of merge.json; None for a merge without experts.

    Experts of a published merge that the run continues come first.
    """
    place = run.merged(t, entry)
    record = place.record("merge")
    parts = place.folded(t)
    if not parts or not run.inputs.exists():
        return None
    base = run.input_record()["base"]
    return {
        "rule": record["rule"], "parameters": record["parameters"],
        "base": public(run.recipe.base_model), "base_sha256": base["sha256"],
        "experts": [
            *record.get("published", ()),
            *({"stage": run.stage(p["stage"]).name, "model": expert_name(run, place, p), "sha256": sha256,
             **{word: p[word] for word in ("weight", "chosen") if word in p}}
            for p, sha256 in zip(parts, record["expert_sha256"], strict=True)),
        ],
        "scale": record["scale"], "factor": record.get("factor", 1.0),
        "dtype": None if entry.dtype == "auto" else entry.dtype,
        "rounding": entry.rounding, "stored": record.get("stored"), "model_sha256": record["model_sha256"],
        "versions": record["versions"],
    }  # fmt: skip


def expert_name(run: Run, place: MergePlace, part: dict[str, Any]) -> str:
    """Return an expert's public name: given, or its place in the run."""
    stage = run.stage(part["stage"])
    if stage.expert and not stage.minus:
        return public(stage.expert)
    merged = run.merged(part["stage"], place.entry)
    trained = merged.replayed if part["replayed"] else expert_of(run, place.entry, part["stage"])
    trained = merged.earlier_at(part["earlier"]) if part.get("earlier") else trained
    return (trained.folder / "expert").relative_to(run.folder).as_posix()
