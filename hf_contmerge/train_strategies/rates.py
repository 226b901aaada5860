"""Rates: learning rates by weight, such as a slow backbone, or LoRA+.

A slow backbone under a head at the full rate: SLCA, Zhang et al., ICCV 2023, arXiv 2303.05118. B of a LoRA faster than
A: LoRA+, Hayou, Ghosh and Yu, ICML 2024, arXiv 2402.12354, by `factors: {lora_B: 16}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from hf_contmerge.models.loading import plain_model
from hf_contmerge.runtime.patterns import require_quick
from hf_contmerge.train_strategies import TrainStrategy
from hf_contmerge.train_strategies._weights import trained

Factor = Annotated[float, Field(ge=0)]


@dataclass
class Rates(TrainStrategy):
    """W <- W - factor * rate * step, with the factor of the first pattern in `factors` that is in the weight's name.

    Weights without a pattern have the factor `slow`, the head 1; without `slow`, all have 1. Factor 0 freezes: such a
    weight has no gradient and no moments.
    """

    opens_on_meta = True

    factors: dict[str, Factor] | None = None
    """Regular expression -> factor; looked for in names of weights, in this order."""
    slow: Factor | None = None
    _head: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.factors and self.slow is None:
            raise ValueError("rates needs `factors` (patterns of weights' names, each with its factor) or `slow`")
        for pattern in self.factors or ():
            require_quick(pattern)

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        names = [name for name, _ in trained(model)]
        unused = next((p for p in self.factors or () if not any(re.search(p, name) for name in names)), None)
        if unused is not None:
            raise ValueError(
                f"rates' pattern {unused!r} is in no trained weight's name; the names are {', '.join(names[:3])}, ..."
            )
        if self.slow is not None:
            self._head = _own_head(model)
        return model

    def rate(self, name: str) -> float:
        found = (factor for pattern, factor in (self.factors or {}).items() if re.search(pattern, name))
        return next(found, 1.0 if self.slow is None or name in self._head else self.slow)


def _own_head(model: nn.Module) -> frozenset[str]:
    """Return the head's name. Raises ValueError for tied or frozen ones."""
    plain = plain_model(model)
    head = plain.get_output_embeddings().weight
    if head is plain.get_input_embeddings().weight:
        raise ValueError(
            "rates' `slow` trains the head at the full rate and all else slowly, and this model's head is its token "
            "embedding (tie_word_embeddings). Use `factors`, such as {layers: 0.1}"
        )
    names = frozenset(name for name, weight in trained(model) if weight is head)
    if not names:
        raise ValueError(
            "rates' `slow` trains the head at the full rate, and the head is not trained here. Use full, or `factors`"
        )
    return names
