"""Reads a peft LoRA folder's settings: scaling, token rows, base name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError

CONFIG = "adapter_config.json"

_BY_PATH = "Save it from peft with path_initial_model_for_weight_conversion=..., which converts it to a plain LoRA."
_REFUSED = {
    "alora_invocation_tokens": "acts on some tokens only, unlike a change of weights",
    "arrow_config": "routes tokens among adapters, unlike a change of weights",
    "kasa_config": "is relative to a base without its small singular values",
    "layer_replication": "makes a model with more layers than the base",
    "monteclora_config": "draws its weights at random",
    "use_bdlora": "is block-diagonal (BD-LoRA), which is not supported",
    "use_qalora": "pools its inputs (QA-LoRA) for a quantised base",
    "velora_config": "is VeLoRA, which is not supported",
}
# Read here, or without effect after training.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip


def read_settings(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises ModelError for unsupported adapters."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
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


def scaling(settings: Mapping[str, Any], place: str) -> tuple[int, float]:
    """Return the rank and the factor of B @ A.

    `place`: path in memory of the module or parameter. Raises ModelError for an invalid pattern.
    """
    rank = _pattern(settings, "rank_pattern", place, settings.get("r", 8))
    alpha = _pattern(settings, "alpha_pattern", place, settings.get("lora_alpha", 8))
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


def _identities(name: str) -> set[str]:
    """Return a base's Hub id (lower case, no revision) and resolved path.

    Hub ids also come from cache paths.
    """
    plain = name.rstrip("/") or name
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)(?:/|$)", plain)
    if cached:
        return {f"{cached[1]}/{cached[2]}".lower(), str(Path(plain).resolve())}
    names = {str(Path(plain).expanduser().resolve())}
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
        if value and word in _REFUSED:
            raise ModelError(f"{path} sets {word}: the adapter {_REFUSED[word]}. It cannot be merged as weights.")
        if value and word not in _KNOWN:
            raise ModelError(
                f"{path} sets {word} to {value!r}, an unknown setting. If it does not change the adapter's "
                "output, remove this line; else merge the adapter into its base with peft and give the merged folder."
            )
    init = str(settings.get("init_lora_weights")).lower()
    if init.startswith(("pissa", "corda", "olora", "lora_ga")):
        raise ModelError(
            f"{path} has init_lora_weights {init}: training started from a changed base, so the adapter does not "
            f"fit the original one. {_BY_PATH}"
        )
    if init == "loftq":
        raise ModelError(f"{path} has init_lora_weights loftq: the adapter corrects a quantised base, not this one.")
