"""Iso-C: equal singular values for the summed task vectors.

Marczak et al., ICML 2025, arXiv 2502.04959.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merge_rules._linear import left_singular, slice_by_slice, summed


@dataclass(frozen=True)
class IsoC(MergeRule):
    """S <- S + D;  merged = base + alpha * iso(S).

    iso(S) is mean(s) U V' for matrices S = U diag(s) V', and S / t otherwise. Directions below the numerical rank have
    an arbitrary basis and are left out, also of the mean.
    """

    reference = "https://arxiv.org/abs/2502.04959"
    start_from = "base"
    unit = "matrix"
    tunable = ("alpha",)

    alpha: float = 1.5

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + task_vector

    def read_out(self, running: Tensor, weight: Weight) -> Tensor:
        return slice_by_slice(_isotropic, running) if weight.is_matrix else running / weight.stage

    def scale(self, norms: Norms) -> float:
        return self.alpha


def _isotropic(x: Tensor) -> Tensor:
    """Return mean(s) U V' as (U diag(mean(s) / s) U') X."""
    if not x.any():
        return x
    if len(x) > x.shape[1]:
        return _isotropic(x.T).T
    u, s = left_singular(x)
    return summed([], minus=[(u * (-s.mean() / s) @ u.T, x)], like=x)
