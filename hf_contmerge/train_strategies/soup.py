"""Soup: the expert is an average of the stage's steps.

Weights from a wished decay: WSM, Tian et al., ICLR 2026, arXiv 2507.17634. Averages of the last weights: Izmailov et
al., UAI 2018, arXiv 1803.05407. Exponential averages: Morales-Brotons et al., TMLR 2024, arXiv 2411.18704. Pull to the
start: SFA, arXiv 2501.05559.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_contmerge.train_strategies import TrainStrategy
from hf_contmerge.train_strategies._weights import laid_out_like, trained

Decay = Literal["inverse_sqrt", "linear", "cosine"]

_DECAYS: Mapping[Decay, Callable[[float], float]] = {
    "inverse_sqrt": lambda done: 1 - math.sqrt(done),
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Share of the window that is done -> the wished factor on the learning rate."""
_WINDOW = 0.5


@dataclass
class Soup(TrainStrategy):
    """W = sum_j c_j W_j / sum_j c_j, over the weights W_j after every `every`-th step.

    One of three ways to set c. `decay` with `window`: c_j = w_j - w_(j+1), so that step i counts w_i = sum_(j>=i) c_j,
    as if the learning rate had fallen by w over the last `window` of the stage; train with a constant rate then.
    `beta`: c_j = beta^(k-j). `last`: c_j = 1 for the last so many. Default: decay inverse_sqrt. Of a LoRA, its factors
    are averaged. With `pull`, W <- (1 - pull) W + pull W_start after every `pull_every`-th step.

    The average is one float32 copy in the CPU's memory; it replaces the weights when the stage's last step is taken.
    """

    turn: ClassVar[int] = 2
    bytes_per_parameter: ClassVar[int] = 4  # where all weights are trained; as many again with `pull`

    bytes_in_checkpoints: ClassVar[int] = 4

    decay: Decay | None = None
    window: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the stage's steps over which the rate would fall; 0.5 if nothing is said."""
    beta: Annotated[float, Field(ge=0, lt=1)] | None = None
    last: Annotated[int, Field(ge=1)] | None = None
    every: Annotated[int, Field(ge=1)] = 1
    """Steps from one of the averaged weights to the next, counted back from the last step."""
    pull: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pull_every: Annotated[int, Field(ge=1)] = 50
    _mean: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _sum: float = field(default=0.0, init=False, repr=False)
    """Of the c_j so far."""
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        ways = [word for word in ("decay", "beta", "last") if getattr(self, word) is not None]
        if len(ways) > 1:
            raise ValueError(f"soup has {' and '.join(ways)}, which set the same weights; keep one of them")
        if self.window is not None and ways not in ([], ["decay"]):
            raise ValueError(f"soup's window is for `decay`, and it has {ways[0]}; remove one of them")

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        if self.pull:
            self._start = {name: weight.detach().clone() for name, weight in trained(model)}
        return model

    def adjust_weights(self, model: nn.Module) -> None:
        if self.pull and self.step % self.pull_every == 0:
            for name, weight in trained(model):
                start = self._start[name] = laid_out_like(weight, self._start[name])
                _local(weight).lerp_(_local(start).to(weight.dtype), self.pull)
        left = self.steps - self.step
        share = self._coefficient(left // self.every) if left % self.every == 0 else 0.0
        if share:
            self._sum = share + self._sum * (self.beta if self.beta is not None else 1.0)
            for name, weight in trained(model):
                now = _float32(weight)
                before = self._mean.get(name)
                self._mean[name] = now if before is None else before.lerp_(now, share / self._sum)

    def _coefficient(self, later: int) -> float:
        """Return the c of weights, by the number of later ones."""
        if self.beta is not None:
            return 1.0
        if self.last is not None:
            return float(later < self.last)
        count = max(1, round((self.window or _WINDOW) * self.steps / self.every))
        if later >= count:
            return 0.0
        factor, place = _DECAYS[self.decay or "inverse_sqrt"], count - later
        return factor((place - 1) / count) - factor(place / count)

    def state(self) -> dict[str, Tensor]:
        return {**self._mean, _SUM: torch.tensor([self._sum], dtype=torch.float64)} if self._mean else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._mean = {name: tensor for name, tensor in state.items() if name != _SUM}
        self._sum = float(state[_SUM])

    def finish(self, model: nn.Module) -> None:
        for name, weight in trained(model):
            if name in self._mean:
                _local(weight).copy_(self._mean[name])


_SUM = "sum"


def _local(weight: Tensor) -> Tensor:
    """Return a weight's data on this rank."""
    return weight.to_local().detach() if isinstance(weight, DTensor) else weight.detach()


def _float32(weight: Tensor) -> Tensor:
    """Return a copy of this rank's part in float32, on the CPU."""
    return _local(weight).to("cpu", torch.float32, copy=True)
