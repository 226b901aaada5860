"""How the stages' task vectors lie to each other, and to what the merge made of them: cosines and sign conflicts.

    cosine(a, b)    = <a, b> / |a| |b|       0: nothing in common; 1: the same direction
    conflicts(a, b) = share of the elements that both change, in which they go opposite ways; 0.5 for strangers

Interference of merged models is explained by both (TIES, Yadav et al. 2023, arXiv 2306.01708, counts the signs; Ilharco
et al. 2023, arXiv 2212.04089, the cosines). They are estimated on a sample: short runs of elements, spread over each
weight in proportion to its size, the same ones in every expert and at every stage. It costs about as much per expert
whatever the size of the model, and no second pass over the weights. Models of up to 2^17 elements are read whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.adapter_files import Adapter
from hf_contmerge.experts import Expert, open_expert, task_vector
from hf_contmerge.tensor_files import Weights

_RUN = 32  # elements that lie side by side: a page of the file is read for them anyway
_ELEMENTS = 2**17  # of the whole model: a cosine of strangers has a standard error of 0.003
_SEED = 20240711


def merge_geometry(base: Path, experts: Sequence[Path], merged: Path) -> dict[str, Any]:
    """Return the geometry of a merge, given folders; an expert whose folder is gone is left out of account."""
    weights = Weights(base)
    opened = [open_expert(folder, weights, force=True) if folder.is_dir() else None for folder in experts]
    return geometry(weights, opened, Weights(merged))


def geometry(base: Weights, experts: Sequence[Expert | None], merged: Weights) -> dict[str, Any]:
    """Return how the task vectors of experts, and of the model merged from them, lie to each other.

    Args:
        base: the model from which all vectors are taken.
        experts: in stage order; None for one whose files are gone.
        merged: the model that was merged from them.

    Returns:
        sampled: the share of the floating weights that was looked at.
        lengths: of the vectors, estimated like all here; 0 for one that is gone.
        cosines, conflicts: symmetric tables over the experts in stage order and, last, the merged model; None where a
            vector is zero or gone, or where no element was changed by both. Four digits.
    """
    many = len(experts) + 1
    dots, opposed, both = (torch.zeros(many, many, dtype=torch.float64) for _ in range(3))
    seen, total, whole = 0, 0, base.numel()
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
        seen, total = seen + at.numel(), total + size
    lengths = dots.diagonal().sqrt()
    return {
        "sampled": round(seen / max(total, 1), 6),
        "lengths": [float(f"{length:.4g}") for length in lengths.tolist()],
        "cosines": _table(dots, lengths.outer(lengths)),
        "conflicts": _table(opposed, both),
    }


def _sample(size: int, model: int) -> Tensor:
    """Return positions in a weight of `size` elements: all, or runs at seeded places in equal parts of it."""
    runs = max(1, round(_ELEMENTS / _RUN * size / model))
    if model <= _ELEMENTS or runs * _RUN >= size:
        return torch.arange(size)
    draw = torch.rand(runs, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    room = size / runs - _RUN
    starts = ((torch.arange(runs, dtype=torch.float64) * (size / runs)) + draw * max(room, 0)).long()
    return (starts.unsqueeze(1) + torch.arange(_RUN)).clamp_(max=size - 1).reshape(-1)


def _vector(expert: Expert | None, name: str, base: Weights, at: Tensor, wide: Tensor) -> Tensor:
    """Return the sampled elements of an expert's task vector; zeros for an expert that is gone."""
    if expert is None:
        return torch.zeros_like(wide)
    if not isinstance(expert, Adapter):
        return expert.weights.tensor(name).reshape(-1)[at].float() - wide
    if name not in expert.names:
        return torch.zeros_like(wide)
    if factors := expert.factors(name):  # only the sampled elements of the product
        left, right = factors
        columns = right.shape[1]
        return torch.cat([(left[i // columns] * right.T[i % columns]).sum(dim=1) for i in at.split(2**14)])
    tensor = base.tensor(name)
    return task_vector(expert, name, tensor)(0, tensor.numel(), tensor.reshape(-1).float())[at]


def _table(over: Tensor, under: Tensor) -> list[list[float | None]]:
    """Return the ratios of two square tables, to four digits; None on the diagonal and where there is nothing."""
    rows = enumerate(zip(over.tolist(), under.tolist(), strict=True))
    return [
        [round(a / b, 4) + 0.0 if b and i != j else None for j, (a, b) in enumerate(zip(*pair, strict=True))]
        for i, pair in rows
    ]
