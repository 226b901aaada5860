"""A weight's state under low-rank experts: left @ core @ right'.

A `basis_free` rule does the same to U S V' as to S, for any U and V with orthonormal columns. So with the directions of
all experts so far as the columns of `left` and `right`, the rule's own update is applied to small cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Weight
from hf_contmerge.merging.trust import nudged

TOLERANCE = 5e-7
"""An expert's new directions are left out if together they carry at most this share of its norm. A factor in the span
of the float32 directions leaves 3e-8 to 6e-8 there by rounding alone; and 16 experts may add up to less than 1e-5."""

_CANCELLED = 1e-9  # of |left| |right|: the same for factors whose columns cancel each other, which is rounding by then
_COLUMNS_AT_ONCE = 512  # of new factors: bounds the float64 copies in flight, whatever the number of experts

Factors = tuple[Tensor, Tensor]
"""An expert's task vector left @ right: left (m, r), right (r, n), floating."""


@dataclass(frozen=True)
class Factored:
    """S = left @ core @ right'.

    `left` (m, R) and `right` (n, R), float32, have orthonormal columns, to float32's rounding. `core` (R, R) is
    float64: it is small, and singular vectors whose values lie close together, which OPCM asks for, turn with its last
    digits (over 16 experts, a float32 core costs two digits of OPCM's result).
    """

    left: Tensor
    core: Tensor
    right: Tensor
    shadow: Tensor | None = None
    """A second core, of a state that started next to this one (trust.py)."""

    @classmethod
    def zeros(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> Factored:
        """Return the state (m, n) before the first expert, of rank 0."""
        m, n = shape
        left, right = (torch.zeros(k, 0, device=device) for k in (m, n))
        return cls(left, torch.zeros(0, 0, dtype=torch.float64, device=device), right)

    @property
    def shape(self) -> torch.Size:
        """(m, n)."""
        return torch.Size((len(self.left), len(self.right)))

    @property
    def rank(self) -> int:
        """R, at most min(m, n); the matrix's own rank may be less."""
        return len(self.core)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.core.nbytes + self.right.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix, (m, n)."""
        return self._product(self.core, dtype)

    def dense_shadow(self) -> Tensor | None:
        """Return the shadow's matrix in float64, if any."""
        return None if self.shadow is None else self._product(self.shadow, torch.float64)

    def _product(self, core: Tensor, dtype: torch.dtype) -> Tensor:
        return self.left.to(dtype) @ core.to(dtype) @ self.right.to(dtype).T

    def norm(self) -> float:
        """Return the Frobenius norm, summed in float64."""
        return float(torch.linalg.vector_norm(self.core, dtype=torch.float64))

    def truncated(self, rank: int | None) -> tuple[Tensor, Tensor, float]:
        """Return the best rank-r approximation as left (m, r), right (r, n).

        Args:
            rank: at most that many directions, fewer if there are no more. None: as many as it takes to leave out no
                more than TOLERANCE.

        Returns:
            left, right and |S - left @ right| / |S|, the singular values left out (0 for S = 0).
        """
        u, s, vh = torch.linalg.svd(self.core.double(), full_matrices=False)
        total = float(s.norm())
        r = _count(s, TOLERANCE * total) if rank is None else min(rank, len(s))
        root = s[:r].sqrt()
        left = self.left.double() @ (u[:, :r] * root)
        right = (root[:, None] * vh[:r]) @ self.right.double().T
        return left.float(), right.float(), float(s[r:].norm()) / total if total else 0.0


def fold_factors(
    rule: MergeRule,
    before: Factored | None,
    experts: Sequence[Factors | None],
    weight: Weight,
    *,
    rules: Sequence[MergeRule] = (),
    shadow: bool = False,
) -> tuple[Factored, list[float]]:
    """Fold low-rank experts into the state of one weight.

    Args:
        rule: a rule that is `basis_free`; it is given the cores in float64.
        before: the state so far; None before the first expert. It is not changed.
        experts: left (m, r) and right (r, n) of each, in stage order, in any floating dtype; None for an expert that
            does not touch this weight, whose task vector is zero.
        weight: as the first of these experts meets it.
        rules: of each expert, where they differ in fields `of_newest`.
        shadow: start a shadow, if there is no state yet.

    Returns:
        The state after all of them, and each expert's Frobenius norm.

    Raises:
        ValueError: a rule that is not `basis_free`, factors that are not finite or do not fit, or no factors at all
            and no state to tell the weight's shape.
    """
    if not rule.basis_free:
        raise ValueError(f"{type(rule).__name__} is not basis_free: {weight.name} cannot be kept as factors")
    state = before or _zeros_like_first(experts, weight.name)
    for stage, factors in enumerate(experts, weight.stage):
        if factors is not None:
            _check(factors, state.shape, f"{weight.name}, the adapter of stage {stage}")
    norms: list[float] = []
    rules = rules or [rule] * len(experts)
    for batch in _batches(experts):
        first = replace(weight, stage=weight.stage + len(norms))
        state, found = _fold_batch(rules[len(norms) :], state, batch, first, shadow)
        norms += found
    return state, norms


def pays(shape: Sequence[int], rank: int) -> bool:
    """Say if factors take at most half the dense bytes.

    Measured for appends of rank 16 to weights of 1024 x 1024 to 4096 x 11008, on one core: sums take as long as on a
    dense state where the factors take 0.28 of its bytes, and twice as long at 0.55, while the state that is read and
    written shrinks with the bytes. A rule that decomposes its state gains by factors up to that limit and beyond.
    """
    m, n = shape
    return 2 * (4 * rank * (m + n) + 8 * rank**2) <= 4 * m * n


@dataclass(frozen=True)
class _Side:
    """Stacked factors of experts: factors = old @ inside + new @ outside.

    `old` (m, R) float32 are the directions held so far, `new` (m, q) float64 orthonormal ones that are orthogonal to
    them; `outside` (q, K) is upper triangular, so that the first k factors need the first k new directions only.
    """

    old: Tensor
    new: Tensor
    inside: Tensor
    outside: Tensor
    widths: list[int]

    @classmethod
    def split(cls, old: Tensor, factors: Sequence[Tensor]) -> _Side:
        """Project twice, then QR, in float64: once leaves remainders."""
        rest = torch.cat([f.double() for f in factors], dim=1)
        inside = rest.new_zeros(old.shape[1], rest.shape[1])
        wide = old.double()
        for _ in range(2 if len(inside) else 0):
            part = wide.T @ rest
            rest -= wide @ part
            inside += part
        new, outside = torch.linalg.qr(rest)
        return cls(old, new, inside, outside, [f.shape[1] for f in factors])

    def triangles(self) -> list[Tensor]:
        """Return T (r, r) per expert: |factor @ x| = |T @ x|."""
        coordinates = torch.cat([self.inside, self.outside])
        return [torch.linalg.qr(c, mode="r").R for c in coordinates.split(self.widths, dim=1)]

    def reduced(self, weights: Sequence[Tensor], allowed: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """Drop new directions without weight in the experts.

        Args:
            weights: the other side's triangles: factor @ weight' is as large as the expert in every direction.
            allowed: the norm of what may be left out, of each expert.

        Returns:
            All directions (m, R'), float32, and per expert the coordinates of its factor in those that it and the
            experts before it need (R_t, r), float64.
        """
        kept = self.outside.new_zeros(len(self.outside), 0)
        counts, whole, room = [], True, len(self.old) - self.old.shape[1]
        for block, weight, most in zip(self.outside.split(self.widths, dim=1), weights, allowed, strict=True):
            rest = block @ weight.T
            for _ in range(2):
                rest = rest - kept @ (kept.T @ rest)
            u, s, _ = torch.linalg.svd(rest, full_matrices=False)
            more = min(_count(s, most), room - kept.shape[1])
            whole = whole and more == min(block.shape[1], len(kept) - kept.shape[1])
            kept = torch.cat([kept, u[:, :more]], dim=1)
            counts.append(self.old.shape[1] + kept.shape[1])
        # With nothing left out, the QR's own directions span, expert by expert, what `kept` does.
        new, outside = (self.new, self.outside) if whole else (self.new @ kept, kept.T @ self.outside)
        coordinates = torch.cat([self.inside, outside]).split(self.widths, dim=1)
        parts = [c[:count] for c, count in zip(coordinates, counts, strict=True)]
        return torch.cat([self.old, new.float()], dim=1), parts


def _fold_batch(
    rules: Sequence[MergeRule], state: Factored, experts: Sequence[Factors | None], first: Weight, shadow: bool
) -> tuple[Factored, list[float]]:
    m, n = state.shape
    nothing = state.left.new_zeros(m, 0), state.right.new_zeros(0, n)
    pairs = [factors or nothing for factors in experts]
    left = _Side.split(state.left, [a for a, _ in pairs])
    right = _Side.split(state.right, [b.T for _, b in pairs])
    left_weights, right_weights = right.triangles(), left.triangles()
    norms = [float((a @ b.T).norm()) for a, b in zip(left_weights, right_weights, strict=True)]
    noise = [_CANCELLED * float(a.norm() * b.norm()) for a, b in zip(left_weights, right_weights, strict=True)]
    allowed = [max(TOLERANCE * norm, least) for norm, least in zip(norms, noise, strict=True)]
    left_basis, left_parts = left.reduced(left_weights, allowed)
    right_basis, right_parts = right.reduced(right_weights, allowed)
    cores = [core.double() for core in (state.core, state.shadow) if core is not None]
    for k, (a, b) in enumerate(zip(left_parts, right_parts, strict=True)):
        cores = [_grown(rules[k], core, a @ b.T, replace(first, stage=first.stage + k)) for core in cores]
        if shadow and len(cores) == 1 and cores[0].any():
            cores.append(nudged(cores[0], first.name))
    return _square(Factored(left_basis, cores[0], right_basis, *cores[1:])), norms


def _grown(rule: MergeRule, core: Tensor, change: Tensor, weight: Weight) -> Tensor:
    """Fold a change (R, Q) into a core of its size."""
    wide = core.new_zeros(change.shape)
    wide[: core.shape[0], : core.shape[1]] = core
    folded = rule.update(wide, change, weight) if wide.numel() else wide
    assert isinstance(folded, Tensor)
    return folded.double()


def _square(state: Factored) -> Factored:
    """Make the core (R, Q) square if experts share one side.

    A core that is square keeps its directions as they are: they are written once. Others come from a new QR, so that
    rounding to float32 does not build up in either case.
    """
    rows, columns = state.core.shape
    if rows < columns:
        return _transposed(_square(_transposed(state)))
    if rows == columns:
        return state
    q, small = torch.linalg.qr(state.core)
    basis, turn = torch.linalg.qr(state.left.double() @ q)
    shadow = None if state.shadow is None else turn @ (q.T @ state.shadow)
    return Factored(basis.float(), turn @ small, state.right, shadow)


def _transposed(state: Factored) -> Factored:
    return Factored(state.right, state.core.T, state.left, None if state.shadow is None else state.shadow.T)


def _count(s: Tensor, allowed: float) -> int:
    """Return the number of leading singular values to keep."""
    return int((s.square().flip(0).cumsum(0).sqrt() > allowed).sum())


def _batches(experts: Sequence[Factors | None]) -> Iterator[Sequence[Factors | None]]:
    """Yield experts in order, in groups of _COLUMNS_AT_ONCE columns."""
    start = columns = 0
    for k, factors in enumerate(experts):
        width = factors[0].shape[1] if factors else 0
        if k > start and columns + width > _COLUMNS_AT_ONCE:
            yield experts[start:k]
            start, columns = k, 0
        columns += width
    if experts:
        yield experts[start:]


def _zeros_like_first(experts: Sequence[Factors | None], name: str) -> Factored:
    known = next((factors for factors in experts if factors is not None), None)
    if known is None:
        raise ValueError(
            f"{name}: no adapter touches it, which leaves its shape open; start from Factored.zeros(shape)"
        )
    return Factored.zeros((known[0].shape[0], known[1].shape[1]), known[0].device)


def _check(factors: Factors, shape: Sequence[int], where: str) -> None:
    left, right = factors
    if (left.shape[0], right.shape[1]) != tuple(shape) or left.shape[1] != right.shape[0]:
        raise ValueError(f"{where}: factors {tuple(left.shape)} and {tuple(right.shape)} do not give {tuple(shape)}")
    for side, factor in (("left", left), ("right", right)):
        bad = factor.numel() - int(torch.isfinite(factor).sum())
        if bad:
            raise ValueError(f"{where}: {bad} values of its {side} factor are NaN or infinite")
