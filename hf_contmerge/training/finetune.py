"""One stage of fine-tuning by TRL's trainers; resumable."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import PreTrainedModel, PrinterCallback, TrainerState, set_seed

from hf_contmerge.errors import ContmergeError, DataError, RecipeError
from hf_contmerge.models.loading import load_model
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.device import free_memory
from hf_contmerge.runtime.launching import launcher_uses
from hf_contmerge.runtime.stopping import stop_after_checkpoint
from hf_contmerge.train_strategies import Combined
from hf_contmerge.train_strategies.replay import without_source
from hf_contmerge.training._checkpoints import kept_checkpoints, kept_step, newest_checkpoint
from hf_contmerge.training._forms import PREFERENCES, SAMPLED, Form
from hf_contmerge.training._log import KeepEarlier, OnLog, TrainingLog, curve
from hf_contmerge.training._mixing import mixed, mixed_record, source_names
from hf_contmerge.training._noise import without_foreign_noise
from hf_contmerge.training._sources import with_sources
from hf_contmerge.training._trainer import (
    StrategySteps,
    drop_reference,
    likelihoods,
    reference_model,
    trainer_class,
)
from hf_contmerge.training.head import check_head
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.sampling import loading_by, reward_functions, sampled_rows, with_sampling
from hf_contmerge.training.saving import save_expert
from hf_contmerge.training.settings import bad_parameters, config_of, sft_settings, trl_classes
from hf_contmerge.training.statistics import Measured, measure_expert, write_adam
from hf_contmerge.training.tokenizer import stage_change, stage_tokenizer

LOG = logging.getLogger(__name__)

_ROWS = 64
"""Of a trainer that loads a checkpoint and trains nothing."""


@without_foreign_noise()
def train_expert(
    job: TrainJob,
    out: Path,
    *,
    checkpoints: Path,
    memory_out: Path | None = None,
    earlier: Path | None = None,
    on_log: OnLog = lambda _step, _point: None,
) -> dict[str, Any]:
    """Train one expert. All ranks call this together; the main one writes.

    Args:
        job: what to train, on what.
        out: an empty folder for the expert.
        checkpoints: holds half-trained states; training resumes from the newest whole one.
        memory_out: a new folder for what the strategies of later stages need; None keeps nothing.
        earlier: a folder for the checkpoints that the job keeps.
        on_log: gets each point of the loss curve.

    Returns:
        For the record: the training loss, steps, tokens and the curve.
    """
    strategies = job.make(job.train)
    examples = mixed(job, strategies)
    trainer = _make_trainer(job, strategies, examples, checkpoints)
    dropped = _dropped(trainer, len(examples))
    share_out_on_processors(trainer)
    check_head(trainer)
    if earlier and job.keep and _can_keep(trainer):
        trainer.add_callback(KeepEarlier(earlier, job.keep))
    _tell(trainer, on_log)
    _train_on(trainer, newest_checkpoint(checkpoints))
    _check_steps(trainer)
    _check_gradients(trainer, strategies, job.data.form)
    strategies.finish(trainer.accelerator.unwrap_model(trainer.model))
    _remember(trainer, strategies, job, memory_out)
    change = stage_change(job.base, job.train, trust_remote_code=job.trust_remote_code)
    of_adam = job.train.statistics is not None and "adam" in job.train.statistics.kinds
    if of_adam:
        _load_optimizer(trainer, checkpoints)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    precision = save_expert(trainer, strategies, job.base, out, change)
    if of_adam:
        write_adam(trainer, trained, out, Weights(job.base))
    record = {**_record(trainer, job, examples), **dropped, **precision}
    del trainer, trained
    free_memory()
    _measure(job, out)
    return record


def _measure(job: TrainJob, out: Path) -> None:
    """Write the statistics that a job asks for."""
    if job.train.statistics:
        measure_expert(Measured(out, job.base, job.data, job.train.statistics, job.trust_remote_code))


@without_foreign_noise()
def expert_at_checkpoint(job: TrainJob, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write the expert of an earlier step; all ranks call this together.

    Args:
        job: of the whole training.
        checkpoint: a folder that it kept.
        out: an empty folder for the expert.

    Returns:
        For the record: dtypes, the step.
    """
    strategies = job.make(job.train)
    strategies.begin(job.stage, job.base)
    some = job.data.train.select(range(min(len(job.data.train), _ROWS)))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _make_trainer(job, strategies, some, Path(scratch))
        trainer._load_from_checkpoint(str(checkpoint))
        model = trainer.accelerator.unwrap_model(trainer.model)
        strategies.finish(model)
        drop_reference(model)
        change = stage_change(job.base, job.train, trust_remote_code=job.trust_remote_code)
        precision = save_expert(trainer, strategies, job.base, out, change)
    del trainer, model
    free_memory()
    _measure(job, out)
    return {"steps": kept_step(checkpoint), **precision}


def earlier_experts(folder: Path) -> list[int]:
    """Return the steps of undamaged checkpoints, the latest first."""
    return [kept_step(path) for path in kept_checkpoints(folder)]


def _can_keep(trainer: Any) -> bool:
    """Say if checkpoints hold whole weights; warn otherwise."""
    shared = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if shared:
        LOG.warning("guard.ladder: `earlier` keeps no checkpoints under FSDP or DeepSpeed; the rung is left out.")
    return not shared


def _dropped(trainer: Any, given: int) -> dict[str, int]:
    """Return the number of examples dropped by TRL for their length."""
    count = 0 if getattr(trainer.args, "packing", False) else given - len(trainer.train_dataset)
    if not count:
        return {}
    longest = trainer.args.max_length
    LOG.warning("%d of %d examples have no token to learn from within `max_length` (%s)", count, given, longest)
    return {"dropped": count}


def _make_trainer(job: TrainJob, strategies: Combined, examples: Any, checkpoints: Path) -> Any:
    """Load and open the model; return TRL's trainer of it."""
    trainer_type, sources = trl_classes(job.data.form)[0], source_names(examples)
    if len(sources) > 1 and job.data.form not in PREFERENCES | SAMPLED:
        trainer_type = with_sources(trainer_type, sources)
    else:
        examples = without_source(examples)
    tokenizer = stage_tokenizer(job.base, job.train, trust_remote_code=job.trust_remote_code)
    settings = sft_settings(job.train, job.data, tokenizer, numel=Weights(job.base).numel(), strategies=strategies)
    init = {"dtype": torch.float32, **(settings.pop("model_init_kwargs", None) or {})}
    init = {**init, "trust_remote_code": job.trust_remote_code}
    model = load_model(job.start, job.base, as_adapter=strategies.carrier.keeps_adapter(), **init)
    set_seed(job.seed)  # before the strategy draws what it adds; the trainer sets it only later
    opened = _open(strategies, model, job.memory, job.train)
    config = config_of(job.data.form, {**settings, "output_dir": str(checkpoints), "seed": job.seed}, "train")
    given = reference_model(job.data.form, opened, job.start, job.base, **init)
    if job.data.form in SAMPLED:
        trainer_type, examples = with_sampling(trainer_type), sampled_rows(examples, job.data.form)
        given = {"reward_funcs": reward_functions(job.train)} if job.data.form == "prompts" else {}
    try:
        with loading_by(trainer_type, partial(load_model, job.start, job.base, **init)):
            return trainer_class(trainer_type, strategies)(
                model=opened,
                args=config,
                train_dataset=examples,
                processing_class=tokenizer,
                callbacks=[StrategySteps(strategies)],
                **given,
            )
    except ContmergeError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, NotImplementedError) as error:  # TRL's checks of settings
        raise RecipeError(f"train cannot be followed: {error}") from error


def _remember(trainer: Any, strategies: Combined, job: TrainJob, out: Path | None) -> None:
    """Let strategies write their memory; drop DPO's reference copy."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    drop_reference(model)
    if out:
        own = job.data.train if strategies.overriding("mix") else None
        strategies.review(model, likelihoods(trainer, own, seed=job.seed))
        strategies.remember(model, job.data.train, job.memory, out, main=trainer.accelerator.is_main_process)


def _record(trainer: Any, job: TrainJob, examples: Any) -> dict[str, Any]:
    """Return a finished training's part of the record."""
    history = trainer.state.log_history
    log = curve(history)
    losses = [e["loss"] for e in log if "loss" in e]
    return {
        "loss": losses[-1] if losses else None,
        "steps": trainer.state.global_step,
        "examples": len(job.data.train),
        **mixed_record(job, examples, log),
        "tokens": trainer.state.num_input_tokens_seen or None,
        "log": log,
        "train_seconds": history[-1].get("train_runtime") if history else None,
    }


def _open(strategies: Combined, model: PreTrainedModel, memory: Path | None, train: Train) -> Any:
    try:
        return strategies.open(model, memory)
    except (ValueError, NotImplementedError) as error:  # what peft says of values that do not fit this model
        raise bad_parameters(train, error) from error


def share_out_on_processors(trainer: Any) -> None:
    """Make FSDP work on CPUs, where accelerate (1.15) ignores it."""
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and launcher_uses("FSDP"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True


def _check_steps(trainer: Any) -> None:
    """Raise DataError if the trainer had no batch: it only warns."""
    if trainer.state.global_step == 0:
        raise DataError(
            f"No step was taken: {len(trainer.train_dataset)} examples are left after tokenizing, fewer than a batch "
            "of all ranks. Lower per_device_train_batch_size, set `dataloader_drop_last: false`, or give more examples."
        )


def _check_gradients(trainer: Any, strategies: Combined, form: Form) -> None:
    """Raise DataError if no step had a gradient, logged or not."""
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    if norms and not any(norms):
        weighing = strategies.overriding("token_weights")
        why = "Look at what the examples teach, and at the strategies' parameters."
        if weighing:
            why = (
                f"The strategy {' and '.join(weighing)} gave no token a weight, which a model does that finds no token "
                "likely: change its parameters, or leave it out."
            )
        if form == "prompts":
            why = (
                "All answers to a prompt earned the same, as where none is right: use a reward that tells them apart, "
                "easier prompts, or more answers (num_generations, max_completion_length)."
            )
        raise DataError(f"Nothing was learnt: the gradient was zero in all {trainer.state.global_step} steps. {why}")


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
        with stop_after_checkpoint():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _load_optimizer(trainer: Any, checkpoints: Path) -> None:
    """Read the optimizer's state of an earlier process's complete training."""
    checkpoint = newest_checkpoint(checkpoints)
    if trainer.optimizer is None and checkpoint:
        trainer.create_optimizer_and_scheduler(num_training_steps=trainer.state.max_steps)
        trainer._load_optimizer_and_scheduler(str(checkpoint))
