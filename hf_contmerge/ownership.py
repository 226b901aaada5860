"""Which stage owns which share of the weights, for rules that select (magmax): by layer, as numbers and as a heat map.

The owner of an element is the stage that last changed the state's value there. An element that no stage has changed is
the base's. With experts trained one after the other, a later stage owns only what it moved further.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_contmerge.errors import RunError
from hf_contmerge.merge_state import MergeState
from hf_contmerge.model_names import layer_of, layer_order
from hf_contmerge.running_state import Running
from hf_contmerge.tensor_files import Weights

BASE = "base"
_COLUMNS_WITH_NUMBERS = 45


def ownership(base: Weights, running: Path, stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return layer -> stage -> share of the layer's weights, the base's own share included; `all` comes last.

    Weights outside the layers go by the words of their names (embed_tokens, norm).
    """
    state = Running(running)
    known, counts = state.names(), dict[str, torch.Tensor]()
    for name in base.floating():
        found = torch.zeros(len(stages) + 1, dtype=torch.int64)
        if name in known:
            found += torch.bincount(state.owners(name).reshape(-1), minlength=len(stages) + 1)
        else:
            found[0] = torch.Size(base.shape(name)).numel()
        for layer in (layer_of(name), "all"):
            counts[layer] = counts.get(layer, torch.zeros_like(found)) + found
    order = sorted(counts, key=layer_order)
    return {layer: _shares(counts[layer], stages) for layer in order}


def write_ownership(state: MergeState, out: Path) -> tuple[Path, Path]:
    """Write owners.json and owners.png; return their paths. Raises RunError if the rule selects nothing."""
    log = state.log()
    if not state.rule().selects:
        raise RunError(f"{log.rule} mixes its experts in every weight, so none has an owner. magmax and random_mix do.")
    stages = [e.stage for e in log.experts]
    shares = ownership(state.base(), state.require_running(), stages)
    out.mkdir(parents=True, exist_ok=True)
    table, picture = out / "owners.json", out / "owners.png"
    found: dict[str, Any] = {"rule": log.rule, "base": log.base, "stages": stages, "layers": shares}
    table.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw_ownership(shares, row_names(stages), picture)
    return table, picture


def row_names(stages: Sequence[str]) -> list[str]:
    """Return what owners are called: the base, then the stages, of which one may be called base too."""
    return [BASE, *(f"{stage} (stage)" if stage == BASE else stage for stage in stages)]


def draw_ownership(shares: Mapping[str, Mapping[str, float]], rows: Sequence[str], path: Path) -> None:
    """Draw the shares as a heat map: a row for each stage, a column for each layer."""
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
        if layer_order(layers[x])[0] != layer_order(layers[x - 1])[0]:  # what is no layer, and the sum, stand apart
            axes.axvline(x - 0.5, color="white", linewidth=4)
    axes.set_xlabel("layer")
    axes.set_title("Share of the weights that each stage owns, in %", loc="left")
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
