"""Where training strategies join TRL's trainers: a term of the loss, the gradients, the weights after a step.

Gradients and weights are a callback's business. TRL asks for a subclass where the loss changes, so there is one, made
only then.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from hf_contmerge.train_strategies import Combined


class StrategySteps(TrainerCallback):
    """Calls the strategies around each step of the optimizer."""

    def __init__(self, strategies: Combined) -> None:
        self._strategies = strategies

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        with torch.no_grad():
            self._strategies.adjust_gradients(model)

    def on_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        with torch.no_grad():
            self._strategies.adjust_weights(model)


def trainer_class(plain: type, strategies: Combined) -> type:
    """Return a trainer that adds the strategies' loss to its own, or the trainer itself if they have none."""
    if not strategies.has_loss():
        return plain

    class StageTrainer(plain):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            added = strategies.loss(self.accelerator.unwrap_model(model), inputs)
            if added is None or not self.model.training:
                return found
            # As the trainer's own loss: of all ranks' tokens, which DDP's mean over the ranks would divide once more.
            if num_items_in_batch is None:
                added = added / (inputs["labels"] != -100).sum().clamp(min=1)
            else:
                added = added / torch.as_tensor(num_items_in_batch).clamp(min=1)
                if self.args.average_tokens_across_devices:
                    added = added * self.accelerator.num_processes
            return (found[0] + added, *found[1:]) if return_outputs else found + added

    return StageTrainer
