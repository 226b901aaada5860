"""Input space: earlier stages' outputs on their inputs stay fixed.

Federated Orthogonal Training, Bakman et al., ICLR 2024, arXiv 2309.01289; GPM, Saha et al., ICLR 2021,
arXiv 2103.09762.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Shape, Weight, inputs_shape

_OVERSAMPLED, _ITERATIONS = 16, 4


@dataclass(frozen=True)
class InputSpace(MergeRule):
    """S <- S + D (I - M M'), M <- M and new directions;  merged = base + S.

    M holds orthonormal directions of the earlier stages' inputs, for matrices; other weights are summed. After each
    stage, leading eigenvectors of its X'X / n off M are added until M has the share `energy` of it, up to `rank` in all
    (the first ones stay). Of maps with more than 8192 inputs, M holds single channels, without a limit.
    """

    reference = "https://arxiv.org/abs/2309.01289"
    start_from = "base"
    unit = "matrix"
    linear = True
    needs = ("inputs",)

    energy: float = 0.9
    rank: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.energy <= 1:
            raise ValueError(f"input_space: energy must be between 0 and 1 (a share); got {self.energy}")
        if self.rank < 0:
            raise ValueError(f"input_space: rank must be 0 or more (a number of directions); got {self.rank}")

    def parts(self, weight: Weight) -> Mapping[str, Shape]:
        if not weight.is_matrix or len(weight.shape) != 2:  # a stack has no statistics
            return {"sum": weight.shape}
        whole = inputs_shape(weight.shape[-1])
        return {"sum": weight.shape, "inputs": (whole[0], min(self.rank, whole[0])) if len(whole) == 2 else whole}

    def update(self, running: Mapping[str, Tensor], task_vector: Tensor, weight: Weight) -> Mapping[str, Tensor]:
        total, basis = running["sum"], running.get("inputs")
        if basis is None:
            return {"sum": total + task_vector}
        off = task_vector * (1 - basis) if basis.ndim == 1 else task_vector - (task_vector @ basis) @ basis.mT
        moment = weight.statistics.get("inputs")
        return {"sum": total + off, "inputs": basis if moment is None else self._extended(basis, moment, weight)}

    def read_out(self, running: Mapping[str, Tensor], weight: Weight) -> Tensor:
        return running["sum"]

    def scale(self, norms: Norms) -> float:
        return 1.0

    def _extended(self, basis: Tensor, moment: Tensor, weight: Weight) -> Tensor:
        """Return M with the new directions of a stage's inputs."""
        wanted = self.energy * float(moment.diagonal().sum() if moment.ndim == 2 else moment.sum())
        if basis.ndim == 1:
            return self._more_channels(basis, moment, wanted)
        used = int((basis.square().sum(0) > 0.5).sum())
        room, old = basis.shape[1] - used, basis[:, :used].double()
        if not room:
            return basis
        wide = moment.double() if moment.ndim == 2 else moment.double().diag()
        inside = float((old.mT @ wide @ old).diagonal().sum()) if used else 0.0
        u, s = _leading(_off(wide, old), room, weight.name)
        new = _count(s, wanted - inside)
        added = torch.linalg.qr(u[:, :new] - old @ (old.mT @ u[:, :new])).Q
        return torch.cat([basis[:, :used], added.to(basis.dtype), basis[:, used + new :]], dim=1)

    def _more_channels(self, basis: Tensor, moment: Tensor, wanted: float) -> Tensor:
        rest, order = (moment * (1 - basis)).double().sort(descending=True)
        new = _count(rest, wanted - float((moment * basis).double().sum()))
        return basis.index_fill(0, order[:new], 1.0)


def _count(energies: Tensor, wanted: float) -> int:
    """Return the number of leading energies for the share.

    Directions without energy do not count.
    """
    if wanted <= 0 or not len(energies):
        return 0
    enough = int((energies.cumsum(0) < wanted).sum()) + 1
    return min(enough, int((energies > 1e-12 * energies[0]).sum()))


def _off(moment: Tensor, basis: Tensor) -> Tensor:
    """Return (I - MM') G (I - MM')."""
    half = moment - basis @ (basis.mT @ moment)
    return half - (half @ basis) @ basis.mT


def _leading(moment: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
    """Return leading eigenvectors and eigenvalues, descending; of large matrices, by subspace iteration."""
    n = len(moment)
    if n <= 2 * (count + _OVERSAMPLED):
        s, u = torch.linalg.eigh(moment)
        return u.flip(1)[:, :count], s.flip(0)[:count].clamp_min(0)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    draw = torch.randn(n, count + _OVERSAMPLED, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = draw.to(moment.device)
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(moment @ q).Q
    s, u = torch.linalg.eigh(q.mT @ moment @ q)
    return (q @ u.flip(1))[:, :count], s.flip(0)[:count].clamp_min(0)
