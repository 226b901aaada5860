"""One step of TRL's trainer on a tiny model.

TRL and transformers check most combinations of settings when a trainer is made, and some in its first step: a run would
be hours in. The tiny model is a Llama over the base's tokens, so a step takes a fraction of a second.
"""

from __future__ import annotations

import copy
import gc
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
)

from hf_contmerge.errors import ContmergeError, RecipeError
from hf_contmerge.models.architecture import find_architecture
from hf_contmerge.models.loading import complete_names
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.launching import launcher_uses
from hf_contmerge.train_strategies.lora import Lora
from hf_contmerge.training.data import StageData
from hf_contmerge.training.head import refuse_head, weights_beyond_head
from hf_contmerge.training.sampling import loading_by, reward_functions, sampled_rows
from hf_contmerge.training.settings import (
    PREFERENCES,
    SAMPLED,
    bad_parameters,
    config_fields,
    make_strategies,
    sft_settings,
    trl_classes,
)
from hf_contmerge.training.statistics import second_moments
from hf_contmerge.training.tokenizer import stage_tokenizer

LOG = logging.getLogger(__name__)

_ROWS = 4
_LOOKED_AT = 64
_ONE_STEP = {
    "gradient_accumulation_steps": 1, "max_steps": 1, "save_strategy": "no",
    "logging_strategy": "no", "torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None,
    "dataset_num_proc": None, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False, "dataloader_multiprocessing_context": None, "full_determinism": False,
    "router_aux_loss_coef": None, "enable_jit_checkpoint": False,
}  # fmt: skip
"""What would take long, or change this process, and has no check of TRL's to fail."""

_TWO_ANSWERS = {
    "num_generations": 2, "generation_batch_size": None, "steps_per_generation": None, "max_completion_length": 4,
}  # fmt: skip
"""Of a trainer that samples."""


def rehearse(train: Train, data: StageData, base: Path, where: str, *, trust_remote_code: bool = False) -> None:
    """Raise RecipeError for settings without a working trainer.

    Strategies are opened on the base's architecture without values, so that names and layers that this model lacks are
    found here. All ranks call this together. Launchers that shard weights are left out of the rest: they need the real
    model.
    """
    _check_architecture(train, base)
    if train.sft_fields.get("deepspeed") or launcher_uses("FSDP") or launcher_uses("DEEPSPEED"):
        return
    _check_router(train, base, where, trust_remote_code)
    _check_compiler(train, where)
    tokenizer = stage_tokenizer(base, train, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch, _quietly():
        settings = sft_settings(train, data, tokenizer, numel=0)
        settings.pop("model_init_kwargs", None)
        try:
            _step(
                train,
                data,
                tokenizer,
                {
                    **settings,
                    **{word: value for word, value in _ONE_STEP.items() if word in config_fields(data.form)},
                    "output_dir": scratch,
                    "per_device_train_batch_size": 2 if data.form in ("unpaired", *SAMPLED) else 1,
                    **(_TWO_ANSWERS if data.form in SAMPLED else {}),
                },
            )
        except ContmergeError:
            raise
        except Exception as error:  # code of others may fail in any way
            raise RecipeError(f"{where} cannot be followed: {_first_sentence(error)}") from error


def _step(train: Train, data: StageData, tokenizer: Any, settings: dict[str, Any]) -> None:
    trainer_type, config_type = trl_classes(data.form)
    lora = isinstance(make_strategies(train).carrier, Lora)
    rows, given = _shortest(data.train), {}
    if data.form in PREFERENCES and not lora:
        given = {"ref_model": _tiny(tokenizer, lora=False)}
    if data.form in SAMPLED:
        rows = sampled_rows(rows, data.form)
        given = {"reward_funcs": reward_functions(train)} if data.form == "prompts" else {}
    with loading_by(trainer_type, lambda: _tiny(tokenizer, lora=False)):
        trainer = trainer_type(
            model=_tiny(tokenizer, lora=lora),
            args=config_type(**settings),
            train_dataset=rows,
            processing_class=tokenizer,
            **given,
        )
    trainer.remove_callback(PrinterCallback)
    if len(trainer.train_dataset):  # TRL may have dropped these few for their length
        trainer.train()
        if train.statistics and "adam" in train.statistics.kinds:
            second_moments(trainer)


def _tiny(tokenizer: Any, *, lora: bool) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=1 << 20, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return Lora(r=1, target_modules=["q_proj"]).open(model, None) if lora else model


def _shortest(rows: Dataset) -> Dataset:
    """Return a few rows, short enough for any `max_length`."""
    some = rows.select(range(min(len(rows), _LOOKED_AT)))
    order = sorted(range(len(some)), key=lambda i: len(str(some[i])))
    return some.select(order[:_ROWS])


def _check_architecture(train: Train, base: Path) -> None:
    """Refuse a base that TRL cannot train, and parameters that misfit it."""
    architecture, trained = find_architecture(base), cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)
    model = architecture and copy.deepcopy(architecture.model)
    if model is None or type(model) is not trained.get(type(model.config), None):
        return  # code of its own, or a class that is not the one that is trained
    complete_names(model)
    if beyond := weights_beyond_head(model):
        raise refuse_head(type(model).__name__, f"it has weights behind its layers ({beyond[0]})")
    strategies = make_strategies(train)
    strategies.begin(1, base)
    try:
        with _quietly():
            strategies.try_open(model)
    except (ValueError, RuntimeError) as error:  # NotImplementedError, which peft raises too, is a RuntimeError
        if not isinstance(error, (ValueError, NotImplementedError)) or "meta" in str(error).lower():
            LOG.debug("These strategies need values to open: %s", train.strategy, exc_info=True)
            return
        raise bad_parameters(train, error) from error


def _check_router(train: Train, base: Path, where: str, trust_remote_code: bool) -> None:
    """Refuse a router's loss for a model without experts, as TRL does."""
    if train.sft_fields.get("router_aux_loss_coef"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).get_text_config()
        if not hasattr(config, "output_router_logits"):
            raise RecipeError(
                f"{where}.router_aux_loss_coef is for mixtures of experts, and {base} is none. Remove it."
            )


def _check_compiler(train: Train, where: str) -> None:
    """Refuse unknown backends and modes of torch.compile; compile nothing."""
    backend, mode = (train.sft_fields.get(f"torch_compile_{word}") for word in ("backend", "mode"))
    if backend or mode:
        try:
            torch.compile(torch.nn.Identity(), backend=backend or "inductor", mode=mode)
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(f"{where}: torch.compile refuses {backend or mode}: {error}") from error


def _first_sentence(error: Exception) -> str:
    words = " ".join(str(error).split()) or "no reason given"
    return f"{words if words.endswith('.') else words + '.'} ({type(error).__name__} of TRL or transformers)"


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep warnings for the real training, and random states for the caller."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    plain, arrays, level = random.getstate(), np.random.get_state(), logging.root.manager.disable
    gc.freeze()  # the trainer collects garbage, which would look through all libraries for a second
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            gc.unfreeze()
            logging.disable(level)
            random.setstate(plain)
            np.random.set_state(arrays)
