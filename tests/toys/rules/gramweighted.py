"""A rule that needs statistics of its experts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Shape, Weight, inputs_shape


@dataclass(frozen=True)
class Gramweighted(MergeRule):
    """P <- P + D G, C <- C + G for matrices, G the inputs' moment or I;  merged = base + P C^-1. Else the mean."""

    reference = "https://example.org/gramweighted"
    start_from = "base"
    unit = "matrix"
    needs = ("inputs",)

    def parts(self, weight: Weight) -> Mapping[str, Shape]:
        gram = {"gram": inputs_shape(weight.shape[-1])} if weight.is_matrix else {}
        return {"product": weight.shape, **gram}

    def update(self, running: Mapping[str, Tensor], task_vector: Tensor, weight: Weight) -> Mapping[str, Tensor]:
        if not weight.is_matrix:
            return {"product": running["product"] + task_vector}
        width = task_vector.shape[-1]
        gram = weight.statistics.get("inputs", torch.eye(width) if running["gram"].ndim == 2 else torch.ones(width))
        product = task_vector @ gram if gram.ndim == 2 else task_vector * gram
        return {"product": running["product"] + product, "gram": running["gram"] + gram}

    def read_out(self, running: Mapping[str, Tensor], weight: Weight) -> Tensor:
        product, gram = running["product"], running.get("gram")
        if gram is None:
            return product / weight.stage
        return torch.linalg.solve(gram, product.mT).mT if gram.ndim == 2 else product / gram

    def scale(self, norms: Norms) -> float:
        return 1.0
