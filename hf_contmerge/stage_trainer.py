"""Where we join TRL's trainers: checkpoints that are whole, and for training strategies a term of the loss, the
gradients, the weights, a look back.

Gradients and weights are a callback's business. TRL asks for a subclass where the loss changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_contmerge.errors import RecipeError
from hf_contmerge.train_strategies import Combined, Likelihoods


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
    """Return a trainer that adds the strategies' loss to its own, and whose checkpoints are whole.

    Raises RecipeError for strategies that cannot learn what this trainer teaches.
    """
    _refuse_pairs(plain, strategies)

    class StageTrainer(plain):
        def _save_rng_state(self, output_dir: str) -> None:
            """Let all ranks write their part of a checkpoint.

            Next, the main process writes trainer_state.json and deletes the checkpoint before: by then, no other rank
            may be half-way, or a kill would leave nothing to resume from.
            """
            super()._save_rng_state(output_dir)
            self.accelerator.wait_for_everyone()

    if not strategies.has_loss():
        return StageTrainer

    class StrategyTrainer(StageTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if not self.model.training:
                return found
            added = strategies.loss(self.accelerator.unwrap_model(model), inputs)
            if added is None:
                return found
            # As the trainer's own loss: of all ranks' tokens, which DDP's mean over the ranks would divide once more.
            if num_items_in_batch is None:
                added = added / (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
            else:
                added = added / torch.as_tensor(num_items_in_batch).clamp(min=1)
                if self.args.average_tokens_across_devices:
                    added = added * self.accelerator.num_processes
            return (found[0] + added, *found[1:]) if return_outputs else found + added

    return StrategyTrainer


def likelihoods(trainer: Any, *, seed: int) -> Likelihoods:
    """Return what gives a strategy the log likelihoods of a sample of the examples that a trainer has trained on.

    Each example comes by itself, through the trainer's collator and its fused head. The ranks share the sample.
    """
    accelerator, data = trainer.accelerator, trainer.train_dataset

    def draw(count: int) -> Iterator[tuple[Tensor, int]]:
        model = accelerator.unwrap_model(trainer.model).eval()
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in order[:count][accelerator.process_index :: accelerator.num_processes]:
            inputs = trainer._prepare_inputs(trainer.data_collator([data[i]]))
            with trainer.compute_loss_context_manager():
                output = model(**inputs, use_cache=False, fused_lm_head=True)
            yield output.log_probs.sum(), int(output.label_mask.sum())

    return draw


def _refuse_pairs(plain: type, strategies: Combined) -> None:
    from trl.trainer.sft_trainer import SFTTrainer

    names = strategies.texts_only()
    if names and not issubclass(plain, SFTTrainer):
        raise RecipeError(
            f"train.strategy: {' and '.join(names)} needs the tokens of texts, and a stage has preference pairs. Give "
            "that stage texts or conversations, or leave the strategy out."
        )
