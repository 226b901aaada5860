"""Differences between two recipes, with the first phase affected.

Pure additions are not differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_contmerge.run.recipe.phases import Phase, use_of
from hf_contmerge.run.recipe.schema import Recipe

_NOT_SET = "(not set)"


@dataclass(frozen=True)
class FieldChange:
    """A field with different values in two recipes."""

    field: str
    """Dotted path; stages by number (their order counts), merge entries and tasks by name."""
    old: Any
    new: Any
    phase: Phase
    """The first phase that uses the field."""

    @property
    def merge_entry(self) -> str | None:
        parts = self.field.split(".")
        return parts[1] if parts[0] == "merge" else None

    @property
    def stage(self) -> int | None:
        parts = self.field.split(".")
        return int(parts[1]) if parts[0] == "stages" else None


def changes(old: Recipe, new: Recipe) -> Iterator[FieldChange]:
    """Yield the changed fields of some phase.

    Added stages, merge entries and tasks are left out.
    """
    if old.tunes != new.tunes:  # the measured documents differ
        parts = {False: "all", True: "all but the validation documents"}
        yield FieldChange("documents measured (guard, auto)", parts[old.tunes], parts[new.tunes], "score")
    before, after = (dict(flat_fields(_without_plain_weights(r, old))) for r in (old, new))
    if not (old.tunes and new.tunes):
        after["evaluate.validation"] = before["evaluate.validation"]  # ignored unless both use it
    added = {_piece(f) for f in after} - {_piece(f) for f in before}
    for field in before | after:
        use = use_of(field)
        phase = use.phase if use.undoes else None
        if phase and before.get(field) != after.get(field) and _piece(field) not in added:
            yield FieldChange(field, before.get(field, _NOT_SET), after.get(field, _NOT_SET), phase)


def _without_plain_weights(recipe: Recipe, old: Recipe) -> dict[str, Any]:
    """Return a dumped recipe without weights of no effect.

    These are weights of 1, and of added stages.
    """
    merged = {stage.name for stage in old.stages}
    dumped = recipe.model_dump(mode="json")
    for entry in dumped["merge"]:
        entry["weights"] = {n: w for n, w in entry["weights"].items() if w != 1.0 and n in merged}
    return dumped


def flat_fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of each leaf of a dumped recipe.

    Merge entries and tasks by name, other parts by number.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat_fields(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and all(isinstance(v, dict) and {"name", "share"} & v.keys() for v in value):
        for number, item in enumerate(value, 1):
            key = str(number) if path == "stages" or path.endswith(".mix") else item["name"]
            yield from flat_fields(item, f"{path}.{key}")
    else:
        yield path, value


def _piece(field: str) -> str:
    """Return a field's unit of addition: stage, merge entry, task, else itself."""
    parts = field.split(".")
    if parts[0] in ("stages", "merge") and len(parts) > 1:
        return ".".join(parts[:4] if "tasks" in parts else parts[:2])
    return ".".join(parts[:3]) if parts[:2] == ["evaluate", "general_tasks"] else field
