"""OPCM: orthogonal projection before adding, so that a new expert keeps off the old ones' directions.

Tang et al., "Merging Models on the Fly Without Retraining", NeurIPS 2025, arXiv 2501.09522.
The published recursion with lambda_t equals the form below to 3e-14, because the projection does not depend on
the running sum's scale, so that only one scalar is left for the end.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms

NUMERICAL_RANK = 1e-6
"""Singular directions below this share of the largest are rounding: their basis, and so a projection, is arbitrary."""


@dataclass(frozen=True)
class Opcm(MergeRule):
    """S <- S + clean(S, D) for matrices, S <- S + D otherwise;  merged = base + S * mean(|D_t|) / |S|.

    clean(S, D) with S = U diag(s) V', A = U'DV and c = cumsum(s) / sum(s) removes from D these coefficients:

        fusionbench  A_ij with i < r and j < r, and all A_ii;   r = number of c_i <= alpha  (the authors' code today)
        block        A_ij with i < r and j < r;                 same r                      (their code of Jan 2025)
        paper        A_ij with i < r or  j < r, and all A_ii;   r = smallest with c_r >= alpha
    """

    reference = "https://arxiv.org/abs/2501.09522"
    start_from = "base"
    whole_model_scale = True

    alpha: float = 0.5
    variant: Literal["fusionbench", "block", "paper"] = "fusionbench"

    def update(self, running: Tensor, task_vector: Tensor, *, is_matrix: bool) -> Tensor:
        if not is_matrix:
            return running + task_vector
        if task_vector.ndim == 3:  # a stack of experts: each is a linear map of its own
            slices = zip(running, task_vector, strict=True)
            return torch.stack([self.update(s, d, is_matrix=True) for s, d in slices])
        if not running.any():  # nothing to keep off from
            return task_vector
        if not task_vector.any():
            return running
        return running + self._clean(running, task_vector)

    def scale(self, norms: Norms) -> float:
        if norms.running == 0:  # every task vector was zero, or they cancelled: merged = base
            return 0.0
        return sum(norms.experts) / len(norms.experts) / norms.running

    def _clean(self, running: Tensor, task_vector: Tensor) -> Tensor:
        left, s, right = _thin_svd(running)
        d = task_vector.double()
        r = self._rank(s)
        lead_left, lead_right = left[:, :r], right[:, :r]
        d_right = d @ right
        block = lead_left.T @ d_right[:, :r]
        if self.variant == "paper":
            # The union of "i < r" and "j < r", with no need for the columns that complete U and V to square bases.
            off_left = lead_left @ (lead_left.T @ d)
            off_right = d_right[:, :r] @ lead_right.T
            d = d - off_left - off_right + lead_left @ block @ lead_right.T
        else:
            d = d - lead_left @ block @ lead_right.T
        if self.variant != "block":
            tail = slice(r, int((s > NUMERICAL_RANK * s[0]).sum()))
            diagonal = (left[:, tail] * d_right[:, tail]).sum(0)
            d = d - (left[:, tail] * diagonal) @ right[:, tail].T
        return d.to(task_vector.dtype)

    def _rank(self, s: Tensor) -> int:
        """Return r, the number of leading singular directions that are protected as a block."""
        numerical = int((s > NUMERICAL_RANK * s[0]).sum())
        if self.alpha >= 1:
            return numerical
        share = s.cumsum(0) / s.sum()
        if self.variant == "paper":
            return min(int((share < self.alpha).sum()) + 1, numerical)
        return min(int((share <= self.alpha).sum()), numerical)


def _thin_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, q), s (q,), V (n, q) of x (m, n), q = min(m, n), in float64 and descending order.

    By eigh of the smaller Gram matrix in float64: several times faster than an SVD and, against a float64 SVD, more
    accurate than a float32 one. Falls back to the float64 SVD where eigh does not converge.
    """
    x = x.double()
    if x.shape[0] > x.shape[1]:
        left, s, right = _thin_svd(x.T)
        return right, s, left
    try:
        w, u = torch.linalg.eigh(x @ x.T)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u, s, vh.T
    s, u = w.flip(0).clamp_min(0).sqrt(), u.flip(1)
    floor = s[0] * torch.finfo(torch.float64).eps  # columns below NUMERICAL_RANK are never read; no division by zero
    return u, s, (x.T @ u) / s.clamp_min(floor)
