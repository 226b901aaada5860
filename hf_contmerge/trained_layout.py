"""Whether a model that is about to be trained can be merged afterwards: by its names and shapes, before any step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_contmerge.adapter_base import Names
from hf_contmerge.errors import ModelError
from hf_contmerge.tensor_files import Weights

_CURE = "Train a model of the base's architecture, with the base's tokenizer and no tokens added."


def check_layout(model: Any, base: Weights) -> None:
    """Raise ModelError if a model in memory does not have the tensors of the base.

    Some architectures hold weights in another form in memory than in their files (stacks of experts). Of those the
    names that are in both are compared; all of it is compared when the trained weights are added.
    """
    ours = _tensors(model)
    names = Names(base)
    stored = {name: names.find(name) for name in ours}
    found = {name: there for name, there in stored.items() if there}
    for name, there in found.items():
        if ours[name] != base.shape(there):
            raise ModelError(
                f"{name} has shape {ours[name]} in the model to be trained, {base.shape(there)} in {base.folder}. "
                f"{_CURE}"
            )
    more = [name for name in ours if name not in found]
    fewer = sorted(set(base.names) - set(found.values()))
    if not found or (more and not fewer):
        raise ModelError(f"The model to be trained has {_some(more)}, which {base.folder} lacks. {_CURE}")
    if fewer and not more:
        raise ModelError(f"The model to be trained lacks {_some(fewer)} of {base.folder}. {_CURE}")


def _tensors(model: Any) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what `save_pretrained` would write, each tied tensor once."""
    kept = model.state_dict()
    tensors = [*model.named_parameters(), *model.named_buffers()]  # tied ones come once
    return {name: tuple(t.shape) for name, t in tensors if name in kept}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] + (f" and {len(listed) - 1} more tensors" if len(listed) > 1 else "")
