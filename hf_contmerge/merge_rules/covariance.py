"""Covariance: least-squares merging of linear maps, with or without data.

ACTMat, arXiv 2604.01329 (COLM 2026), takes the covariance of the update; RegMean, Jin et al., ICLR 2023,
arXiv 2212.09849, that of the inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_contmerge.merge_rules import INPUTS_LIMIT, MergeRule, Norms, Shape, Weight

_SMALLEST = 1e-6


@dataclass(frozen=True)
class Covariance(MergeRule):
    """N <- N + D G, C <- C + G;  merged = base + N C^-1 for matrices, the mean of the D otherwise.

    `space: update`, G = D'D, needs no data: experts with orthogonal rows are added, equal ones averaged. `space:
    inputs`, G = a X'X / n + (1-a) diag(X'X / n), reads the experts' statistics. Matrices with more than `max_inputs`
    inputs are averaged; `form: diagonal` keeps the diagonal of G alone, for any width. The order of experts does not
    matter. C of `update` may have no inverse: N (C + rI)^-1 C (C + rI)^-1 is taken, r = eps |C|^2 / tr(C). For that of
    `inputs`, a counts as 1 - eps at most.
    """

    reference = "https://arxiv.org/abs/2604.01329"
    start_from = "base"
    unit = "matrix"
    degree = 3

    space: Literal["update", "inputs"] = "update"
    form: Literal["full", "diagonal"] = "full"
    a: float = 0.9
    eps: float = 1e-4
    max_inputs: int = 8192

    def __post_init__(self) -> None:
        if not 0 <= self.a <= 1:
            raise ValueError(f"covariance: a must be between 0 and 1 (the weight off the diagonal); got {self.a}")
        if not _SMALLEST <= self.eps <= 1:
            raise ValueError(f"covariance: eps must be between {_SMALLEST:g} (rounding) and 1; got {self.eps}")
        if self.max_inputs > INPUTS_LIMIT:
            raise ValueError(f"covariance: max_inputs must be at most {INPUTS_LIMIT}; got {self.max_inputs}")

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("inputs",) if self.space == "inputs" else ()

    def parts(self, weight: Weight) -> Mapping[str, Shape]:
        plain, width = {"sum": weight.shape}, weight.shape[-1] if weight.shape else 0
        stack = len(weight.shape) == 3
        if not weight.is_matrix or (stack and self.space == "inputs"):  # a stack has no statistics
            return plain
        if self.form == "diagonal":
            return {**plain, "moment": (*weight.shape[:-2], width)}
        return {**plain, "moment": (*weight.shape[:-2], width, width)} if width <= self.max_inputs else plain

    def update(self, running: Mapping[str, Tensor], task_vector: Tensor, weight: Weight) -> Mapping[str, Tensor]:
        if "moment" not in running:
            return {"sum": running["sum"] + task_vector}
        moment = self._moment(task_vector, weight)
        flat = moment.ndim < task_vector.ndim
        product = task_vector * moment.unsqueeze(-2) if flat else task_vector @ moment
        return {"sum": running["sum"] + product, "moment": running["moment"] + moment}

    def read_out(self, running: Mapping[str, Tensor], weight: Weight) -> Tensor:
        total, moment = running["sum"], running.get("moment")
        if moment is None:
            return total / weight.stage
        if moment.ndim < total.ndim:
            return total / torch.where(moment > 0, moment, 1).unsqueeze(-2)
        if not total.any():
            return torch.zeros_like(total)
        return self._solved(total.double(), moment.double()).to(total.dtype)

    def scale(self, norms: Norms) -> float:
        return 1.0

    def _moment(self, d: Tensor, weight: Weight) -> Tensor:
        """Return G, or its diagonal."""
        if self.space == "update":
            return d.square().sum(-2) if self.form == "diagonal" else d.mT @ d
        moment = weight.statistics.get("inputs")
        if moment is None:
            moment = torch.ones(d.shape[-1], dtype=d.dtype, device=d.device)
        diagonal = moment.diagonal() if moment.ndim == 2 else moment
        if self.form == "diagonal":
            return diagonal.clone()
        a = min(self.a, 1 - self.eps)  # inputs that depend on each other leave rounding alone to divide by
        return diagonal.diag() if moment.ndim == 1 else a * moment + (1 - a) * diagonal.diag()

    def _solved(self, total: Tensor, moment: Tensor) -> Tensor:
        """Return N C^-1, for updates filtered where C has no safe inverse."""
        if self.space == "inputs":
            return self._solved_inputs(total, moment)
        trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        ridge = self.eps * moment.square().sum((-2, -1)) / torch.where(trace > 0, trace, 1)
        factor = _factor(moment, torch.where(ridge > 0, ridge, 1)[..., None].expand(moment.shape[:-1]))
        half = torch.cholesky_solve(total.mT, factor)
        return torch.cholesky_solve(moment @ half, factor).mT

    def _solved_inputs(self, total: Tensor, moment: Tensor) -> Tensor:
        diagonal = moment.diagonal()
        own = torch.where(diagonal > 0, diagonal, 1)  # an input without energy has no part in N
        whole = moment + (own - diagonal).diag()
        factor, failed = torch.linalg.cholesky_ex(whole)
        if failed:  # a state of an earlier version, with a = 1
            factor = _factor(whole, self.eps * own)
        return torch.cholesky_solve(total.mT, factor).mT


def _factor(moment: Tensor, ridge: Tensor) -> Tensor:
    """Return the Cholesky factor of C + ridge, enlarged if need be.

    Raises torch.linalg.LinAlgError if C is not finite.
    """
    factor, failed = torch.linalg.cholesky_ex(moment + ridge.diag_embed())  # fails if rounding is above the ridge
    if not failed.any():
        return factor
    return _factor(moment, 10 * ridge) if ridge.isfinite().all() else torch.linalg.cholesky(moment)
