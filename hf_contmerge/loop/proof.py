"""Proof of a merge: its parents, merged again, give the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_contmerge.errors import DamageError, ModelError
from hf_contmerge.merging.lineage import LINEAGE, check_parents, merge_again, read_lineage
from hf_contmerge.models.folder import check_hub_id, resolve_model
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.plugins import require_same
from hf_contmerge.runtime.records import Record


@dataclass(frozen=True)
class WrittenModel:
    """A model with its parents."""

    folder: Path
    from_hub: bool
    lineage: Record | None
    """None for a model that was trained, or written as an adapter."""


def find_model(name: str) -> WrittenModel:
    """Find a model folder, or fetch it from the Hub."""
    from_hub = not Path(name).is_dir()
    folder = resolve_model(name) if from_hub else Path(name)
    lineage = read_lineage(folder) if (folder / LINEAGE).is_file() else None
    return WrittenModel(folder, from_hub, lineage if lineage and "factor" in lineage else None)


def prove(model: WrittenModel, given: Mapping[str, str]) -> Iterator[str]:
    """Merge a model's parents again; compare the weights, tensor by tensor.

    `given`: `base` or name of a stage -> model to read in place of the recorded one.

    Raises:
        DamageError: the weights differ.
        ModelError: a parent cannot be found, or has changed.
    """
    lineage = model.lineage
    assert lineage
    require_same(lineage["versions"], model.folder, cure=", or verify the files alone with --files-only")
    base = _parent(model, "base", lineage["base"], given, adapters=False)
    experts = [_parent(model, e["stage"], e["model"], given, adapters=True) for e in lineage["experts"]]
    check_parents(lineage, base, experts)
    yield f"Parents as recorded: {', '.join([lineage['base'], *(e['model'] for e in lineage['experts'])])}."
    with tempfile.TemporaryDirectory() as scratch:
        again = merge_again(lineage, base, experts, Path(scratch), Crew())
    if again != weights_sha256(model.folder):
        made = lineage["versions"].get("torch", "unknown")
        raise DamageError(
            f"{model.folder} is not what its parents give: merged again by {lineage['rule']}, they have other weights. "
            f"It was changed after the merge, or merged by other versions (torch {made})."
        )
    yield f"Merged again by {lineage['rule']}: the same weights, SHA-256 {again}."


def _parent(model: WrittenModel, name: str, recorded: str, given: Mapping[str, str], *, adapters: bool) -> Path:
    """Find a parent. A lineage from the Hub names Hub models only."""
    try:
        if name not in given and model.from_hub:
            check_hub_id(recorded)
            if Path(recorded).exists():
                raise ModelError(f"{recorded} is a folder here.")
        return resolve_model(given.get(name, recorded), adapters=adapters)
    except ModelError as error:
        raise ModelError(
            f"The merge cannot be made again without {recorded}, the parent {name}: {error} Name it with "
            f"--parent {name}=MODEL, or verify the files alone with --files-only."
        ) from error
