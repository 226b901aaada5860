"""A published merge state: the running tensors, and state.json with public names.

Others append to it: `contmerge run RECIPE --from owner/name`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_contmerge.errors import RunError
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.identity import weight_digests
from hf_contmerge.report._contents import STATE, Contents
from hf_contmerge.report._lineage import expert_name
from hf_contmerge.report._public import public
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.runtime.digests import Digests, digests_of, files_below
from hf_contmerge.runtime.records import record_text

_RUNNING = "running-1"


def run_state(run: Run, entry: Merge, t: int) -> dict[str, Contents]:
    """Return the state after a run's stage, as `contmerge merge` keeps it.

    Raises:
        RunError: it was deleted, damaged, or scaled by a guard.
    """
    place = run.merged(t, entry)
    record = place.record("merge")
    files = {n.removeprefix("running/"): d for n, d in record["files"].items() if n.startswith("running/")}
    if record.get("factor", 1.0) != 1.0 or record.get("goes_on") or not files:
        raise RunError(
            f"{place.folder} has no state to append to: a guard scaled the merge, changed its rule, or kept no expert. "
            "Push without --with-state."
        )
    place.check("merge", "running")
    base = run.input_record()["base"]
    experts = [*record.get("published", ())]
    experts += [
        {"stage": run.stage(part["stage"]).name, "model": expert_name(run, place, part), "sha256": sha256,
         "norm": norm, "kind": "model", "weight": part.get("weight", 1.0)}
        for part, sha256, norm in zip(
            place.folded(t), record["expert_sha256"], record["norms"]["experts"], strict=True)
    ]  # fmt: skip
    values = {
        "rule": record["rule"], "parameters": record["parameters"], "base": run.recipe.base_model,
        "base_sha256": base["sha256"], "base_files": weight_digests(base["files"]), "experts": experts,
        "running_norm": record["norms"]["running"], "amplification": record.get("amplification"),
        "versions": record["versions"],
    }  # fmt: skip
    return _files(place.running, files, values)


def state_contents(state: MergeState) -> dict[str, Contents]:
    """Return a state's files. Raises RunError if it is damaged."""
    log, running = state.log(), state.require_running()
    files = digests_of(running, files_below(running, "."))
    experts = [{**e.to_json(), "model": public(e.model)} for e in log.experts]
    values = {**log.to_json(), "base_files": weight_digests(log.base_files), "experts": experts}
    return _files(running, files, values)


def _files(running: Path, digests: Digests, values: dict[str, Any]) -> dict[str, Contents]:
    """Return path in the repository -> contents of a state."""
    base = public(values["base"])
    unknown = {"files": {}, "added": "", "seconds": 0.0}
    experts = [{**e, "folder": e["model"], **unknown} for e in values["experts"]]
    record = {
        **values, "base": base, "base_folder": base, "base_stamp": "", "experts": experts, "running": _RUNNING,
        "running_files": {f"{_RUNNING}/{name}": digest for name, digest in digests.items()},
    }  # fmt: skip
    contents: dict[str, Contents] = {f"{STATE}{_RUNNING}/{name}": running / name for name in digests}
    try:
        return {**contents, f"{STATE}state.json": record_text(record, finite=True).encode()}
    except ValueError as error:
        raise RunError(f"{running} is not published: a norm or parameter of its merge is infinite or NaN.") from error
