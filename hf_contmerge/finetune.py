"""One stage of fine-tuning: a model folder and a dataset in, a model folder out, by TRL's trainers; resumable."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerState,
    set_seed,
)

from hf_contmerge.corpus import StageData, require_chat_template
from hf_contmerge.corpus_forms import Form
from hf_contmerge.errors import RecipeError, ResourceError, size, unknown
from hf_contmerge.loaded_model import load_model
from hf_contmerge.model_folder import bf16_pays, copy_companions, cpu_only
from hf_contmerge.places import remove
from hf_contmerge.preference import config_fields, drop_reference, reference_model, trl_classes
from hf_contmerge.recipe import Recipe, Train
from hf_contmerge.stage_trainer import StrategySteps, likelihoods, trainer_class
from hf_contmerge.tensor_files import Weights
from hf_contmerge.train_strategies import Combined, combine, strategy_names
from hf_contmerge.training_log import OnLog, TrainingLog, curve

LOG = logging.getLogger(__name__)

_OURS = {"output_dir": "the run folder", "seed": "`seed` of the recipe", "resume_from_checkpoint": "the run folder"}
_SFT_LOSSES = ("nll", "dft", "chunked_nll")  # values of `loss_type` that SFTTrainer has, and DPOTrainer has not


def train_expert(
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
    on_log: OnLog = lambda _step, _point: None,
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
        on_log: what else to do with each point of the loss curve.

    Returns:
        What the record should tell: the training loss, steps and tokens.
    """
    strategies = make_strategies(train)
    trainer_type, config_type = trl_classes(data.form)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    settings = sft_settings(train, data, tokenizer, numel=Weights(base).numel())
    init = {"dtype": torch.float32, **(settings.pop("model_init_kwargs", None) or {})}
    init = {**init, "trust_remote_code": trust_remote_code}
    model = load_model(start, base, as_adapter=strategies.carrier.keeps_adapter(), **init)
    set_seed(seed)  # before the strategy draws what it adds; the trainer sets it only later
    opened = _open(strategies, model, memory, train)
    trainer = trainer_class(trainer_type, strategies)(
        model=opened,
        args=config_type(**settings, output_dir=str(checkpoints), seed=seed),
        train_dataset=strategies.mix(data.train, memory, seed=seed),
        processing_class=tokenizer,
        callbacks=[StrategySteps(strategies)],
        **reference_model(data.form, opened, start, base, **init),
    )
    share_out_on_processors(trainer)
    _check_ranks(trainer, strategies)
    _tell(trainer, on_log)
    _train_on(trainer, _newest_checkpoint(checkpoints))
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    drop_reference(unwrapped)
    if memory_out:
        strategies.review(unwrapped, likelihoods(trainer, seed=seed))
        strategies.remember(unwrapped, data.train, memory, memory_out, main=trainer.accelerator.is_main_process)
    _save_expert(trainer, strategies, base, out)
    record = _record(trainer, data)
    del trainer, model, opened, unwrapped
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return record


def _record(trainer: Any, data: StageData) -> dict[str, Any]:
    """Return what the stage's record keeps of a training that is over."""
    history = trainer.state.log_history
    log = curve(history)
    losses = [e["loss"] for e in log if "loss" in e]
    return {
        "loss": losses[-1] if losses else None,
        "steps": trainer.state.global_step,
        "examples": len(data.train),
        "tokens": trainer.state.num_input_tokens_seen or None,
        "log": log,
        "train_seconds": history[-1].get("train_runtime") if history else None,
    }


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


def share_out_on_processors(trainer: Any) -> None:
    """Let FSDP do on processors what it does on GPUs, where accelerate (1.15) takes no notice of it."""
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True


def _check_ranks(trainer: Any, strategies: Combined) -> None:
    """Raise RecipeError where the launcher shares out the weights and a strategy needs them whole."""
    names = strategies.not_sharded()
    if trainer.is_fsdp_enabled and names:
        raise RecipeError(
            f"train.strategy: {' and '.join(names)} cannot work where the weights are shared out among ranks (FSDP). "
            "Use another strategy, or DDP."
        )
    others = [name for name in strategies.parts if name not in ("full", "lora", "replay")]
    if trainer.is_deepspeed_enabled and others:
        raise RecipeError(
            f"train.strategy: {' and '.join(others)} cannot work under DeepSpeed, which keeps gradients and weights to "
            "itself. Use FSDP2 or DDP."
        )


def check_training(train: Train, start: Path) -> None:
    """Raise before any work is spent: unknown fields (RecipeError), or too little memory (ResourceError)."""
    strategies = make_strategies(train)
    known = {**config_fields("preference"), **config_fields("text")}
    _check_fields(train.sft_fields, known, "train", others=("strategy", "parameters"))
    _check_values(train, "text", "train")
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


def check_stages(recipe: Recipe, data: Mapping[str, StageData]) -> None:
    """Raise RecipeError for settings that do not fit the form of a stage's examples, or that no stage uses."""
    forms: dict[str, Form] = {stage.name: data[stage.name].form for stage in recipe.stages if stage.dataset}
    used = {name: value for form in forms.values() for name, value in config_fields(form).items()}
    if not used:
        return
    if "preference" not in forms.values():
        _check_fields(recipe.train.sft_fields, used, "train", others=("strategy", "parameters"))
    for stage in recipe.stages:
        if stage.dataset:
            form, train = forms[stage.name], recipe.train_of(stage)
            where = f"train of stage {stage.name}"
            if form == "preference" and stage.train.get("loss_type") in _SFT_LOSSES:
                raise RecipeError(f"{where}: loss_type {stage.train['loss_type']} is for texts, not pairs.")
            _check_fields(stage.train, config_fields(form), where)
            _check_values(train, form, where)
            trainer_class(trl_classes(form)[0], make_strategies(train))


def _check_fields(
    fields: Mapping[str, Any], known: Mapping[str, Any], where: str, *, others: Sequence[str] = ()
) -> None:
    for field, value in fields.items():
        if field in _OURS:
            raise RecipeError(f"{where}.{field} is set by {_OURS[field]}; remove it from `train`.")
        if field not in known:
            raise RecipeError(unknown("field", field, [*known, *others], where=where))
        if type(known[field]) in (int, float) and isinstance(value, str):
            raise RecipeError(f"{where}.{field} must be a number; got {value!r}.")


def _check_values(train: Train, form: Form, where: str) -> None:
    try:
        trl_classes(form)[1](**{**_defaults(numel=0), **_fields_for(form, train)}, output_dir="unused")
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _fields_for(form: Form, train: Train) -> dict[str, Any]:
    """Return those of a stage's fields that its trainer knows: `packing` means nothing to pairs, `beta` to texts."""
    fields = {field: value for field, value in train.sft_fields.items() if field in config_fields(form)}
    if form == "preference" and fields.get("loss_type") in _SFT_LOSSES:  # said to the run, and meant for its texts
        del fields["loss_type"]
    return fields


def sft_settings(train: Train, data: StageData, tokenizer: PreTrainedTokenizerBase, *, numel: int) -> dict[str, Any]:
    """Return the fields of a stage's config, SFTConfig or DPOConfig: our defaults for its form, then the recipe's."""
    form: dict[str, Any] = {}
    if data.form == "text":  # pretraining: one stream, cut into blocks
        form = {"packing": True, "packing_strategy": "wrapped"}
    if data.form == "messages":
        form = {"assistant_only_loss": _marks_assistant(tokenizer)}
    # Trackers are the run's; the trainer would start a run of theirs with every stage.
    return {**_defaults(numel=numel), **form, **_fields_for(data.form, train), "report_to": "none"}


def _defaults(*, numel: int) -> dict[str, Any]:
    return {
        "use_cpu": cpu_only(),
        "bf16": bf16_pays(numel),
        "save_total_limit": 1,
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": 5,
        "disable_tqdm": True,  # plain lines, which a log can hold
    }


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
    """Return the newest checkpoint that was written to its end: trainer_state.json comes last, after all ranks."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def _tell(trainer: Any, on_log: OnLog) -> None:
    """Have our own lines, bar and trackers in place of the trainer's."""
    trainer.remove_callback(PrinterCallback)
    # Weights that are shared out can be loaded only in training, which would do a step more than the last.
    trainer.add_callback(TrainingLog(on_log, last_checkpoint=not trainer.is_fsdp_enabled))


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
    model, main = strategies.close(accelerator.unwrap_model(trainer.model)), accelerator.is_main_process
    state = None
    if trainer.is_fsdp_enabled:
        state = whole_state(model, keep=main)
    elif trainer.is_deepspeed_enabled:
        state = accelerator.get_state_dict(trainer.model)  # gathers
    if main:
        model.save_pretrained(out, state_dict=state)
        if strategies.carrier.keeps_adapter():
            remove(out / "README.md")  # peft's, with nothing filled in
        else:
            copy_companions(base, out, dtype=model.dtype)
    accelerator.wait_for_everyone()


def whole_state(model: Any, *, keep: bool) -> dict[str, Tensor]:
    """Return the weights of a model that is shared out (FSDP2), on the processor; all ranks call this together.

    `keep`: whether this rank wants them. Tied weights stay one tensor, so that they are saved once.
    """
    whole: dict[int, Tensor] = {}
    state = {}
    for name, part in model.state_dict().items():
        key = (part.to_local() if isinstance(part, DTensor) else part).data_ptr() or id(part)
        if key not in whole:
            value = part.full_tensor() if isinstance(part, DTensor) else part
            whole[key] = value.cpu() if keep else value.new_empty(0)
        state[name] = whole[key]
    return state if keep else {}
