"""One stage of fine-tuning: a model folder and a dataset in, a model folder out, by TRL's SFTTrainer; resumable."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    set_seed,
)

from hf_contmerge.corpus import StageData, require_chat_template
from hf_contmerge.errors import RecipeError, ResourceError, size, unknown
from hf_contmerge.model_folder import bf16_pays, copy_companions, cpu_only
from hf_contmerge.recipe import Train
from hf_contmerge.stage_trainer import StrategySteps, trainer_class
from hf_contmerge.tensor_files import Weights
from hf_contmerge.train_strategies import Combined, combine, strategy_names

LOG = logging.getLogger(__name__)

_OURS = {"output_dir": "the run folder", "seed": "`seed` of the recipe", "resume_from_checkpoint": "the run folder"}


def finetune_stage(
    *,
    start: Path,
    base: Path,
    data: StageData,
    train: Train,
    seed: int,
    out: Path,
    checkpoints: Path,
    memory: Path | None = None,
    memory_out: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Train one expert. All ranks call this together; the main one writes.

    Args:
        start: the model to start from.
        base: the pretrained model; its config and tokenizer go with the expert.
        data: what to train on.
        train: strategy and SFTConfig fields.
        seed: of the data order and dropout.
        out: an empty folder for the expert, written by the main process.
        checkpoints: where half-trained states lie; training goes on from the newest whole one.
        memory: what the strategies remembered of earlier stages, if there are any.
        memory_out: where they write what later stages need, a folder that is not there yet; or None, to keep nothing.
        trust_remote_code: let the model run code of its own.

    Returns:
        What the record should tell: the training loss, steps and tokens.
    """
    from trl.trainer.sft_trainer import SFTTrainer

    strategies = make_strategies(train)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    settings = sft_settings(train, data, tokenizer, numel=Weights(start).numel())
    init = {"dtype": torch.float32, **(settings.pop("model_init_kwargs", None) or {})}
    model = AutoModelForCausalLM.from_pretrained(start, trust_remote_code=trust_remote_code, **init)
    set_seed(seed)  # before the strategy draws what it adds; the trainer sets it only later
    trainer = trainer_class(SFTTrainer, strategies)(
        model=_open(strategies, model, memory, train),
        args=_sft_config(**settings, output_dir=str(checkpoints), seed=seed),
        train_dataset=strategies.mix(data.train, memory, seed=seed),
        processing_class=tokenizer,
        callbacks=[StrategySteps(strategies)],
    )
    _check_ranks(trainer, strategies)
    _train_on(trainer, _newest_checkpoint(checkpoints))
    if memory_out:
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        strategies.remember(unwrapped, data.train, memory, memory_out, main=trainer.accelerator.is_main_process)
    _save_expert(trainer, strategies, base, out)
    log = trainer.state.log_history
    # The closing summary's mean is of this process's steps only, so it counts only where nothing was logged before.
    losses = [e["loss"] for e in log if "loss" in e] or [e["train_loss"] for e in log if "train_loss" in e]
    record = {
        "loss": losses[-1] if losses else None,
        "steps": trainer.state.global_step,
        "examples": len(data.train),
        "tokens": trainer.state.num_input_tokens_seen or None,
        "log": log,
    }
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return record


def make_strategies(train: Train) -> Combined:
    """Return the strategies that the recipe names. Raises RecipeError for an unknown name, parameter or union."""
    for name in train.strategy:
        if name not in strategy_names():
            raise RecipeError(unknown("strategy", name, strategy_names(), where="train"))
    try:
        return combine(train.strategy, train.parameters_of())
    except (TypeError, ValueError) as error:
        raise _bad_parameters(train, error) from error


def _open(strategies: Combined, model: PreTrainedModel, memory: Path | None, train: Train) -> Any:
    try:
        return strategies.open(model, memory)
    except (ValueError, NotImplementedError) as error:  # what peft says of values that do not fit this model
        raise _bad_parameters(train, error) from error


def _bad_parameters(train: Train, error: Exception) -> RecipeError:
    return RecipeError(f"train.parameters: {error} (strategy {' + '.join(train.strategy)})")


def _check_ranks(trainer: Any, strategies: Combined) -> None:
    """Raise RecipeError where the launcher shares out the weights and a strategy needs them whole."""
    names = strategies.not_sharded()
    if trainer.is_fsdp_enabled and names:
        raise RecipeError(
            f"train.strategy: {' and '.join(names)} cannot work where the weights are shared out among ranks (FSDP). "
            "Use another strategy, or DDP."
        )
    others = [name for name in strategies.parts if not strategies.parts[name].carrier and name != "replay"]
    if trainer.is_deepspeed_enabled and others:
        raise RecipeError(
            f"train.strategy: {' and '.join(others)} cannot work under DeepSpeed, which keeps gradients and weights to "
            "itself. Use FSDP2 or DDP."
        )


def check_training(train: Train, start: Path) -> None:
    """Raise before any work is spent: unknown fields (RecipeError), or too little memory (ResourceError)."""
    strategies = make_strategies(train)
    known = {f.name: f.default for f in dataclasses.fields(_config_class())}
    for field, value in train.sft_fields.items():
        if field in _OURS:
            raise RecipeError(f"train.{field} is set by {_OURS[field]}; remove it from `train`.")
        if field not in known:
            raise RecipeError(unknown("field", field, [*known, "strategy", "parameters"], where="train"))
        if type(known[field]) in (int, float) and isinstance(value, str):
            raise RecipeError(f"train.{field} must be a number; got {value!r}.")
    try:
        _sft_config(**{**_defaults(numel=0), **train.sft_fields}, output_dir="unused")
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train: {error}") from error
    need = Weights(start).numel() * strategies.bytes_per_parameter
    have = (
        torch.cuda.mem_get_info()[1] * torch.cuda.device_count()
        if torch.cuda.is_available()
        else psutil.virtual_memory().total
    )
    if need > have:
        raise ResourceError(
            f"Training {start} with strategy {' + '.join(train.strategy)} needs about {size(need)} and this "
            f"machine has {size(have)}. Use `strategy: lora`, a smaller model, or more GPUs."
        )


def sft_settings(train: Train, data: StageData, tokenizer: PreTrainedTokenizerBase, *, numel: int) -> dict[str, Any]:
    """Return the SFTConfig fields of a stage: our defaults for the form of its data, then what the recipe sets."""
    form: dict[str, Any] = {}
    if data.form == "text":  # pretraining: one stream, cut into blocks
        form = {"packing": True, "packing_strategy": "wrapped"}
    if data.form == "messages":
        form = {"assistant_only_loss": _marks_assistant(tokenizer)}
    return {**_defaults(numel=numel), **form, **train.sft_fields}


def _defaults(*, numel: int) -> dict[str, Any]:
    return {
        "use_cpu": cpu_only(),
        "bf16": bf16_pays(numel),
        "report_to": "none",
        "save_total_limit": 1,
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": 5,
        "disable_tqdm": True,  # plain lines, which a log can hold
    }


def _config_class() -> type:
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig


def _sft_config(**fields: Any) -> Any:
    return _config_class()(**fields)


def _marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the loss can be kept to the assistant's turns: the chat template marks them, or TRL knows how to."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    require_chat_template(tokenizer)
    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        LOG.warning(
            "The chat template of %s does not mark the assistant's turns ({%% generation %%}), so the loss covers "
            "whole conversations", tokenizer.name_or_path,
        )  # fmt: skip
        return False
    return True


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end: trainer_state.json comes last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def _train_on(trainer: Any, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint if there is one.

    After a kill between the last checkpoint and the record nothing is left to train; Trainer would do one step more.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if state and state.global_step >= state.max_steps and not trainer.is_fsdp_enabled:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _save_expert(trainer: Any, strategies: Combined, base: Path, out: Path) -> None:
    accelerator = trainer.accelerator
    model = strategies.close(accelerator.unwrap_model(trainer.model))
    state = (
        accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else None
    )
    if accelerator.is_main_process:
        model.save_pretrained(out, state_dict=state)
        copy_companions(base, out, dtype=model.dtype)
    accelerator.wait_for_everyone()
