"""A recipe's training settings, checked and turned into TRL's fields."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from hf_contmerge.errors import RecipeError, ResourceError, size, unknown
from hf_contmerge.models.config import config, learned_positions
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.schema import Recipe, Train
from hf_contmerge.run.recipe.trl_fields import TOKENIZER_FIELDS, TRL_FIELDS
from hf_contmerge.runtime.device import bf16_pays, cpu_only
from hf_contmerge.runtime.launching import launcher_uses
from hf_contmerge.runtime.ranks import is_launched
from hf_contmerge.runtime.versions import version
from hf_contmerge.train_strategies import Combined, combine, named_strategy
from hf_contmerge.train_strategies.lora import Lora
from hf_contmerge.train_strategies.osf import Osf
from hf_contmerge.training._forms import PREFERENCES, SAMPLED, Form
from hf_contmerge.training._learn import TEACHER_TEMPLATE, check_learning
from hf_contmerge.training._trainer import trainer_class
from hf_contmerge.training.data import StageData, require_chat_template

LOG = logging.getLogger(__name__)

_OWN = tuple(Train.model_fields)
_OWNERS: dict[Form, str] = {
    "preference": "preference pairs", "unpaired": "labelled answers (`learn: kto`)", **SAMPLED,
    "text": "texts and conversations",
}  # fmt: skip
"""A form of each trainer, in words."""
_SFT_LOSSES = ("nll", "dft", "chunked_nll")  # values of `loss_type` that SFTTrainer has, and the others have not
_OTHER_FORMS = PREFERENCES | SAMPLED


def make_strategies(train: Train) -> Combined:
    """Return the recipe's strategies. Raises RecipeError for unknown or conflicting ones."""
    for name in train.strategy:
        named_strategy(name, where="train")
    try:
        return combine(train.strategy, train.parameters_of())
    except (TypeError, ValueError) as error:
        raise bad_parameters(train, error) from error


def bad_parameters(train: Train, error: Exception) -> RecipeError:
    """Return the error for rejected strategy parameters."""
    return RecipeError(f"train.parameters: {error} (strategy {' + '.join(train.strategy)})")


Check = Callable[[], object]
"""Raises ContmergeError."""


def training_checks(train: Train, start: Path, *, memory: bool = True) -> Iterator[Check]:
    """Yield the checks without data. `memory`: include the machine's."""
    yield partial(make_strategies, train)
    yield partial(_check_settings, train)
    yield partial(_warn_of_halves, train, start)
    if memory:
        yield partial(_check_memory, train, start)


def data_checks(recipe: Recipe, data: Mapping[str, StageData]) -> Iterator[Check]:
    """Yield the checks with the stages' data."""
    yield partial(_check_stages, recipe, data)


def _check_settings(train: Train) -> None:
    """Raise RecipeError for unknown fields and rejected values."""
    _check_fields(train.sft_fields, {name for form in _OWNERS for name in config_fields(form)}, "train", others=_OWN)
    _check_values(train, "text", "train")


def _check_memory(train: Train, start: Path) -> None:
    """Raise ResourceError if weights, gradients and optimizer exceed the memory."""
    strategies = make_strategies(train)
    need = Weights(start).numel() * strategies.bytes_per_parameter
    have = psutil.virtual_memory().total if cpu_only() else torch.cuda.mem_get_info()[1] * torch.cuda.device_count()
    if need > have:
        raise ResourceError(
            f"Training {start} with strategy {' + '.join(train.strategy)} needs about {size(need)} and this "
            f"machine has {size(have)}. Use `strategy: lora`, a smaller model, or more GPUs."
        )


def _check_stages(recipe: Recipe, data: Mapping[str, StageData]) -> None:
    """Raise RecipeError for settings without a stage of their form."""
    forms: dict[str, Form] = {stage.name: data[stage.name].form for stage in recipe.stages if stage.dataset}
    if not forms:
        return
    used = {name for form in forms.values() for name in config_fields(form)} | {*TOKENIZER_FIELDS}
    _check_fields(recipe.train.sft_fields, used, "train", others=_OWN)
    for stage in recipe.stages:
        if stage.dataset:
            form, train = forms[stage.name], recipe.train_of(stage)
            where = f"train of stage {stage.name}"
            if form in _OTHER_FORMS and stage.train.get("loss_type") in _SFT_LOSSES:
                raise RecipeError(
                    f"{where}: loss_type {stage.train['loss_type']} is for texts, not {_OTHER_FORMS[form]}."
                )
            _check_fields(stage.train, config_fields(form), where, others=_OWN)
            _check_values(train, form, where)
            _check_form(train, form, where)
            if form != "prompts" and train.rewards and (stage.train.get("rewards") or "prompts" not in forms.values()):
                raise RecipeError(f"{where}: rewards are for `learn: grpo`, and it is not set. Set it, or remove them.")
            strategies, fields = make_strategies(train), _fields_for(form, train)
            trainer_class(trl_classes(form)[0], strategies)
            _refuse_two_weightings(strategies, fields, where)
            _refuse_two_orders(strategies, fields, where)
            _check_launch(strategies, fields, where)
    _warn_of_rates(recipe, forms)


def positions_of(base: Path) -> int | None:
    """Return the length of a base's table of positions, if any."""
    return learned_positions(config(base), Weights(base).shapes())


def check_positions(recipe: Recipe, data: Mapping[str, StageData], base: Path) -> None:
    """Raise RecipeError for texts longer than a table of positions."""
    most = positions_of(base)
    for stage in recipe.stages if most else ():
        form = data[stage.name].form if stage.dataset else "prompts"
        if form in SAMPLED:  # what they sample is as long as it happens to be
            continue
        longest = {**config_fields(form), **_fields_for(form, recipe.train_of(stage))}.get("max_length")
        if longest is None or longest > most:
            raise RecipeError(
                f"train of stage {stage.name}: {base} has a table of {most} positions, and max_length is "
                f"{longest or 'not set, so that no example is cut'}. Set `max_length: {most}`, or less."
            )


def _warn_of_halves(train: Train, start: Path) -> None:
    """Warn of training 16-bit weights; factors of adapters are float32."""
    dtype = (train.sft_fields.get("model_init_kwargs") or {}).get("dtype", "float32")
    dtype = str(Weights(start).main_dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if dtype in ("bfloat16", "float16") and not isinstance(make_strategies(train).carrier, Lora | Osf):
        LOG.warning(in_halves("train.model_init_kwargs.dtype", dtype))


def in_halves(what: str, dtype: str) -> str:
    """Return the warning about training in 16 bits."""
    return (
        f"{what}: weights in {dtype} are rounded to the nearest value after every step, which drops most of a usual "
        "learning rate's updates; no later step can tell how much. Train float32 weights, with `bf16: true` for speed."
    )


def _warn_of_rates(recipe: Recipe, forms: Mapping[str, Form]) -> None:
    """Warn of learning rates too high for a strategy, each once."""
    stages: dict[str, list[str]] = {}
    for stage in recipe.stages:
        if stage.name in forms:
            rate = _rate_of(forms[stage.name], recipe.train_of(stage))
            for part in make_strategies(recipe.train).parts.values():
                warning = part.warn_of_rate(rate)
                if warning:
                    stages.setdefault(f"learning_rate {rate:g}: {warning}", []).append(stage.name)
    for warning, names in stages.items():
        LOG.warning("train of %s: %s.", ", ".join(names), warning)


def _rate_of(form: Form, train: Train) -> float:
    return train.sft_fields.get("learning_rate", config_fields(form)["learning_rate"])


def _check_fields(fields: Iterable[str], known: Container[str], where: str, *, others: Sequence[str] = ()) -> None:
    """Raise RecipeError for a field without a trainer to use it.

    A field that the installed TRL has and our table lacks is refused too: nobody knows if a run obeys it.
    """
    for field in fields:
        if field in others:
            continue
        if field not in known:
            raise RecipeError(_whose(field, where) or unknown("field", field, [*_all_fields(), *others], where=where))
        if field not in TRL_FIELDS:
            raise RecipeError(
                f"{where}.{field} is new in TRL {version('trl')} or transformers {version('transformers')}, and this "
                "version of hf_contmerge does not know how a run would obey it. Remove it, or update hf_contmerge."
            )


def _all_fields() -> set[str]:
    return {name for name, row in TRL_FIELDS.items() if row.use == "obeyed"}


def _whose(field: str, where: str) -> str:
    """Say for which forms of examples a field is; "" for none."""
    owners = [words for form, words in _OWNERS.items() if field in config_fields(form)]
    if not owners:
        return ""
    here = "no stage here has them" if where == "train" else "this stage has others"
    return f"{where} sets {field}. It is for {' or '.join(owners)}, and {here}. Remove it."


def config_of(form: Form, fields: Mapping[str, Any], where: str) -> Any:
    """Return a form's config. Raises RecipeError for refused values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old names, which TRL itself uses
        try:
            return trl_classes(form)[1](**fields)
        except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
            raise RecipeError(f"{where}: {error}") from error


def _check_values(train: Train, form: Form, where: str) -> None:
    fields = {**_defaults(train, numel=0), **_whole_groups(train, form), **_fields_for(form, train)}
    config_of(form, {**fields, "output_dir": "unused"}, where)


def _check_form(train: Train, form: Form, where: str) -> None:
    """Raise RecipeError for settings without effect on a form."""
    fields = train.sft_fields
    if fields.get("completion_only_loss") and form != "prompt_completion":
        raise RecipeError(
            f"{where}: completion_only_loss is for `prompt` and `completion`, and the stage has {form}. Remove it, or "
            "set it in the `train` of the stages that have them."
        )
    if fields.get("padding_free") and form == "preference":
        raise RecipeError(f"{where}: padding_free has no effect on preference pairs in this TRL. Remove it.")
    if fields.get("label_smoothing_factor") and (form in _OTHER_FORMS or fields.get("loss_type") == "dft"):
        raise _no_effect("label_smoothing_factor", _OTHER_FORMS.get(form, "the loss of `loss_type: dft`"), where)
    if fields.get("train_sampling_strategy") and form in SAMPLED:
        raise _no_effect("train_sampling_strategy", SAMPLED[form], where)
    check_learning(train, form, make_strategies(train), _fields_for(form, train), where)


def _no_effect(field: str, what: str, where: str) -> RecipeError:
    return RecipeError(
        f"{where}: {field} has no effect on {what}. Remove it, or set it in the `train` of other stages."
    )


def _refuse_two_weightings(strategies: Combined, fields: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for a second weighting of the tokens' loss."""
    names = strategies.overriding("token_weights")
    if names and fields.get("loss_type") == "dft":
        raise RecipeError(
            f"{where}: loss_type dft weights tokens by their probability, and {' and '.join(names)} weights them too. "
            "Keep one of them."
        )
    if names and fields.get("label_smoothing_factor"):
        raise RecipeError(
            f"{where}: label_smoothing_factor replaces the loss whose tokens {' and '.join(names)} weights. Set it to "
            "0, or leave the strategy out."
        )


def _refuse_two_orders(strategies: Combined, fields: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for a sampler that undoes a strategy's order."""
    names, sampler = strategies.keeping_order(), fields.get("train_sampling_strategy", "sequential")
    other = "shuffle_dataset" if fields.get("shuffle_dataset") else f"train_sampling_strategy: {sampler}"
    if names and (sampler != "sequential" or fields.get("shuffle_dataset")):
        raise RecipeError(
            f"{where}: {' and '.join(names)} fills each batch by shares (`within_batch`), which {other} would undo. "
            "Remove one of them."
        )


def _check_launch(strategies: Combined, fields: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for a launcher or precision without a strategy's needs."""
    names = strategies.not_sharded()
    if names and is_launched() and launcher_uses("FSDP"):
        raise RecipeError(
            f"{where}: {' and '.join(names)} cannot work where the weights are shared out among ranks (FSDP). Use "
            "another strategy, or DDP."
        )
    others = [name for name in strategies.parts if name not in ("full", "lora", "replay")]
    if others and (fields.get("deepspeed") or launcher_uses("DEEPSPEED")):
        raise RecipeError(
            f"{where}: {' and '.join(others)} cannot work under DeepSpeed, which keeps gradients and weights to "
            "itself. Use FSDP2 or DDP."
        )
    looking = strategies.overriding("before_step")
    if looking and fields.get("fp16"):
        raise RecipeError(
            f"{where}: {' and '.join(looking)} looks at gradients before the step, and `fp16` scales them. Use "
            "`bf16: true`, or float32."
        )


def _fields_for(form: Form, train: Train) -> dict[str, Any]:
    """Return the fields of a form's trainer: pairs have no `packing`."""
    fields = {field: value for field, value in train.sft_fields.items() if field in config_fields(form)}
    if form in _OTHER_FORMS and fields.get("loss_type") in _SFT_LOSSES:  # said to the run, and meant for its texts
        del fields["loss_type"]
    return {field: value for field, value in fields.items() if field not in TOKENIZER_FIELDS}  # the tokenizer has them


def loss_fields(train: Train, form: Form, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> dict[str, Any]:
    """Return the fields for loss masks; `tokenizer` is called for conversations only."""
    fields = {**config_fields(form), **_fields_for(form, train)}
    if form == "messages" and "assistant_only_loss" not in train.sft_fields:
        fields["assistant_only_loss"] = _marks_assistant(tokenizer())
    return fields


def sft_settings(
    train: Train,
    data: StageData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    numel: int,
    strategies: Combined | None = None,
) -> dict[str, Any]:
    """Return a stage's SFTConfig or DPOConfig fields: defaults, then the recipe's.

    `strategies`: those of the training, if they are not the recipe's.
    """
    form: dict[str, Any] = {}
    if data.form == "text" and train.sft_fields.get("max_length", 1):  # pretraining: one stream, cut into blocks
        form = {"packing": True, "packing_strategy": "wrapped"}
    if data.form == "messages":
        form = {"assistant_only_loss": _marks_assistant(tokenizer)}
    if data.form in SAMPLED:  # a batch is a list of prompts, and TRL counts what it samples itself
        form = {"include_num_input_tokens_seen": "no"}
    if data.form == "demonstrations":
        form |= {"teacher_prompt_template": TEACHER_TEMPLATE}
    form |= _whole_groups(train, data.form)
    order = {"train_sampling_strategy": "sequential"} if (strategies or make_strategies(train)).keeping_order() else {}
    # Trackers are the run's; the trainer would start a run of theirs with every stage.
    return {**_defaults(train, numel=numel), **form, **order, **_fields_for(data.form, train), "report_to": "none"}


def _whole_groups(train: Train, form: Form) -> dict[str, Any]:
    """Return the default answers per prompt, to fill batches."""
    fields = train.sft_fields
    named = any(fields.get(word) for word in ("num_generations", "generation_batch_size", "steps_per_generation"))
    if form not in SAMPLED or named:
        return {}
    own = config_fields(form)
    words = ("per_device_train_batch_size", "gradient_accumulation_steps")
    sampled = math.prod(fields.get(word, own[word]) for word in words)
    return {"num_generations": max(n for n in range(1, own["num_generations"] + 1) if sampled % n == 0)}


def _defaults(train: Train, *, numel: int) -> dict[str, Any]:
    return {
        "use_cpu": cpu_only(),
        "bf16": bf16_pays(numel) and not train.sft_fields.get("fp16"),
        "save_total_limit": 1,
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": 5,
        "disable_tqdm": True,  # plain lines, which a log can hold
    }


def _marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say if the loss can cover the assistant's turns only."""
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


def trl_classes(form: Form) -> tuple[type, type]:
    """Return TRL's trainer for examples of a form, and its config."""
    if form == "preference":
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        return DPOTrainer, DPOConfig
    if form == "unpaired":
        from trl.trainer.kto_config import KTOConfig
        from trl.trainer.kto_trainer import KTOTrainer

        return KTOTrainer, KTOConfig
    if form == "prompts":
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        return GRPOTrainer, GRPOConfig
    if form == "demonstrations":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental, which our pages say
            from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        return SDFTTrainer, SDFTConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    return SFTTrainer, SFTConfig


def config_fields(form: Form) -> dict[str, Any]:
    """Return a form's config fields with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(trl_classes(form)[1])}
