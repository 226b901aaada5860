"""TRL's trainers with whole checkpoints and strategy hooks.

Gradients and weights are a callback's business. The other hooks are subclasses, which a trainer gets only where a
strategy overrides the hook: plain training runs TRL's code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState

from hf_contmerge.errors import RecipeError
from hf_contmerge.models.loading import load_model
from hf_contmerge.runtime.files import sync_files
from hf_contmerge.train_strategies import Combined, Likelihoods
from hf_contmerge.training._forms import PREFERENCES, Form


class StrategySteps(TrainerCallback):
    """Calls the strategies around each step of the optimizer."""

    def __init__(self, strategies: Combined) -> None:
        self._strategies = strategies

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        with torch.no_grad():
            self._strategies.adjust_gradients(model)

    def on_train_begin(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._strategies.at_step(state.global_step, state.max_steps)

    def on_optimizer_step(self, _args: Any, state: TrainerState, *_: Any, model: Any, **__: Any) -> None:
        self._strategies.at_step(state.global_step + 1, state.max_steps)  # the trainer counts it a little later
        with torch.no_grad():
            self._strategies.adjust_weights(model)


def trainer_class(plain: type, strategies: Combined) -> type:
    """Return a trainer class with whole checkpoints and the overridden hooks.

    Raises RecipeError for strategies that cannot learn what this trainer teaches.
    """
    _refuse_pairs(plain, strategies)
    hooks = [subclass for hook, subclass in _HOOKS.items() if strategies.overriding(hook)]
    return type("StageTrainer", (*hooks, StageTrainer, plain), {"strategies": strategies})


class StageTrainer(Trainer):
    """A trainer of TRL's, with a stage's strategies."""

    strategies: ClassVar[Combined]
    model: Any
    model_wrapped: Any
    sums: Tensor | None = None
    """Losses by source since the last log (_sources.py)."""
    _has_learnt: bool = False

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Log the first step with a gradient; checkpoints keep the log."""
        if not self._has_learnt and grad_norm is not None and float(grad_norm):
            self._has_learnt = True
            if not any(entry.get("grad_norm") for entry in self.state.log_history):  # before a kill
                self.state.log_history.append({"grad_norm": float(grad_norm), "step": self.state.global_step})
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Let all ranks write their part of a checkpoint.

        Next, the main process writes trainer_state.json and deletes the checkpoint before: by then, no other rank may
        be half-way, or a kill would leave nothing to resume from. trainer_state.json vouches for the other files, so
        these are on the disk before it.
        """
        super()._save_rng_state(output_dir)
        file, state = self._state_file(output_dir), self.strategies.state()
        if state and file:
            save_file(state, file)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            sync_files(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights, and the strategies' own state."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = self._state_file(resume_from_checkpoint, reading=True)
        if file and file.exists():
            self.strategies.restore(load_file(file))

    def _state_file(self, checkpoint: str, *, reading: bool = False) -> Path | None:
        """Return this rank's file; of whole weights, one for all ranks."""
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        if self.is_fsdp_enabled:
            return Path(checkpoint) / f"strategies-{rank + 1}-of-{count}.safetensors"
        return Path(checkpoint) / "strategies.safetensors" if reading or rank == 0 else None


class AddedLoss(StageTrainer):
    """Adds the strategies' loss to the trainer's."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return found
        added = self.strategies.loss(self.accelerator.unwrap_model(model), inputs)
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


class WeightedTokens(StageTrainer):
    """Weights the tokens of SFTTrainer's loss by its fused head's log probabilities."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        def weighted(**inputs: Any) -> Any:
            output = model(**inputs)
            output.unweighted = output.log_probs  # for the losses of sources
            output.log_probs = output.log_probs * self._weights(output)
            return output

        called: Any = weighted if self.model.training else model
        return super().compute_loss(called, inputs, *args, **kwargs)

    @torch.no_grad()
    def _weights(self, output: Any) -> Tensor:
        tokens = (output.log_probs, output.entropy, output.is_top1, output.label_mask)
        return self.strategies.token_weights(*(values.detach() for values in tokens)).to(output.log_probs.dtype)


class RatedWeights(StageTrainer):
    """Gives weights their own learning rates, by groups of the optimizer."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        whole = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not whole:
            _split_groups(optimizer, self.strategies.rates(self.model if model is None else model))
        return optimizer


def _split_groups(optimizer: torch.optim.Optimizer, rates: dict[Tensor, float]) -> None:
    """Put weights with a factor into later groups; log the first's rate.

    Raises RecipeError for an optimizer that is not given the model's weights.
    """
    for group in list(optimizer.param_groups):
        weights = group["params"]
        if not all(weight in rates for weight in weights):
            raise RecipeError(
                f"train.optim: {type(optimizer).__name__} does not update the model's weights itself, so that a "
                "strategy cannot set their learning rates. Use another optimizer, such as `adamw_torch`."
            )
        group["params"] = [weight for weight in weights if rates[weight] == 1]
        for factor in sorted({rates[weight] for weight in weights} - {1.0}):
            chosen = [weight for weight in weights if rates[weight] == factor]
            optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * factor})


class GradientBefore(StageTrainer):
    """Gives strategies a step's gradient before the step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: tuple[list[Any], Any] = ([], None)
        self.add_callback(_BeforeStep(self))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._batches = super().get_batch_samples(*args, **kwargs)
        return self._batches

    def before_step(self) -> None:
        with torch.no_grad():
            self.strategies.before_step(self.model, self._accumulate)

    def _accumulate(self) -> None:
        """Leave the coming step's gradient in `.grad`, without side effects."""
        batches, items = self._batches
        metrics, tokens, sums = copy.deepcopy(self._metrics), self._total_train_tokens, self.sums
        device = self.accelerator.device
        drawn = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
        with torch.enable_grad(), drawn:
            for batch in batches[:-1]:
                with self.accelerator.no_sync(self.model_wrapped):
                    self.training_step(self.model_wrapped, batch, items)
            self.training_step(self.model_wrapped, batches[-1], items)
        self._metrics, self._total_train_tokens, self.sums = metrics, tokens, sums


class _BeforeStep(TrainerCallback):
    def __init__(self, trainer: GradientBefore) -> None:
        self._trainer = trainer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.before_step()


_HOOKS: dict[str, type[StageTrainer]] = {
    "loss": AddedLoss, "token_weights": WeightedTokens, "rate": RatedWeights, "before_step": GradientBefore,
}  # fmt: skip


def likelihoods(trainer: Any, own: Any, *, seed: int) -> Likelihoods:
    """Return a reader of log likelihoods of a stage's examples.

    Each example comes by itself through the trainer's fused head, without padding: what watches a model's inputs and
    outputs would count it. The ranks share the sample.

    Args:
        trainer: after its training.
        own: the stage's own examples, if others were mixed among them; None if it was trained on just these.
        seed: of the sample.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    accelerator = trainer.accelerator

    def draw(count: int) -> Iterator[tuple[Tensor, int]]:
        data = trainer.train_dataset if own is None else _prepared(trainer, own)
        model = accelerator.unwrap_model(trainer.model).eval()
        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=trainer.padding_free)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in order[:count][accelerator.process_index :: accelerator.num_processes]:
            inputs = trainer._prepare_inputs(collate([data[i]]))
            with trainer.compute_loss_context_manager():
                output = model(**inputs, use_cache=False, fused_lm_head=True)
            yield output.log_probs.sum(), int(output.label_mask.sum())

    return draw


def _prepared(trainer: Any, own: Any) -> Any:
    """Return examples as TRL prepares them, without others."""
    from trl.trainer.sft_trainer import SFTTrainer

    args = trainer.args
    return SFTTrainer._prepare_dataset(trainer, own, trainer.processing_class, args, args.packing, None, "train")


def _refuse_pairs(plain: type, strategies: Combined) -> None:
    from trl.trainer.sft_trainer import SFTTrainer

    names = strategies.texts_only()
    if names and not issubclass(plain, SFTTrainer):
        raise RecipeError(
            f"train.strategy: {' and '.join(names)} needs the tokens of texts, and a stage has preferences, or samples "
            "its answers. Give that stage texts or conversations, or leave the strategy out."
        )


_REFERENCE = "ref"  # TRL's name of the copy


def reference_model(form: Form, opened: Any, start: Path, base: Path, **init: Any) -> dict[str, Any]:
    """Return the trainer's reference argument; empty where none is needed.

    Args:
        form: of the examples.
        opened: what is trained.
        start: the model that the stage starts from, or an adapter of the base.
        base: the pretrained model.
        init: as `load_model` takes it.
    """
    from peft import LoraConfig, PeftModel

    if form not in PREFERENCES:
        return {}
    if isinstance(opened, PeftModel) and isinstance(opened.peft_config["default"], LoraConfig):
        return {}
    return {"ref_model": load_model(start, base, **init)}


def drop_reference(model: Any) -> None:
    """Remove TRL's reference adapter before the model is reviewed or saved."""
    if _REFERENCE in getattr(model, "peft_config", {}):
        model.delete_adapter(_REFERENCE)
