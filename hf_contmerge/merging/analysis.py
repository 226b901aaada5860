"""Cosines and sign conflicts of task vectors; ownership.

    cosine(a, b)    = <a, b> / |a| |b|       0: orthogonal; 1: the same direction
    conflicts(a, b) = share of opposite signs among the elements changed by both; 0.5 for unrelated vectors

Both explain interference of merged models (signs: TIES, Yadav et al. 2023, arXiv 2306.01708; cosines: Ilharco et al.
2023, arXiv 2212.04089). They are estimated on a sample: short runs of elements, spread over each weight in proportion
to its size, equal for all experts and stages. The cost per expert hardly depends on the model's size. Models of up to
2^17 elements are read in full.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.errors import RunError
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.config import layer_of, layer_order
from hf_contmerge.models.experts import Expert, open_expert
from hf_contmerge.models.weights import Weights

_RUN = 32  # adjacent elements: reading one loads its page anyway
_ELEMENTS = 2**17  # of the whole model: the cosine of unrelated vectors has a standard error of 0.003
_SEED = 20240711


def merge_geometry(base: Path, experts: Sequence[Path], merged: Path) -> dict[str, Any]:
    """Return the geometry of a merge from folders. Missing experts are skipped."""
    weights = Weights(base)
    opened = [open_expert(folder, weights, force=True) if folder.is_dir() else None for folder in experts]
    return geometry(weights, opened, Weights(merged))


def geometry(base: Weights, experts: Sequence[Expert | None], merged: Weights) -> dict[str, Any]:
    """Compare task vectors of experts and their merge.

    Args:
        base: the common base model.
        experts: experts in stage order; None for a missing one.
        merged: the merged model.

    Returns:
        sampled: share of the floating weights in the sample.
        lengths: estimated lengths of the vectors; 0 for a missing one.
        cosines, conflicts: symmetric tables over the experts in stage order and, last, the merged model. Four digits;
            None for a zero or missing vector, or if no element was changed by both.
    """
    many = len(experts) + 1
    dots, opposed, both = (torch.zeros(many, many, dtype=torch.float64) for _ in range(3))
    sampled, total, whole = 0, 0, base.numel()
    for name in base.floating():
        size = math.prod(base.shape(name))
        if not size:
            continue
        at = _sample(size, whole)
        wide = base.tensor(name).reshape(-1)[at].float()
        vectors = [_vector(expert, name, base, at, wide) for expert in experts]
        stacked = torch.stack([*vectors, merged.tensor(name).reshape(-1)[at].float() - wide]).double()
        signs, each_stands_for = stacked.sign(), size / at.numel()
        changed = signs.abs()
        dots += each_stands_for * (stacked @ stacked.T)
        both += each_stands_for * (changed @ changed.T)
        opposed += each_stands_for * (changed @ changed.T - signs @ signs.T) / 2
        sampled, total = sampled + at.numel(), total + size
    lengths = dots.diagonal().sqrt()
    return {
        "sampled": round(sampled / max(total, 1), 6),
        "lengths": [float(f"{length:.4g}") for length in lengths.tolist()],
        "cosines": _table(dots, lengths.outer(lengths)),
        "conflicts": _table(opposed, both),
    }


def _sample(size: int, model: int) -> Tensor:
    """Return seeded positions in a weight; all if small."""
    runs = max(1, round(_ELEMENTS / _RUN * size / model))
    if model <= _ELEMENTS or runs * _RUN >= size:
        return torch.arange(size)
    draw = torch.rand(runs, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    room = size / runs - _RUN
    starts = ((torch.arange(runs, dtype=torch.float64) * (size / runs)) + draw * max(room, 0)).long()
    return (starts.unsqueeze(1) + torch.arange(_RUN)).clamp_(max=size - 1).reshape(-1)


def _vector(expert: Expert | None, name: str, base: Weights, at: Tensor, wide: Tensor) -> Tensor:
    """Return a task vector's sample; zeros if missing."""
    if expert is None:
        return torch.zeros_like(wide)
    if (stored := expert.values(name)) is not None:
        return stored.reshape(-1)[at].float() - wide
    if expert.rank(name) == 0:
        return torch.zeros_like(wide)
    if factors := expert.factors(name):  # computes only the sampled elements of the product
        left, right = factors
        columns = right.shape[1]
        return torch.cat([(left[i // columns] * right.T[i % columns]).sum(dim=1) for i in at.split(2**14)])
    tensor = base.tensor(name)
    return expert.reader(name, tensor)(0, tensor.numel(), tensor.reshape(-1).float())[at]


def _table(over: Tensor, under: Tensor) -> list[list[float | None]]:
    """Return rounded ratios; None on the diagonal."""
    rows = enumerate(zip(over.tolist(), under.tolist(), strict=True))
    return [
        [round(a / b, 4) + 0.0 if b and i != j else None for j, (a, b) in enumerate(zip(*pair, strict=True))]
        for i, pair in rows
    ]


BASE = "base"


_COLUMNS_WITH_NUMBERS = 45


def ownership(base: Weights, running: Path, stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return each stage's share of each layer's weights.

    The base's share is included, and the layer `all` comes last. Weights outside the layers are grouped by the words of
    their names (embed_tokens, norm).
    """
    state = Running(running)
    changed, counts = state.names(), dict[str, torch.Tensor]()
    for name in base.floating():
        owned = torch.zeros(len(stages) + 1, dtype=torch.int64)
        if name in changed:
            owned += torch.bincount(state.owners(name).reshape(-1), minlength=len(stages) + 1)
        else:
            owned[0] = torch.Size(base.shape(name)).numel()
        for layer in (layer_of(name), "all"):
            counts[layer] = counts.get(layer, torch.zeros_like(owned)) + owned
    order = sorted(counts, key=layer_order)
    return {layer: _shares(counts[layer], stages) for layer in order}


def write_ownership(state: MergeState, out: Path) -> tuple[Path, Path]:
    """Write owners.json and owners.png; return their paths.

    Raises:
        RunError: the rule does not select weights.
    """
    log = state.log()
    if not state.rule().selects:
        raise RunError(
            f"{log.rule} mixes experts in every weight, so no weight has an owner. Use magmax or random_mix."
        )
    stages = [e.stage for e in log.experts]
    shares = ownership(state.base(), state.require_running(), stages)
    out.mkdir(parents=True, exist_ok=True)
    table, picture = out / "owners.json", out / "owners.png"
    values: dict[str, Any] = {"rule": log.rule, "base": log.base, "stages": stages, "layers": shares}
    table.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    draw_ownership(shares, row_names(stages), picture)
    return table, picture


def row_names(stages: Sequence[str]) -> list[str]:
    """Return owner names, unique also for a stage `base`."""
    return [BASE, *(f"{stage} (stage)" if stage == BASE else stage for stage in stages)]


def draw_ownership(shares: Mapping[str, Mapping[str, float]], rows: Sequence[str], path: Path) -> None:
    """Draw a heat map of shares by stage and layer."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # names may hold $
        _draw(shares, rows, path)


def _draw(shares: Mapping[str, Mapping[str, float]], rows: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure

    layers, few = list(shares), len(shares) <= _COLUMNS_WITH_NUMBERS
    values = [[shares[layer][row] for layer in layers] for row in rows]
    width, height = len(layers) * (0.42 if few else 0.22), len(rows) * (0.45 if few else 0.3)
    figure = Figure(figsize=(max(6.0, width + 3), height + 1.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=max(map(max, values)), aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(layers)), [layer.removeprefix("layer ") for layer in layers])
    for label in axes.get_xticklabels():
        if not few:
            label.set(rotation=90, fontsize=7)
        elif not label.get_text().isdigit():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    for x in range(1, len(layers)):
        if layer_order(layers[x])[0] != layer_order(layers[x - 1])[0]:  # separates layers, other weights and the sum
            axes.axvline(x - 0.5, color="white", linewidth=4)
    axes.set_xlabel("layer")
    axes.set_title("Share of weights owned by each stage, in %", loc="left")
    if few:
        _write_numbers(axes, image, values)
    figure.colorbar(image, ax=axes, format=lambda share, _: f"{100 * share:.0f} %", pad=0.02)
    figure.savefig(path, dpi=150)


def _write_numbers(axes: Any, image: Any, values: Sequence[Sequence[float]]) -> None:
    for y, line in enumerate(values):
        for x, share in enumerate(line):
            red, green, blue, _ = image.to_rgba(share)
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.45
            color = "white" if dark else "black"
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=color)


def _shares(counts: torch.Tensor, stages: Sequence[str]) -> dict[str, float]:
    total = max(1, int(counts.sum()))
    return {name: int(count) / total for name, count in zip(row_names(stages), counts, strict=True)}
