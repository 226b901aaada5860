"""Checks names and shapes against the base model, before training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError
from hf_contmerge.models.lora.matching import StoredNames
from hf_contmerge.models.weights import Weights

_FIX = "Use the base's architecture and tokenizer, without added tokens."


def check_layout(model: Any, base: Weights) -> None:
    """Raise ModelError if a model's tensors differ from the base's.

    Some architectures hold weights in another form in memory than in their files (stacks of experts). For those, only
    names in both forms are compared here; the trained weights are compared in full when they are added.
    """
    ours = _tensors(model)
    names = StoredNames(base)
    stored = {name: names.find(name) for name in ours}
    common = {name: match for name, match in stored.items() if match}
    for name, match in common.items():
        if ours[name] != base.shape(match):
            raise ModelError(
                f"{name} has shape {ours[name]} in the model to train, {base.shape(match)} in {base.folder}. {_FIX}"
            )
    extra = [name for name in ours if name not in common]
    missing = sorted(set(base.names) - set(common.values()))
    if not common or (extra and not missing):
        raise ModelError(f"The model to train has {_brief(extra)}, which {base.folder} lacks. {_FIX}")
    if missing and not extra:
        raise ModelError(f"The model to train lacks {_brief(missing)} of {base.folder}. {_FIX}")


def _tensors(model: Any) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors saved by `save_pretrained`."""
    kept = model.state_dict()
    tensors = [*model.named_parameters(), *model.named_buffers()]  # lists tied tensors once
    return {name: tuple(t.shape) for name, t in tensors if name in kept}


def _brief(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] + (f" and {len(listed) - 1} more tensors" if len(listed) > 1 else "")


def check_same_layout(base: Path, other: Path) -> None:
    """Raise ModelError if names, shapes or vocabulary of two models differ."""
    ours, theirs = Weights(base), Weights(other)
    if ours.vocabulary != theirs.vocabulary:
        raise ModelError(
            f"{other} has a vocabulary of {theirs.vocabulary}, {base} of {ours.vocabulary}: their rows do not "
            "correspond. Train the expert with the base's tokenizer, without new tokens."
        )
    missing, extra = set(ours.names) - set(theirs.names), set(theirs.names) - set(ours.names)
    if missing or extra:
        which = f"lacks {_brief(sorted(missing))}" if missing else f"has {_brief(sorted(extra))}, which the base lacks"
        raise ModelError(f"{other} does not fit {base}: it {which}. Both must have the same architecture.")
    for name in ours.names:
        if ours.shape(name) != theirs.shape(name):
            raise ModelError(
                f"{name} has shape {theirs.shape(name)} in {other}, {ours.shape(name)} in {base}. "
                "Both must have the same architecture and size."
            )


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError if a model folder has no tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model). Save the model's tokenizer there."
        )
