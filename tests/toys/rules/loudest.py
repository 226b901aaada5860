"""A rule that selects whole rows, by a part that is no row."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Shape, Weight


@dataclass(frozen=True)
class Loudest(MergeRule):
    """Each row of a matrix is that of the expert whose change is the largest there; elsewhere the last one's."""

    reference = "https://example.org/loudest"
    start_from = "base"
    selects = True

    def parts(self, weight: Weight) -> Mapping[str, Shape]:
        return {"value": weight.shape, "loudness": weight.shape[:-1]}

    def update(self, running: Mapping[str, Tensor], task_vector: Tensor, weight: Weight) -> Mapping[str, Tensor]:
        found = task_vector.norm(dim=-1) if task_vector.ndim > 1 else running["loudness"] + 1
        louder = found > running["loudness"]
        rows = louder.unsqueeze(-1) if task_vector.ndim > 1 else louder
        value = torch.where(rows, task_vector, running["value"])
        return {"value": value, "loudness": torch.where(louder, found, running["loudness"])}

    def read_out(self, running: Mapping[str, Tensor], weight: Weight) -> Tensor:
        return running["value"]

    def scale(self, norms: Norms) -> float:
        return 1.0
