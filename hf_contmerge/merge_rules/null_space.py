"""Null-space filtering: the data-free half of NUFILT.

Qiu et al., arXiv 2509.21413, without the trained adapter.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merge_rules._linear import right_singular, slice_by_slice, summed, times_transposed


@dataclass(frozen=True)
class NullSpace(MergeRule):
    """S <- S + D(I - VV');  merged = base + S.

    Weights other than matrices are summed. V has the leading `rank` right singular vectors of S (fewer if S has lower
    rank): the inputs with the strongest response of earlier experts. The response to these inputs is unchanged. A
    matrix with `rank` inputs or fewer is therefore closed to later experts once S has full rank; lower `rank` for
    models with such matrices.
    """

    reference = "https://arxiv.org/abs/2509.21413"
    start_from = "base"
    unit = "matrix"
    basis_free = True

    rank: int = 128

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"null_space: rank must be 0 or more (a number of directions); got {self.rank}")

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return slice_by_slice(self._fold, running, task_vector) if weight.is_matrix else running + task_vector

    def scale(self, norms: Norms) -> float:
        return 1.0

    def _fold(self, s: Tensor, d: Tensor) -> Tensor:
        if not s.any():  # no directions to protect
            return d
        if not d.any():
            return s
        vh = right_singular(s, self.rank).T
        return summed([s, d], minus=[(times_transposed(d, vh), vh)], like=d)
