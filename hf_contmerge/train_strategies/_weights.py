"""A model's weights, as strategies need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_contmerge.errors import RecipeError

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # what torch puts into the names of a wrapped model's weights


class Start:
    """A copy of trained weights at the stage's start."""

    def __init__(self, model: nn.Module, chosen: Callable[[str], object]) -> None:
        self.weights: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in trained(model) if chosen(name)
        }

    def moved(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield name, weight and its change, for weights with a gradient.

        Raises RecipeError under FSDP's first version, which flattens the weights.
        """
        for name, weight in trained(model):
            if name in self.weights and weight.grad is not None:
                start = self.weights[name] = laid_out_like(weight, self.weights[name])
                if start.shape != weight.shape:
                    raise RecipeError(
                        f"train.strategy: the weight {name} had the shape {tuple(start.shape)} and has "
                        f"{tuple(weight.shape)} in training, so that it cannot be compared with its start. Use FSDP2 "
                        "(`fsdp_version: 2`) or DDP."
                    )
                yield name, weight, weight.detach() - start


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained weights once each, by names without wrappers."""
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            yield name, weight


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take the trained weights' gradients out of the model, by name."""
    gradients = {name: weight.grad for name, weight in trained(model) if weight.grad is not None}
    for weight in model.parameters():
        weight.grad = None
    return gradients


def laid_out_like(weight: Tensor, value: Tensor) -> Tensor:
    """Lay out a whole tensor like a weight, sharded or not."""
    if not isinstance(weight, DTensor) or isinstance(value, DTensor):
        return value.to(weight.device)
    if value.is_meta:  # where only the first rank has loaded the weights; it sends each rank its part
        value = torch.empty_like(value, device=weight.device)
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
