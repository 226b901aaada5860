"""Reads a peft LoRA folder's settings: scaling, token rows, base name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import optional_json
from hf_contmerge.runtime.foreign import expanded, read_json, require_shape
from hf_contmerge.runtime.patterns import require_quick_lora

CONFIG = "adapter_config.json"

_BY_PATH = "Save it from peft with path_initial_model_for_weight_conversion=..., which converts it to a plain LoRA."

_SHAPE: dict[str, Any] = {
    "r?": int, "lora_alpha?": float, "rank_pattern?": ({str: int}, None), "alpha_pattern?": ({str: float}, None),
    "use_rslora?": (bool, None), "use_dora?": (bool, None), "fan_in_fan_out?": (bool, None), "lora_bias?": (bool, None),
    "base_model_name_or_path?": (str, None), "revision?": (str, None), "target_parameters?": ([str], None),
    "trainable_token_indices?": ([int], {str: [int]}, None), "target_modules?": (str, [str], None),
    "modules_to_save?": (str, [str], None), "init_lora_weights?": (bool, str, None),
}  # fmt: skip

READ = {
    "alpha_pattern": "scaling by module",
    "base_model_name_or_path": "compared with the base's name",
    "bias": "trained biases are in the file",
    "fan_in_fan_out": "orientation, where transformers does not know the architecture",
    "init_lora_weights": "refused if it changes the base",
    "lora_alpha": "scaling",
    "lora_bias": "a bias of B, added to the module's bias",
    "modules_to_save": "whole modules are in the file",
    "peft_type": "LORA; others are refused",
    "r": "rank and scaling",
    "rank_pattern": "rank and scaling by module",
    "revision": "compared with the base's revision",
    "target_parameters": "which stacks of experts and other parameters are changed",
    "trainable_token_indices": "which rows of a table are changed",
    "use_dora": "one norm per output",
    "use_rslora": "scaling",
}
"""Settings that decide what the tensors of an adapter mean."""

TRAINING = {
    "auto_mapping": "the class that was trained",
    "corda_config": "start of a training",
    "ensure_weight_tying": "tied tensors are compared",
    "eva_config": "start of a training; ranks are in rank_pattern",
    "exclude_modules": "the file holds what was trained",
    "inference_mode": "whether to train on",
    "layers_pattern": "the file holds what was trained",
    "layers_to_transform": "the file holds what was trained",
    "loftq_config": "start of a training",
    "lora_dropout": "acts in training only",
    "lora_ga_config": "start of a training",
    "megatron_core": "a module's name",
    "peft_version": "for information",
    "qalora_group_size": "read with use_qalora only",
    "runtime_config": "where to compute; never saved",
    "target_modules": "the file holds what was trained",
    "task_type": "which outputs the model has",
}
"""Settings without an effect on the weights after training."""

REFUSED = {
    "alora_invocation_tokens": "acts on some tokens only, unlike a change of weights",
    "arrow_config": "routes tokens among adapters, unlike a change of weights",
    "kasa_config": "is relative to a base without its small singular values",
    "layer_replication": "makes a model with more layers than the base",
    "megatron_config": "is one rank's share of a model split by Megatron",
    "monteclora_config": "draws its weights at random",
    "use_bdlora": "is block-diagonal (BD-LoRA), which is not supported",
    "use_qalora": "pools its inputs (QA-LoRA) for a quantised base",
    "velora_config": "is VeLoRA, which is not supported",
}
"""Settings that are refused unless empty."""

_NOT_FOLDED = ("alora_invocation_tokens", "layer_replication")
"""Of these, those that are no change of weights when peft folds them in, either."""
_FROM_BASE = ("gaussian", "eva", "orthogonal", "mica")
_FROM_CHANGED_BASE = ("pissa", "corda", "olora", "lora_ga")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises ModelError for unsupported adapters."""
    path = folder / CONFIG
    try:
        settings = read_json(path)
        if isinstance(settings, dict) and settings.get("peft_type") == "LORA":
            require_shape(settings, _SHAPE)
            require_quick_lora(settings)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path}: {error}. Save or fetch the adapter again.") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        peft_type = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise ModelError(
            f"{path} has peft_type {peft_type}; only LORA is supported. Merge the adapter into its base "
            "(merge_and_unload, save_pretrained) and give the merged folder."
        )
    _require_known(path, settings)
    return settings


def check_to_train(settings: Mapping[str, Any], *, keep: bool) -> None:
    """Raise ValueError for training settings without a change of weights.

    `keep`: whether the adapter itself is the expert, which `read_settings` must take.
    """
    for word in REFUSED if keep else _NOT_FOLDED:
        if settings.get(word):
            raise ValueError(f"{word} makes an adapter that cannot be merged: it {REFUSED[word]}; remove it")
    init = str(settings.get("init_lora_weights", True)).lower()
    if keep and (init.startswith(_FROM_CHANGED_BASE) or init == "loftq"):
        raise ValueError(
            f"init_lora_weights {init} starts from a changed base, so that an adapter that is kept would not fit the "
            "base; remove it, or `keep`"
        )


def check_loadable(folder: Path) -> None:
    """Raise ModelError for adapters with pickles, foreign code or slow patterns."""
    settings = optional_json(folder / CONFIG)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder} has no adapter_model.safetensors, and a pickle (adapter_model.bin) is not read. Load it once "
            "with peft and call save_pretrained, which writes safetensors."
        )
    if settings.get("megatron_config"):  # peft imports the module that megatron_core names
        raise ModelError(f"{folder / CONFIG} sets megatron_config: the adapter {REFUSED['megatron_config']}.")
    try:
        require_shape(settings, _SHAPE)
        require_quick_lora(settings)
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG}: {error}.") from error


def scaling(settings: Mapping[str, Any], place: str) -> tuple[int, float]:
    """Return the rank and the factor of B @ A.

    `place`: path in memory of the module or parameter. Raises ModelError for an invalid pattern.
    """
    rank = _pattern(settings, "rank_pattern", place, settings.get("r", 8))
    alpha = _pattern(settings, "alpha_pattern", place, settings.get("lora_alpha", 8))
    if rank < 1:
        raise ModelError(
            f"{CONFIG} gives {place} the rank {rank}; expected at least 1. Save or fetch the adapter again."
        )
    return rank, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def token_rows(settings: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """Return a table's rows in trainable_token_indices, possibly none."""
    chosen = settings.get("trainable_token_indices") or ()
    if isinstance(chosen, dict):
        chosen = next((rows for suffix, rows in chosen.items() if module.endswith(suffix)), ())
    return tuple(chosen)


def is_same_base(name: str, others: Collection[str]) -> bool:
    """Return True if a base's name matches one of `others`.

    Names are Hub ids or paths, with or without revision.
    """
    ours = _identities(name)
    return any(ours & _identities(other) or _is_tail(name, other) or _is_tail(other, name) for other in others)


def is_same_revision(name: str, others: Collection[str]) -> bool:
    """Return True if a base's revision matches `others`, or is unknown.

    A Hub id without revision is the branch main. Snapshots of the cache have their commit in the path.
    """
    ours = name.partition("@")[2]
    theirs = {other.partition("@")[2] or "main" for other in others if not other.startswith(("/", "~", "."))}
    commits = {part for other in others for part in Path(other).parts}
    return not ours or not theirs or ours in theirs | commits


def _identities(name: str) -> set[str]:
    """Return a base's Hub id (lower case, no revision) and resolved path.

    Hub ids also come from cache paths.
    """
    plain = name.rstrip("/") or name
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)(?:/|$)", plain)
    if cached:
        return {f"{cached[1]}/{cached[2]}".lower(), str(Path(plain).resolve())}
    names = {str(expanded(plain).resolve())}
    if not plain.startswith(("/", "~", ".")):
        names.add(plain.partition("@")[0].lower())
    return names


def _is_tail(name: str, other: str) -> bool:
    """Return True if a relative path ends an absolute one.

    It was given in another working directory. Two parts at least must agree.
    """
    parts, whole = Path(name).parts, Path(other).parts
    parts = parts[next((i for i, p in enumerate(parts) if p != ".."), 0) :]
    return (
        not Path(name).is_absolute() and Path(other).is_absolute() and len(parts) > 1 and whole[-len(parts) :] == parts
    )


def _pattern(settings: Mapping[str, Any], word: str, place: str, default: Any) -> Any:
    """Return the value of the first matching pattern, as in peft.

    Patterns match the end of a module's path.
    """
    for pattern, value in (settings.get(word) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", place):
                return value
        except re.error as error:
            raise ModelError(f"{word} in {CONFIG} holds {pattern!r}, an invalid pattern: {error}. Fix it.") from error
    return default


def _require_known(path: Path, settings: Mapping[str, Any]) -> None:
    for word, value in settings.items():
        if value and word in REFUSED:
            raise ModelError(f"{path} sets {word}: the adapter {REFUSED[word]}. It cannot be merged as weights.")
        if value and word not in READ and word not in TRAINING:
            raise ModelError(
                f"{path} sets {word} to {value!r}, an unknown setting. If it does not change the adapter's "
                "output, remove this line; else merge the adapter into its base with peft and give the merged folder."
            )
    _require_start(path, settings.get("init_lora_weights", True))


def _require_start(path: Path, init: Any) -> None:
    """Raise ModelError if training did not start from the base's weights."""
    word = str(init).lower()
    if word.startswith(_FROM_CHANGED_BASE):
        raise ModelError(
            f"{path} has init_lora_weights {init}: training started from a changed base, so the adapter does not "
            f"fit the original one. {_BY_PATH}"
        )
    if word == "loftq":
        raise ModelError(f"{path} has init_lora_weights loftq: the adapter corrects a quantised base, not this one.")
    if not isinstance(init, bool | None) and word not in _FROM_BASE:
        raise ModelError(
            f"{path} has init_lora_weights {init}, which is unknown: training may have started from a changed base. "
            "Merge the adapter into its base with peft (merge_and_unload, save_pretrained); give the merged folder."
        )
