"""Training strategies: how an expert is trained, on top of TRL's SFTTrainer; one strategy a file.

A strategy is a frozen dataclass whose fields are its parameters, as with merge rules: `train_strategies/lora.py` with a
class `Lora` is `strategy: lora` in the recipe.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainStrategy(ABC):
    """What differs from plain fine-tuning."""

    bytes_per_parameter: ClassVar[int] = 16
    """Of memory while training in float32: weights, gradients and Adam's two moments."""

    @abstractmethod
    def open(self, model: PreTrainedModel) -> Any:
        """Return what SFTTrainer trains, made from the model that the stage starts from."""

    @abstractmethod
    def close(self, model: Any) -> PreTrainedModel:
        """Return the trained model with the tensors that it started with: same names, same shapes."""


def strategy_names() -> tuple[str, ...]:
    """Return the names of all strategies, which are the names of the files in this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get_strategy(name: str, /, **parameters: Any) -> TrainStrategy:
    """Make a strategy from its name and parameters.

    Raises:
        KeyError: no such strategy.
        TypeError: a parameter that it does not have.
    """
    if name not in strategy_names():
        raise KeyError(name)
    module = importlib.import_module(f"{__name__}.{name}")
    cls = next(c for n, c in vars(module).items() if n.lower() == name.replace("_", ""))
    return cls(**parameters)
