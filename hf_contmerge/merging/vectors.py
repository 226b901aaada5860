"""Checks and statistics of difference vectors (expert - minus).

An instruction vector (instruct - its base) is added to another model trained from the same base: chat vector, arXiv
2310.04799; with continual pretraining on a domain, Hirano & Imajo, arXiv 2409.19854. This is valid only between models
of one origin, whose coordinates have the same meaning. Nothing is written here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config, layer_of, layer_order, special_tokens
from hf_contmerge.models.experts import Expert, open_expert
from hf_contmerge.models.function import check_meaning
from hf_contmerge.models.layout import weights_like
from hf_contmerge.models.weights import Weights

_SAMPLED, _ELEMENTS = 24, 2**20
_UNRELATED, _FAR = 0.5, 0.9
_STOPS = ("bos_token_id", "eos_token_id")


def check_vector(base: Path, expert: Path, minus: Path) -> list[str]:
    """Check a vector's configs and tokenizers.

    The base, `expert` and `minus` have one layout.

    Returns:
        Warnings.

    Raises:
        ModelError: equal weights would have another meaning in one of the models.
    """
    for other in (expert, minus):
        check_meaning(base, other)
    stops = [(word, config(base).get(word), config(expert).get(word)) for word in _STOPS]
    return [
        f"{expert} has {word} {theirs}, {base} has {ours}; a merged model that holds the vector gets {theirs}."
        for word, ours, theirs in stops
        if ours != theirs and theirs is not None
    ]


def check_origin(base: Path, expert: Path, minus: Path) -> list[str]:
    """Check the common origin of a vector's models.

    Weight matrices of one origin are almost parallel, others orthogonal; a sample is compared.

    Returns:
        Warnings about distant models.

    Raises:
        ModelError: the models are of different origin.
    """
    warnings, weights = [], Weights(base)
    for one, other, need in ((expert, minus, "`expert` was not trained from `minus`"),
                             (minus, base, "`minus` and `base_model` are of different origin")):  # fmt: skip
        cosine = sampled_cosine(*(weights_like(weights, model) for model in (one, other)))
        measured = f"the weights of {one} and {other} have a cosine of {cosine:.3f}"
        if cosine < _UNRELATED:
            raise ModelError(
                f"{need}: {measured}, but a model trained from another has more than {_FAR}. Use the base model of "
                "the instruct model, both as `minus` and as `base_model`."
            )
        if cosine < _FAR:
            warnings.append(f"{measured}, below the usual value for one origin ({_FAR}): check the scores of the sum.")
    return warnings


def sampled_cosine(one: Weights, other: Weights) -> float:
    """Return the cosine of two models over sampled matrices."""
    matrices = [n for n in one.floating() if len(one.shape(n)) == 2]
    step = max(1, len(matrices) // _SAMPLED)
    sums = torch.zeros(3, dtype=torch.float64)
    for name in matrices[::step]:
        a, b = (w.tensor(name).reshape(-1)[:_ELEMENTS].double() for w in (one, other))
        sums += torch.stack([a @ b, a @ a, b @ b])
    return _cosine(*sums.tolist())


def vector_record(base: Path, before: Path | None, expert: Path, minus: Path) -> dict[str, Any]:
    """Return a vector's statistics for its stage's record.

    Args:
        base: the base model.
        before: the previous stage's expert, for comparison of the task vectors; None at stage 1.
        expert: the model with the vector.
        minus: the subtracted model.

    Returns:
        special_tokens: relative move of each special token's input embedding, over its length in `minus`.
        layers: per layer, cosine of the two task vectors and length ratio (this over previous); `all` last.
    """
    weights = Weights(base)
    plus, less = weights_like(weights, expert), weights_like(weights, minus)
    statistics: dict[str, Any] = {"special_tokens": special_rows(expert, plus, less)}
    if before:
        statistics["layers"] = compare_vectors(weights, open_expert(before, weights, force=True), plus, less)
    return statistics


def compare_vectors(base: Weights, before: Expert, plus: Weights, less: Weights) -> dict[str, dict[str, float]]:
    """Compare (plus - less) with a task vector.

    Returns:
        layer -> cosine and norm ratio to the task vector of `before`; `all` comes last.
    """
    sums: dict[str, Tensor] = {}
    for name in base.floating():
        tensor = base.tensor(name)
        domain = before.reader(name, tensor)(0, tensor.numel(), tensor.reshape(-1).float()).double()
        vector = (plus.tensor(name).float() - less.tensor(name).float()).reshape(-1).double()
        part = torch.stack([vector @ domain, vector @ vector, domain @ domain])
        for layer in (layer_of(name), "all"):
            sums[layer] = sums.get(layer, torch.zeros_like(part)) + part
    return {
        layer: {"cosine": _cosine(*sums[layer].tolist()), "norm_ratio": _ratio(*sums[layer].tolist()[1:])}
        for layer in sorted(sums, key=layer_order)
    }


def special_rows(expert: Path, plus: Weights, less: Weights) -> dict[str, float]:
    """Return relative moves of special tokens' embeddings.

    Each is |row of plus - row of less| / |row of less|.
    """
    tables = [n for n in plus.floating() if "embed" in n and plus.shape(n)[0] == plus.vocabulary]
    if not tables:
        return {}
    new, old = plus.tensor(tables[0]), less.tensor(tables[0])
    rows = {token: row for token, row in special_tokens(expert).items() if row < len(new)}
    return {t: _ratio(*((x[r].double() ** 2).sum() for x in (new.float() - old.float(), old))) for t, r in rows.items()}


def _cosine(dot: float, a: float, b: float) -> float:
    return dot / math.sqrt(a * b) if a and b else 0.0


def _ratio(square: Any, other: Any) -> float:
    """Return a ratio of lengths from their squares."""
    return math.sqrt(float(square) / float(other)) if other else 0.0
