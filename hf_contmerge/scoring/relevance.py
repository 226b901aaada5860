"""Helpful and harmful experts for texts, before a merge.

    relevance        cos(-g, v)        g: gradient of the mean token loss of a text at the merged model
    gain of a step   -a <g, v>         v: the expert's task vector, a: the step, in the limit of small ones
    curvature        c = 2 (loss(w + a v) - loss(w) - a <g, v>) / a^2, with one more forward pass at w + a v
    gain at 1        -<g, v> - c / 2

The choice of FW-Merging (arXiv 2503.12649) for a pool, and of CUBER (arXiv 2211.00789) for layers. At the steps of a
merge curvature decides and the sign of the first order can be wrong: rank and explain with it, never accept or refuse.

One text is one batch and one backward pass. Each gradient is reduced to products as soon as it is known, against task
vectors read from the disk: memory holds one model, one tensor's gradient and the activations between layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_contmerge.errors import DataError
from hf_contmerge.merging.mixing import MergedWeights
from hf_contmerge.models.experts import Expert
from hf_contmerge.models.filling import HeldTensor, whole_tensors
from hf_contmerge.models.loading import keep_activations, recompute_activations
from hf_contmerge.models.memory import Part
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.scores import Sample
from hf_contmerge.scoring.forgetting.paired import Change, paired_change

GROUPS = ("attention", "mlp", "embeddings", "other")
_KINDS = (
    ("other", re.compile(r"norm|ln_\d|ln_f|layernorm", re.IGNORECASE)),
    ("embeddings", re.compile(r"embed|wte|wpe|lm_head|shared\.weight")),
    ("attention", re.compile(r"attn|attention|[qkvo]_proj|mixer|mamba|linear_attn")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|experts|fc_?[12]|gate|up_proj|down_proj|dense")),
)


def group_of(name: str) -> str:
    """Return a weight's group by its name: attention, mlp, embeddings, other."""
    return next((group for group, pattern in _KINDS if pattern.search(name)), "other")


@dataclass(frozen=True)
class Direction:
    """An expert's change of the weights, tensor by tensor."""

    name: str
    expert: Expert
    base: Weights
    start: Expert | None = None
    """The model that it was trained from, if not the base."""

    def vector(self, name: str) -> Tensor:
        """Return the change of a weight, in float32 and its shape."""
        stored = self.base.tensor(name)
        wide = stored.float().reshape(-1)
        change = self.expert.reader(name, stored)(0, wide.numel(), wide)
        if self.start:
            change = change - self.start.reader(name, stored)(0, wide.numel(), wide)
        return change.reshape(stored.shape)

    def products(self, part: Part, gradient: Tensor) -> tuple[float, float]:
        """Return <gradient, change> and |change|^2 of a part of a weight.

        Low-rank factors are not multiplied out.
        """
        factors = None if self.start else self.expert.factors(part.stored)
        if factors and gradient.ndim == 2 and part.covers(self.base.shape(part.stored)):
            left, right = (factor.to(gradient.device).double() for factor in factors)
            dot = ((left.T @ gradient.double()) * right).sum()
            return float(dot), float(((left.T @ left) * (right @ right.T)).sum())
        if self.expert.rank(part.stored) == 0 and not self.start:
            return 0.0, 0.0
        change = self.vector(part.stored)[part.source].to(gradient.device)
        return float((gradient.double() * change).sum()), float(torch.linalg.vector_norm(change.double()) ** 2)


@dataclass
class Products:
    """Sums over a group of weights, for one text."""

    dots: list[float]
    """<g, v> of each direction."""
    squares: list[float]
    """|v|^2 of each direction."""
    gradient: float = 0.0
    """|g|^2."""

    def add(self, other: Products) -> None:
        self.dots = [a + b for a, b in zip(self.dots, other.dots, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]
        self.gradient += other.gradient

    def cosine(self, place: int) -> float | None:
        """Return cos(-g, v) of a direction; None for zeros."""
        length = math.sqrt(self.squares[place] * self.gradient)
        return -self.dots[place] / length if length else None


@dataclass(frozen=True)
class Text:
    """Documents that stand for something to learn or to keep."""

    name: str
    rows: Sequence[Sequence[int]]
    """Tokens of each document."""


@dataclass(frozen=True)
class Effect:
    """The effect of a step along an expert on a text."""

    relevance: float | None
    """None for an expert that changes nothing."""
    slope: float
    """Gain of a step of 1, by the gradient alone, in nats per token."""
    step: float
    real: Change
    """Measured gain of the step, paired by document."""
    groups: Mapping[str, float | None]
    """Relevance within a group of weights."""

    @property
    def predicted(self) -> float:
        """Gain of the step by the gradient alone."""
        return self.step * self.slope

    @property
    def whole(self) -> float:
        """Gain of a step of 1, with the measured curvature."""
        curvature = 2 * (self.predicted - self.real.mean) / self.step**2
        return self.slope - curvature / 2

    @property
    def verdict(self) -> str:
        if self.relevance is None:
            return "says nothing"
        return ("no change seen", "helps", "hurts")[self.real.sign]

    def to_json(self) -> dict[str, Any]:
        real = self.real
        return {
            "relevance": self.relevance, "predicted": self.predicted, "real": real.mean, "low": real.low,
            "high": real.high, "at_1": self.whole, "groups": dict(self.groups), "verdict": self.verdict,
        }  # fmt: skip


@dataclass
class Ranking:
    """A merged model in memory, to look at experts from."""

    model: Any
    merged: MergedWeights
    tensors: Sequence[HeldTensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = whole_tensors(self.model, self.merged.base)
        self._names = set(self.merged.base.floating())
        self._fill(self.merged.tensor)

    def effects(self, directions: Sequence[Direction], texts: Sequence[Text], step: float) -> list[dict[str, Effect]]:
        """Return each direction's effects by text."""
        self._fill(self.merged.tensor)
        products = [self._products(text, directions) for text in texts]
        before = [self._losses(text) for text in texts]
        found: list[dict[str, Effect]] = []
        for place, direction in enumerate(directions):
            self._fill(lambda name, of=direction: self.merged.tensor(name) + step * of.vector(name))
            after = [self._losses(text) for text in texts]
            found.append({
                text.name: effect(parts, place, step, paired_change(new, old))
                for text, parts, new, old in zip(texts, products, after, before, strict=True)
            })  # fmt: skip
        self._fill(self.merged.tensor)
        return found

    def _fill(self, read: Callable[[str], Tensor]) -> None:
        for each in self.tensors:
            each.fill(read, self._names)

    @torch.no_grad()
    def _losses(self, text: Text) -> Sample:
        """Return each document's log likelihood and its number of predicted tokens."""
        losses, counts = _document_losses(self.model, _batch(text))
        return Sample(tuple((-losses).tolist()), tuple(counts.tolist()))

    def _products(self, text: Text, directions: Sequence[Direction]) -> dict[str, Products]:
        def loss() -> Tensor:
            losses, counts = _document_losses(self.model, _batch(text))
            return losses.sum() / counts.sum()

        return reduced(self.model, self.tensors, directions, loss)


def reduced(
    model: Any, tensors: Sequence[HeldTensor], directions: Sequence[Direction], loss: Callable[[], Tensor]
) -> dict[str, Products]:
    """Multiply a loss's gradient with directions, by group of weights.

    One backward pass; no gradient is kept.
    """
    zeros = [0.0] * len(directions)
    sums = {group: Products(zeros, zeros) for group in GROUPS}
    known = {id(each.tensor): each for each in tensors}

    def reduce(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for part in known[id(parameter)].held.parts:
            own = gradient[part.place]
            own = own.mT if part.swapped else own
            pairs = [direction.products(part, own) for direction in directions]
            square = float(torch.linalg.vector_norm(own.double()) ** 2)
            sums[group_of(part.stored)].add(Products([p[0] for p in pairs], [p[1] for p in pairs], square))

    with _watched(model, known, reduce), torch.enable_grad():
        loss().backward()
    return sums


def effect(parts: Mapping[str, Products], place: int, step: float, real: Change) -> Effect:
    """Return a direction's effect from its products and measured gain."""
    zeros = [0.0] * len(next(iter(parts.values())).dots)
    whole = Products(zeros, zeros)
    for each in parts.values():
        whole.add(each)
    groups = {name: each.cosine(place) for name, each in parts.items() if each.squares[place]}
    return Effect(whole.cosine(place), -whole.dots[place], step, real, groups)


@contextmanager
def _watched(model: Any, known: Mapping[int, HeldTensor], reduce: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Pass on each parameter's gradient once finished; recompute layers."""
    hooks, before = [], [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in known)
        if id(parameter) in known:
            hooks.append(parameter.register_post_accumulate_grad_hook(reduce))
    model.eval()
    layers = _recomputed(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        if layers:
            keep_activations(model)
        for hook in hooks:
            hook.remove()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _recomputed(model: Any) -> list[nn.Module]:
    """Let layers keep their inputs only; return them.

    A layer recomputes in training mode only. Its parts stay in evaluation mode, without dropout.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        return []
    recompute_activations(model)
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m is not model]
    for layer in layers:
        layer.training = True
    return layers


def _batch(text: Text) -> Tensor:
    """Return (documents, tokens), padded by -1 on the right."""
    longest = max(map(len, text.rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in text.rows])


def _document_losses(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return each document's summed loss and its number of predicted tokens."""
    batch = batch.to(model.device)
    there = batch >= 0
    logits = model(input_ids=batch.clamp(min=0), attention_mask=there.long(), use_cache=False).logits[:, :-1]
    labels = torch.where(there, batch, -100)[:, 1:]
    losses = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return losses.sum(1), (labels >= 0).sum(1)


def ranked(effects: Sequence[Mapping[str, Effect]], text: str) -> list[int]:
    """Return the places of experts, the most relevant for a text first.

    Lengths of task vectors do not matter.
    """
    return sorted(range(len(effects)), key=lambda i: -(effects[i][text].relevance or 0.0))


def readable(name: str, rows: Sequence[Sequence[int]]) -> Text:
    """Return a text of tokenized documents. Raises DataError if empty."""
    usable = [row for row in rows if len(row) > 1]
    if not usable:
        raise DataError(f"{name} has no document with two tokens: there is nothing to predict. Give longer documents.")
    return Text(name, usable)
