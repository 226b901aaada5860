"""Is the difference of two models a vector that another can take? And how does it lie to what was learnt before it.

An instruction vector (instruct - its base) is added to a model that was trained on from the same base: chat vector,
arXiv 2310.04799; with a domain's continual pretraining, Hirano & Imajo, arXiv 2409.19854. That holds only among models
of one origin, whose coordinates mean the same. Everything here reads and tells; it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config, layer_of, layer_order, special_tokens, text_config, tokens_of
from hf_contmerge.models.experts import Expert, open_expert
from hf_contmerge.models.weights import Weights

_SAME = ("model_type", "hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Of config.json: what the same weights mean something else with."""
_SAMPLED, _ELEMENTS = 24, 2**20
_UNRELATED, _FAR = 0.5, 0.9
_STOPS = ("bos_token_id", "eos_token_id")


def check_vector(base: Path, expert: Path, minus: Path) -> list[str]:
    """Check configs and tokenizers of a vector's two models against the base, which all have one layout.

    Returns:
        Sentences on what is allowed and worth knowing.

    Raises:
        ModelError: the weights of one would mean something else in another.
    """
    for other in (expert, minus):
        for word in (*_SAME, "rope"):
            ours, theirs = _meaning(base, word), _meaning(other, word)
            if ours != theirs:
                raise ModelError(
                    f"{other} has {word} {theirs!r} in config.json, {base} has {ours!r}: the same weights mean another "
                    "function there. Give the instruct model that was trained from this base."
                )
        _check_tokens(base, other)
    stops = [(word, config(base).get(word), config(expert).get(word)) for word in _STOPS]
    return [
        f"{expert} has {word} {theirs}, {base} has {ours}; a merged model that holds the vector gets {theirs}."
        for word, ours, theirs in stops
        if ours != theirs and theirs is not None
    ]


def check_origin(base: Path, expert: Path, minus: Path) -> list[str]:
    """Compare samples of the weight matrices: models of one origin point almost the same way, others are orthogonal.

    Returns:
        Sentences on models that have gone far from each other.

    Raises:
        ModelError: one of the models is of another origin.
    """
    found = []
    for one, other, need in ((expert, minus, "`minus` is not what `expert` was trained from"),
                             (minus, base, "`minus` and `base_model` are of different origin")):  # fmt: skip
        cosine = sampled_cosine(Weights(one), Weights(other))
        measured = f"the weights of {one} and {other} have a cosine of {cosine:.3f}"
        if cosine < _UNRELATED:
            raise ModelError(
                f"{need}: {measured}, and a model trained on from another has more than {_FAR}. Give the base model "
                "from which the instruct model was made, and start the run from that same one."
            )
        if cosine < _FAR:
            found.append(f"{measured}, less than is usual for one origin ({_FAR}): look at the scores of the sum.")
    return found


def sampled_cosine(one: Weights, other: Weights) -> float:
    """Return the cosine of two models over some of their matrices, spread over all depths."""
    matrices = [n for n in one.floating() if len(one.shape(n)) == 2]
    step = max(1, len(matrices) // _SAMPLED)
    sums = torch.zeros(3, dtype=torch.float64)
    for name in matrices[::step]:
        a, b = (w.tensor(name).reshape(-1)[:_ELEMENTS].double() for w in (one, other))
        sums += torch.stack([a @ b, a @ a, b @ b])
    return _cosine(*sums.tolist())


def vector_record(base: Path, before: Path | None, expert: Path, minus: Path) -> dict[str, Any]:
    """Return what a vector stage's record tells of its vector.

    Args:
        base: the base model.
        before: the expert of the stage before, whose task vector this one is compared with; None in the first stage.
        expert: what has the vector.
        minus: what it is taken from.

    Returns:
        special_tokens: token -> how far its input embedding moved, relative to its length in `minus`.
        layers: layer -> cosine of the two task vectors, and the length of this one over that of the other; `all` last.
    """
    plus, less = Weights(expert), Weights(minus)
    found: dict[str, Any] = {"special_tokens": special_rows(expert, plus, less)}
    if before:
        weights = Weights(base)
        found["layers"] = compare_vectors(weights, open_expert(before, weights, force=True), plus, less)
    return found


def compare_vectors(base: Weights, before: Expert, plus: Weights, less: Weights) -> dict[str, dict[str, float]]:
    """Return layer -> cosine and norm ratio of (plus - less) to the task vector of `before`; `all` comes last."""
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
    """Return special token -> |row of plus - row of less| / |row of less| in the input embeddings."""
    tables = [n for n in plus.floating() if "embed" in n and plus.shape(n)[0] == plus.vocabulary]
    if not tables:
        return {}
    new, old = plus.tensor(tables[0]), less.tensor(tables[0])
    rows = {token: row for token, row in special_tokens(expert).items() if row < len(new)}
    return {t: _ratio(*((x[r].double() ** 2).sum() for x in (new.float() - old.float(), old))) for t, r in rows.items()}


def _meaning(folder: Path, word: str) -> Any:
    """Return a value of config.json that must be the same; the rotary embedding however it is spelled."""
    values: Mapping[str, Any] = config(folder)
    values = text_config(values) or values
    if word != "rope":
        return values.get(word)
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", values.get("rope_theta"))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    return theta, kind, *sorted(rope.items(), key=str)


def _check_tokens(base: Path, other: Path) -> None:
    ours, theirs = tokens_of(base), tokens_of(other)
    if ours is None or theirs is None:  # a tokenizer of another kind: its vocabulary's size is compared already
        return
    moved = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    numbers = {number: token for token, number in ours.items()}
    renamed = sorted(t for t, number in theirs.items() if t not in ours and number in numbers)
    if moved or renamed:
        token = (moved or renamed)[0]
        was = ours.get(token, numbers.get(theirs[token]))
        raise ModelError(
            f"The tokenizers of {other} and {base} differ: {token!r} is token {theirs[token]} there, and here {was!r}. "
            "The rows of the embeddings do not correspond. Give models with one tokenizer."
        )


def _cosine(dot: float, a: float, b: float) -> float:
    return dot / math.sqrt(a * b) if a and b else 0.0


def _ratio(square: Any, other: Any) -> float:
    """Return the ratio of two lengths, given their squares; 0 where the other is none."""
    return math.sqrt(float(square) / float(other)) if other else 0.0
