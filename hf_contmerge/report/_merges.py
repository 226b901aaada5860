"""The merges by their records: geometry, ownership, vectors of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_contmerge.errors import size
from hf_contmerge.models.survival import Survival
from hf_contmerge.report._tables import Cell, Section, Table
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import one_a_stage
from hf_contmerge.run.recipe.schema import Merge

_MERGED = "merged: "


def geometry_section(run: Run) -> Section:
    """Return sections on geometry and ownership of the stages' vectors."""
    tables: list[Table] = []
    groups: dict[str, list[tuple[Merge, int, dict[str, Any]]]] = {}
    for entry in run.recipe.merge:
        if (t := run.last_merged(entry)) and (record := run.merged(t, entry).record("merge")).get("geometry"):
            groups.setdefault(record["start_from"], []).append((entry, t, record))
    sampled = {f"{100 * r['geometry']['sampled']:.2g} %" for group in groups.values() for _, _, r in group}
    for kind, group in groups.items():
        tables += _angles(run, kind, group)
    tables += ownership_tables(run) + vectors(run)
    if not groups:
        return Section("Geometry of the merges", tables=tables)
    intro = (
        "A task vector is an expert's weights minus the base's. Cosine: 0 for unrelated vectors, near 1 for the same "
        "direction, as between experts trained in sequence, each of which contains the earlier ones. Opposite signs: "
        "share of the elements changed by both vectors that they move in opposite directions; 50 % for unrelated "
        f"vectors. Both were measured on {' or '.join(sorted(sampled))} of the weights, evenly spread; lengths of "
        "experts are exact."
    )
    return Section("Geometry of the merges", intro, tables=tables)


def storage_section(run: Run) -> Section:
    """Return the section on the survival of updates."""
    merges = [[Cell(name), *_kept_cells(survival)] for name, survival in stored(run).items()]
    intro = (
        "The merged weights are computed in float32 and stored in the dtype of the recipe. Kept: the share of the "
        "update (merged minus base) that is left in the file. Error: the length of what rounding changed, over the "
        "update's length; stochastic rounding adds noise whose mean is 0."
    )
    header = ("kept", "dtype", "rounding", "error", "weights", "tensors below 90 %")
    tables = [Table("", ("merge", *header), merges)] if merges else []
    if experts := _rounded_experts(run):
        tables.append(Table("Experts trained or stored in 16 bits", ("expert", "trained in", *header), experts))
    return Section("What the files keep", intro, tables=tables)


def _kept_cells(survival: Survival) -> list[Cell]:
    lost = ", ".join(f"{tensor} {100 * share:.0f} %" for tensor, share in survival.worst)
    kept = Cell(f"{100 * survival.survival:.1f} %", shade=-1.0 if survival.lossy else 0.0)
    cells = [survival.dtype, survival.rounding, f"{survival.error:.2g}", size(survival.nbytes), lost or "none"]
    return [kept, *map(Cell, cells)]


def _rounded_experts(run: Run) -> list[list[Cell]]:
    """Return a row per expert with lost precision, in training or file."""
    rows = []
    for t, place in run.places():
        record = place.record("train") if place.is_done("train") else {}
        name, trained = f"{run.stage(t).name} ({place.folder.name})", record.get("trained_in", "float32")
        if "stored" in record:
            rows.append([Cell(name), Cell(trained), *_kept_cells(Survival.read(record["stored"]))])
        elif trained in ("bfloat16", "float16"):
            why = "each step rounds to the nearest value, so what the update would have been is unknown"
            rows.append([Cell(name), Cell(trained), Cell("unknown", why, shade=-1.0), Cell(trained), *[Cell()] * 4])
    return rows


def stored(run: Run) -> dict[str, Survival]:
    """Return the survival of each entry's last model, where measured."""
    records = {
        entry.name: run.merged(t, entry).record("merge").get("stored")
        for entry in run.recipe.merge
        if (t := run.last_merged(entry))
    }
    return {name: Survival.read(record) for name, record in records.items() if record}


def _angles(run: Run, kind: str, group: Sequence[tuple[Merge, int, Mapping[str, Any]]]) -> list[Table]:
    """Return tables of cosines and opposite signs per kind of expert."""
    _, far, fullest = max(group, key=lambda merged: len(_compared(run, merged[1], merged[2])))
    names, numbers = _compared(run, far, fullest), _numbers(run, far, fullest)
    tables = []
    for what, key in (("Cosines", "cosines"), ("Opposite signs", "conflicts")):
        rows = [
            [Cell(n), _length(fullest, numbers[i] - 1), *(_angle(v, key) for v in fullest["geometry"][key][i][:-1])]
            for i, n in enumerate(names)
        ]
        for entry, t, record in group:
            last = dict(zip(_compared(run, t, record), record["geometry"][key][-1], strict=False))
            rows.append(
                [Cell(_MERGED + entry.name), _merged_length(record), *(_angle(last.get(n), key) for n in names)]
            )
        title = f"{what}, experts from {'the stage before' if kind == 'previous' else kind}"
        tables.append(Table(title, ("vector", "length", *names), rows, judged=False))
    return tables


def _folded(run: Run, t: int, record: Mapping[str, Any]) -> list[str]:
    """Return the stages in a merge: all, unless a guard dropped some."""
    folded = record.get("folded", one_a_stage(t))
    return [run.stage(part["stage"]).name + _instead(part) for part in folded]


def _instead(part: Mapping[str, Any]) -> str:
    """Return a guard's replacement of a stage's expert."""
    if part.get("earlier"):
        return f" (at step {part['earlier']})"
    return " (again, with replay)" if part["replayed"] else ""


def _numbers(run: Run, t: int, record: Mapping[str, Any]) -> Sequence[int]:
    """Return the numbers of the compared experts, from 1."""
    return record["geometry"].get("compared") or range(1, len(_folded(run, t, record)) + 1)


def _compared(run: Run, t: int, record: Mapping[str, Any]) -> list[str]:
    folded = _folded(run, t, record)
    return [folded[number - 1] for number in _numbers(run, t, record)]


def _length(record: Mapping[str, Any], i: int) -> Cell:
    return Cell(f"{record['norms']['experts'][i]:.3g}")


def _merged_length(record: Mapping[str, Any]) -> Cell:
    return Cell(f"{record['geometry']['lengths'][-1]:.3g}", "estimated on the same sample")


def _angle(value: float | None, key: str) -> Cell:
    if value is None:
        return Cell()
    if key == "cosines":
        return Cell(f"{value:+.2f}".replace("-", "−"), shade=value)
    return Cell(f"{100 * value:.0f} %", shade=max(-1.0, min(1.0, 1 - 2 * value)))


def ownership_tables(run: Run) -> list[Table]:
    """Return each stage's share of each layer, for selecting rules."""
    tables = []
    for entry in run.recipe.merge:
        t = run.last_merged(entry)
        layers: dict[str, dict[str, float]] = run.merged(t, entry).record("merge").get("ownership", {}) if t else {}
        if layers:
            owners = list(next(iter(layers.values())))
            shares = {owner: [layer[owner] for layer in layers.values()] for owner in owners}
            rows = [[Cell(owner), *(Cell(f"{100 * x:.0f}", shade=x) for x in shares[owner])] for owner in owners]
            header = ("owner", *(layer.removeprefix("layer ") for layer in layers))
            title = f"{entry.name}: weights of each layer by the stage that owns them, in %"
            tables.append(Table(title, header, rows, judged=False))
    return tables


def vectors(run: Run) -> list[Table]:
    """Return each given vector's relation to earlier learning."""
    tables = []
    for t, place in run.places():
        facts = place.record("train").get("vector", {}) if place.is_done("train") else {}
        if "layers" in facts:
            rows = [
                [Cell(layer), Cell(f"{x['cosine']:+.3f}".replace("-", "−")), Cell(f"{x['norm_ratio']:.3g}")]
                for layer, x in facts["layers"].items()
            ]
            against = f"cosine with {run.stage(t - 1).name}"
            title = f"Vector {run.stage(t).name} ({place.folder.name})"
            tables.append(Table(title, ("layer", against, "ratio of lengths"), rows))
        if facts.get("special_tokens"):
            moved = [[Cell(token), Cell(f"{100 * x:.1f} %")] for token, x in facts["special_tokens"].items()]
            title = f"Special tokens of {run.stage(t).name} ({place.folder.name})"
            tables.append(Table(title, ("token", "change of its embedding"), moved))
    return tables
