"""Where we join TRL's trainers: checkpoints that are whole, and for training strategies a term of the loss, the
gradients, the weights, a look back.

Gradients and weights are a callback's business. TRL asks for a subclass where the loss changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_contmerge.errors import RecipeError
from hf_contmerge.models.loading import load_model
from hf_contmerge.runtime.progress import StepProgress
from hf_contmerge.train_strategies import Combined, Likelihoods
from hf_contmerge.training._forms import Form


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


_REFERENCE = "ref"  # TRL's name of the copy


def reference_model(form: Form, opened: Any, start: Path, base: Path, **init: Any) -> dict[str, Any]:
    """Return the argument of the trainer that says what the reference is, or none where none is needed.

    Args:
        form: of the examples.
        opened: what is trained.
        start: the model that the stage starts from, or an adapter of the base.
        base: the pretrained model.
        init: as `load_model` takes it.
    """
    from peft import LoraConfig, PeftModel

    if form != "preference":
        return {}
    if isinstance(opened, PeftModel) and isinstance(opened.peft_config["default"], LoraConfig):
        return {}
    return {"ref_model": load_model(start, base, **init)}


def drop_reference(model: Any) -> None:
    """Remove the adapter that TRL has added to be the reference, before the model is looked at or saved."""
    if _REFERENCE in getattr(model, "peft_config", {}):
        model.delete_adapter(_REFERENCE)


Point = Mapping[str, float]


OnLog = Callable[[int, Point], None]
"""Called on the main process with the number of steps taken in this stage, and what was logged at that step."""

_OF_THE_PROCESS = ("num_tokens", "train_loss")  # counted since it started, which a resumed run did later
_OF_THE_MACHINE = ("runtime", "per_second")


def curve(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a trainer's log without what an unbroken and a resumed run do not have in common."""
    points = ({k: v for k, v in entry.items() if not _differs(k)} for entry in log)
    return [point for point in points if any("loss" in key for key in point)]


def _differs(key: str) -> bool:
    return key in _OF_THE_PROCESS or key.endswith(_OF_THE_MACHINE)


class TrainingLog(TrainerCallback):
    """Passes on what is logged, and sees to it that a resumed run logs the same.

    A mean over the steps since the last log cannot be taken up in the middle, so a step with a checkpoint is logged
    too; and the last one, so that there is always a loss to record.
    """

    def __init__(self, on_log: OnLog, *, last_checkpoint: bool) -> None:
        """`last_checkpoint`: whether to write one after the last step, from which only saving would be left."""
        self._on_log, self._last_checkpoint = on_log, last_checkpoint
        self._progress: StepProgress | None = None

    def on_train_begin(self, _args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._progress = StepProgress(state.max_steps, state.global_step, state.num_input_tokens_seen)

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if last and not self._last_checkpoint:
            control.should_save = False
        if control.should_save or last:
            control.should_log = True
        if self._progress:
            self._progress.step(state.global_step)

    def on_epoch_end(self, _args: Any, _state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save:
            control.should_log = True

    def on_log(
        self, _args: Any, state: TrainerState, _control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not self._progress or not logs or "loss" not in logs:
            return
        self._progress.tell(state.global_step, float(logs["loss"]), state.num_input_tokens_seen)
        numbers = {k: float(v) for k, v in logs.items() if isinstance(v, int | float) and k not in _OF_THE_PROCESS}
        self._on_log(state.global_step, numbers)

    def on_train_end(self, _args: Any, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._progress:
            self._progress.close()
            self._progress = None
