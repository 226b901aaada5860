"""OPCM: orthogonal projection of each expert before adding.

Tang et al., "Merging Models on the Fly Without Retraining", NeurIPS 2025, arXiv 2501.09522.
The published recursion with lambda_t equals the form below to 3e-14: the projection does not depend on the running
sum's scale, so one scalar at the end is enough.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merge_rules._linear import NUMERICAL_RANK as NUMERICAL_RANK
from hf_contmerge.merge_rules._linear import left_singular, right_rows, slice_by_slice


@dataclass(frozen=True)
class Opcm(MergeRule):
    """S <- S + clean(S,D);  merged = base + S * mean(|D_t|)/|S|.

    Weights other than matrices are summed: clean(S, D) = D. For S = U diag(s) V', A = U'DV and c = cumsum(s) / sum(s),
    clean(S, D) removes these coefficients from D:

        block        A_ij with i < r and j < r;                 r = number of c_i <= alpha  (the authors' Jan 2025 code)
        fusionbench  A_ij with i < r and j < r, and all A_ii;   same r                      (their code today)
        paper        A_ij with i < r or  j < r, and all A_ii;   r = smallest with c_r >= alpha

    The diagonal A_ii needs each singular vector by itself. Those of close singular values turn with the last digits of
    S, so `fusionbench` and `paper` are ill-posed: rounding grows 2 to 10 times a stage. `block` needs one subspace.
    """

    reference = "https://arxiv.org/abs/2501.09522"
    start_from = "base"
    unit = "matrix"
    whole_model_scale = True
    basis_free = True
    former: ClassVar[Mapping[str, Any]] = {"variant": "fusionbench"}

    alpha: float = 0.5
    variant: Literal["block", "fusionbench", "paper"] = "block"

    @property
    def ill_posed(self) -> bool:
        return self.variant != "block"

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        if not weight.is_matrix:
            return running + task_vector
        return slice_by_slice(self._fold, running, task_vector)

    def scale(self, norms: Norms) -> float:
        if norms.running == 0:  # all task vectors are zero or cancel: merged = base
            return 0.0
        return sum(norms.experts) / len(norms.experts) / norms.running

    def _fold(self, s_matrix: Tensor, d: Tensor) -> Tensor:
        """Return S + clean(S, D).

        The decomposition is float64. U and V are orthonormal, so products with them use D's dtype without loss. Block
        and diagonal remove (UC) V'.
        """
        if not s_matrix.any():  # no directions to protect
            return d
        if not d.any():
            return s_matrix
        q, n = d.shape
        if q > n:
            return self._fold(s_matrix.T, d.T).T
        u, s = left_singular(s_matrix)
        r = self._rank(s)
        if self.variant == "block":  # uses no other directions
            u, s = u[:, :r], s[:r]
        vh, u = right_rows(u, s, s_matrix), u.to(d.dtype)
        kept = (s_matrix + d).addmm_(self._u_c(u, d @ vh.T, r), vh, alpha=-1)
        if self.variant == "paper":
            kept.addmm_(u[:, :r], u[:, :r].T @ d, alpha=-1)
        return kept

    def _u_c(self, u: Tensor, d_v: Tensor, r: int) -> Tensor:
        """Return UC, with C the removed entries of A.

        UC is (q, k), A = U'DV. For `paper`, U_r U_r' D covers the entries with i < r.
        """
        u_c = u * (u * d_v).sum(0)
        lead, turned = u[:, :r], d_v[:, :r]
        block = lead @ (lead.T @ turned)
        u_c[:, :r] = turned - block if self.variant == "paper" else block
        return u_c

    def _rank(self, s: Tensor) -> int:
        """Return r, the number of protected leading directions."""
        if self.alpha >= 1:
            return len(s)
        share = s.cumsum(0) / s.sum()
        if self.variant == "paper":
            return min(int((share < self.alpha).sum()) + 1, len(s))
        return int((share <= self.alpha).sum())
