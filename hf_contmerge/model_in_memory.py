"""What transformers makes of a model folder, without its weights: the names and modules that peft finds there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_contmerge.adapter_base import Names
from hf_contmerge.errors import ModelError
from hf_contmerge.tensor_files import Weights


@dataclass(frozen=True)
class ModelInMemory:
    """The model of a base, as peft would wrap it.

    `names`: stored name -> name in memory; a weight that is held in another form there (in a stack of experts) is
    missing. `tables`, `conv1d`: the names in memory of embedding tables, and of linear maps that are stored (in, out).
    """

    names: dict[str, str]
    tables: frozenset[str]
    conv1d: frozenset[str]

    def name(self, stored: str) -> str:
        """Return a weight's name in memory. Raises ModelError if it has none."""
        if stored not in self.names:
            raise ModelError(
                f"transformers holds {stored} in another form in memory, where no LoRA can be put on it. Export the "
                "merged model, without --as-adapter."
            )
        return self.names[stored]


def model_in_memory(base: Weights) -> ModelInMemory:
    """Build the base's model on no device. Raises ModelError if transformers does not know its architecture."""
    from transformers.pytorch_utils import Conv1D

    model = _skeleton(base)
    shapes, names = {n: tuple(t.shape) for n, t in model.state_dict().items()}, Names(base)
    stored = {name: names.find(name) for name in shapes}
    kinds = {f"{name}.weight": type(module) for name, module in model.named_modules()}
    return ModelInMemory(
        {s: name for name, s in stored.items() if s and base.shape(s) == shapes[name]},
        frozenset(n for n, kind in kinds.items() if issubclass(kind, torch.nn.Embedding)),
        frozenset(n for n, kind in kinds.items() if issubclass(kind, Conv1D)),
    )


def _skeleton(base: Weights) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base.folder)
        own = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            return own(config) if own else transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers does not know the architecture of {base.folder}, so it is not known what peft calls "
            "its weights. Export the merged model, without --as-adapter."
        ) from error
