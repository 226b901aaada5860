"""Checks of `learn`: stages with another objective than the columns' own."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.train_strategies import Combined
from hf_contmerge.training._forms import SAMPLED, Form
from hf_contmerge.training.rewards import Reward, get_reward

_KTO_LOSSES = ("kto", "apo_zero_unpaired")
_GRPO_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
_SAMPLING_CARRIERS = ("full", "lora", "qlora")
_TEACHERS = ("base", "ema", "live")
TEACHER_TEMPLATE = (
    "{prompt}\n\nThis is an example of a response to the question:\n{privileged_context}\n\nNow answer with a response "
    "of your own."
)
"""What the teacher of `learn: sdft` is asked, after arXiv 2601.19897."""


def make_rewards(train: Train) -> dict[str, Reward]:
    """Return the rewards of `learn: grpo` by name. Raises RecipeError."""
    if not train.rewards:
        raise RecipeError(
            "train: `learn: grpo` needs `rewards`, such as `rewards: [exact_match]`; or name a file of yours with "
            "`--plugin`."
        )
    rewards = {}
    for name, parameters in train.rewards.items():
        try:
            rewards[name] = get_reward(name, **parameters)
            rewards[name].require()
        except (TypeError, ValueError) as error:
            raise RecipeError(f"train.rewards: {error}") from error
    return rewards


def check_learning(train: Train, form: Form, strategies: Combined, fields: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for settings that a stage's objective refuses; `fields`: its trainer's."""
    if form == "unpaired":
        _check_kto(fields, where)
    if form in SAMPLED:
        _check_sampled(strategies, form, where)
    if form == "prompts":
        _check_grpo(train, fields, where)
    if form == "demonstrations":
        _check_sdft(strategies, fields, where)


def _check_kto(fields: Mapping[str, Any], where: str) -> None:
    loss = fields.get("loss_type", "kto")
    if loss not in _KTO_LOSSES:
        raise RecipeError(f"{where}: " + unknown("loss_type", str(loss), _KTO_LOSSES, where="`learn: kto`"))
    if loss == "kto" and fields.get("per_device_train_batch_size") == 1:
        raise RecipeError(
            f"{where}: KTO compares the answers of a batch, which needs per_device_train_batch_size 2 or more."
        )
    if loss == "kto" and fields.get("train_sampling_strategy", "sequential") != "sequential":
        raise RecipeError(
            f"{where}: KTO pairs each answer with its neighbour's prompt, in the order of the data. Remove "
            "train_sampling_strategy."
        )


def _check_sampled(strategies: Combined, form: Form, where: str) -> None:
    """Raise RecipeError for strategies without support for sampled answers."""
    names = [n for hook in ("loss", "before_step") for n in strategies.overriding(hook)] + strategies.keeping_order()
    carrier = next(iter(strategies.parts))
    if carrier not in _SAMPLING_CARRIERS or strategies.carrier.keeps_adapter():
        names.append(f"{carrier} with `keep`" if carrier in _SAMPLING_CARRIERS else carrier)
    if names:
        raise RecipeError(
            f"{where}: {' and '.join(dict.fromkeys(names))} cannot be combined with {SAMPLED[form]}, whose answers the "
            f"model samples while it trains. Use {', '.join(_SAMPLING_CARRIERS)}, replay, anchor, rates or soup."
        )


def _check_grpo(train: Train, fields: Mapping[str, Any], where: str) -> None:
    loss = fields.get("loss_type", "dapo")
    if loss not in _GRPO_LOSSES:
        raise RecipeError(f"{where}: " + unknown("loss_type", str(loss), _GRPO_LOSSES, where="`learn: grpo`"))
    rewards, weights = make_rewards(train), fields.get("reward_weights")
    if weights and len(weights) != len(rewards):
        raise RecipeError(f"{where}: reward_weights has {len(weights)} numbers for {len(rewards)} rewards; one each.")


def _check_sdft(strategies: Combined, fields: Mapping[str, Any], where: str) -> None:
    teacher, template = (
        fields.get("teacher_model_kind", "base"),
        fields.get("teacher_prompt_template", TEACHER_TEMPLATE),
    )
    if teacher not in _TEACHERS:
        raise RecipeError(f"{where}: " + unknown("teacher_model_kind", teacher, _TEACHERS, where="`learn: sdft`"))
    if teacher == "ema" and next(iter(strategies.parts)) != "full":
        raise RecipeError(
            f"{where}: teacher_model_kind `ema` needs the strategy full: of an adapter, TRL averages the factors, from "
            "zero on. Use `base` or `live`."
        )
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise RecipeError(f"{where}: teacher_prompt_template: {error}.") from error
    plain = {field for _, field, spec, conversion in parts if not (spec or conversion)}
    if len(plain) != len({part[1:] for part in parts}) or plain != {"prompt", "privileged_context"}:
        raise RecipeError(
            f"{where}: teacher_prompt_template must hold {{prompt}} and {{privileged_context}}, the demonstration, and "
            "no other field or format."
        )
