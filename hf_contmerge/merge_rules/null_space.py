"""Null-space filtering: the data-free half of NUFILT (Qiu et al., arXiv 2509.21413), without its trained adapter."""

from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merge_rules._linear import right_singular, slice_by_slice, summed, times_transposed


@dataclass(frozen=True)
class NullSpace(MergeRule):
    """S <- S + D (I - VV') for matrices, S <- S + D otherwise;  merged = base + S.

    V: the leading `rank` right singular vectors of S, or as many as S has: the inputs that the earlier experts react to
    most. What they answer to these stays as it is. So a matrix with no more than `rank` inputs is closed to later
    experts once S is of full rank; lower `rank` for models with such matrices.
    """

    reference = "https://arxiv.org/abs/2509.21413"
    start_from = "base"
    unit = "matrix"
    basis_free = True

    rank: int = 128

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"null_space's rank is a number of directions, 0 or more; got {self.rank}")

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return slice_by_slice(self._fold, running, task_vector) if weight.is_matrix else running + task_vector

    def scale(self, norms: Norms) -> float:
        return 1.0

    def _fold(self, s: Tensor, d: Tensor) -> Tensor:
        if not s.any():  # nothing to keep off from
            return d
        if not d.any():
            return s
        vh = right_singular(s, self.rank).T
        return summed([s, d], minus=[(times_transposed(d, vh), vh)], like=d)
