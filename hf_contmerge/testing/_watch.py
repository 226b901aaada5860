"""Refuses hooks with side effects on their inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor, nn

from hf_contmerge.models.weights import tensor_bytes
from hf_contmerge.train_strategies import Combined, Inputs, Likelihoods

_PROMISE = "leaves_its_inputs_alone"


class BrokenPromise(AssertionError):
    """Checks of a strategy's duties and limits."""

    def __init__(self, who: object, promise: str, fault: str) -> None:
        super().__init__(f"{who} breaks {promise}: {fault}")


@dataclass
class Watched(Combined):
    """A stage's strategies; raises BrokenPromise when a hook changes its inputs."""

    who: str = ""

    @contextmanager
    def _unchanged(self, hook: str, **inputs: Any) -> Iterator[None]:
        before = {name: _digest(value) for name, value in inputs.items()}
        yield
        for name in before:
            if _digest(inputs[name]) != before[name]:
                raise BrokenPromise(self.who, _PROMISE, f"`{hook}` changes `{name}`")

    def mix(self, fresh: Any, memory: Path | None, *, seed: int) -> Any:
        with self._unchanged("mix", fresh=fresh, memory=memory):
            return super().mix(fresh, memory, seed=seed)

    def open(self, model: Any, memory: Path | None) -> Any:
        with self._unchanged("open", memory=memory):
            return super().open(model, memory)

    def before_step(self, model: nn.Module, accumulate: Callable[[], None]) -> None:
        super().before_step(model, accumulate)
        if any(weight.grad is not None for weight in model.parameters()):
            raise BrokenPromise(self.who, _PROMISE, "`before_step` leaves gradients in the model")

    def token_weights(self, *tokens: Tensor) -> Tensor:
        names = ("log_probs", "entropy", "is_top1", "counts")
        with self._unchanged("token_weights", **dict(zip(names, tokens, strict=True))):
            return super().token_weights(*tokens)

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor | None:
        with self._unchanged("loss", model=model, inputs=inputs):
            return super().loss(model, inputs)

    def review(self, model: nn.Module, likelihoods: Likelihoods) -> None:
        with self._unchanged("review", model=model):
            super().review(model, likelihoods)

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path, *, main: bool) -> None:
        with self._unchanged("remember", model=model, data=data, memory=memory):
            super().remember(model, data, memory, out, main=main)


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    """Yield the bytes of weights, gradients, tensors, examples or files."""
    if isinstance(value, nn.Module):
        named = [*value.named_parameters(), *value.named_buffers()]
        yield from _pieces({name: [tensor, tensor.grad] for name, tensor in named})
    elif isinstance(value, Tensor):
        yield tensor_bytes(value)
    elif isinstance(value, Mapping):
        yield from _pieces([part for item in value.items() for part in item])
    elif isinstance(value, Path):
        yield from _pieces({str(p.relative_to(value)): p.read_bytes() for p in sorted(value.rglob("*")) if p.is_file()})
    elif isinstance(value, datasets.Dataset):
        yield json.dumps(value.to_list(), default=str).encode()
    elif isinstance(value, list):
        for part in value:
            yield from _pieces(part)
    else:
        yield value if isinstance(value, bytes) else repr(value).encode()
