"""Anchor: L2 to the stage's starting weights, on chosen modules.

Smith, Tian, Halbe, Hsu and Kira, "A Closer Look at Rehearsal-Free Continual Learning", arXiv 2203.17269, who find that
holding only the attention's weights keeps most of what is known and leaves the rest free to learn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from hf_contmerge.runtime.patterns import require_quick
from hf_contmerge.train_strategies import TrainStrategy
from hf_contmerge.train_strategies._weights import Start, trained


@dataclass
class Anchor(TrainStrategy):
    """loss + strength * sum (w - w0)^2, with w0 the weights at the stage's start.

    The gradient, 2 * strength * (w - w0), is added after clipping and before the optimizer. Adam comes to rest where it
    balances the loss's, as plain gradient descent does. But Adam's steps back are about as long as the learning rate
    however strong the pull is: it keeps weights near w0, and not quite at it.
    """

    carriers = ("full",)
    opens_on_meta = True
    bytes_per_parameter: ClassVar[int] = 4  # where all weights are chosen

    strength: Annotated[float, Field(ge=0)] = 0.1
    modules: str | list[str] = r"attn\.|attention\."
    """A regular expression, or a list of parts of names: weights whose names have it are held ('.': all)."""
    _start: Start | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = self.modules if isinstance(self.modules, str) else "|".join(map(re.escape, self.modules))
        try:
            self._pattern = re.compile(parts)
        except re.error as error:
            raise ValueError(f"anchor's modules is no regular expression: {self.modules!r} ({error})") from error
        require_quick(parts)

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        self._start = Start(model, self._pattern.search)
        if not self._start.weights:
            names = ", ".join(name for name, _ in list(trained(model))[:3])
            raise ValueError(f"anchor's modules {self.modules!r} is in no weight's name; the names are {names}, ...")
        return model

    def adjust_gradients(self, model: nn.Module) -> None:
        assert self._start
        for _, weight, moved in self._start.moved(model):
            assert weight.grad is not None
            weight.grad.add_(moved, alpha=2 * self.strength)
