"""OPCM: orthogonal projection before adding, so that a new expert keeps off the old ones' directions.

Tang et al., "Merging Models on the Fly Without Retraining", NeurIPS 2025, arXiv 2501.09522.
The published recursion with lambda_t equals the form below to 3e-14, because the projection does not depend on
the running sum's scale, so that only one scalar is left for the end.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merge_rules._linear import NUMERICAL_RANK as NUMERICAL_RANK
from hf_contmerge.merge_rules._linear import left_singular, right_rows, slice_by_slice


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
    unit = "matrix"
    whole_model_scale = True
    basis_free = True

    alpha: float = 0.5
    variant: Literal["fusionbench", "block", "paper"] = "fusionbench"

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        if not weight.is_matrix:
            return running + task_vector
        return slice_by_slice(self._fold, running, task_vector)

    def scale(self, norms: Norms) -> float:
        if norms.running == 0:  # every task vector was zero, or they cancelled: merged = base
            return 0.0
        return sum(norms.experts) / len(norms.experts) / norms.running

    def _fold(self, s_matrix: Tensor, d: Tensor) -> Tensor:
        """Return S + clean(S, D). The decomposition is float64; U and V are orthonormal, so that products with them
        keep the precision of D, in which they are taken: what block and diagonal take from it is (UC) V'."""
        if not s_matrix.any():  # nothing to keep off from
            return d
        if not d.any():
            return s_matrix
        q, n = d.shape
        if q > n:
            return self._fold(s_matrix.T, d.T).T
        u, s = left_singular(s_matrix)
        r = self._rank(s)
        if self.variant == "block":  # reads no direction beyond these
            u, s = u[:, :r], s[:r]
        vh, u = right_rows(u, s, s_matrix), u.to(d.dtype)
        kept = (s_matrix + d).addmm_(self._u_c(u, d @ vh.T, r), vh, alpha=-1)
        if self.variant == "paper":
            kept.addmm_(u[:, :r], u[:, :r].T @ d, alpha=-1)
        return kept

    def _u_c(self, u: Tensor, d_v: Tensor, r: int) -> Tensor:
        """Return UC (q, k), C being the entries of A = U'DV to remove; in `paper`, U_r U_r' D has those of i < r."""
        u_c = u * (u * d_v).sum(0)
        lead, turned = u[:, :r], d_v[:, :r]
        block = lead @ (lead.T @ turned)
        u_c[:, :r] = turned - block if self.variant == "paper" else block
        return u_c

    def _rank(self, s: Tensor) -> int:
        """Return r, the number of leading singular directions that are protected as a block."""
        if self.alpha >= 1:
            return len(s)
        share = s.cumsum(0) / s.sum()
        if self.variant == "paper":
            return min(int((share < self.alpha).sum()) + 1, len(s))
        return int((share <= self.alpha).sum())
