"""The base and the task files of a run, unchanged."""

from __future__ import annotations

from pathlib import Path

from hf_contmerge.errors import ModelError, RunError
from hf_contmerge.models.identity import Identity
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import FROM_BASE, ExpertPlace, MergePlace, Place
from hf_contmerge.runtime.digests import digests_below
from hf_contmerge.runtime.records import write_record


def check_same_base(run: Run, base: Path, *, whole: bool = True) -> None:
    """Raise ModelError for a base with other bytes than at the start.

    `whole`: read the weights, even if the files' times say that they are the same.
    """
    if not run.inputs.exists():
        if run.has_results():
            raise RunError(f"{run.inputs} is missing. {run.inputs_cure}")
        return
    changed = Identity.read(run.input_record()["base"]).changed(base, whole=whole)
    if changed and run.has_results():
        raise ModelError(
            f"{changed[0]} of the base {base} is not what {run.folder} was started with; its stages cannot be merged "
            "with another base. Restore the file (for a model on the Hub, name the old commit as "
            "owner/model@revision), or choose a new folder with --run."
        )


def check_start(run: Run, base: Path, t: int, kind: str) -> None:
    """Raise an error for a changed base, start model or memory."""
    check_same_base(run, base)
    if t == 1 or kind in FROM_BASE:
        return
    if kind == "previous":
        run.expert(t - 1, kind).check("train", "expert")
    else:
        run.merged_of(t - 1, kind).check("merge", "merged")
    if memory := run.memory_before(t, kind):
        ExpertPlace(memory.parent, kind).check("train", "memory")


def check_model_of(run: Run, place: Place, model: Path) -> None:
    """Raise an error for a changed model of a place."""
    if isinstance(place, ExpertPlace):
        place.check("train", "expert")
    elif isinstance(place, MergePlace):
        place.check("merge", "merged")
    else:
        check_same_base(run, model)


def keep_inputs(run: Run, base: Path) -> None:
    """Write inputs.json, once the base and the task files are in place."""
    base_now = {"name": run.recipe.base_model, **_identity(run, base).to_json()}
    write_record(run.inputs, {"folder": str(run.folder.resolve()), "base": base_now, "tasks": digests_below(run.tasks)})


def _identity(run: Run, base: Path) -> Identity:
    """Return the recorded identity while it holds: digests of weights take time."""
    if run.inputs.exists():
        recorded = Identity.read(run.input_record()["base"])
        if not recorded.changed(base, whole=False):
            return recorded
    return Identity.of(base)
