"""Linear algebra for rules that decompose matrices: float64, on the smaller side, never completed to a square basis.

One route serves all shapes: eigh of the smaller side's float64 Gram matrix. On each of seven shapes, from 64 x 64 to
2048 x 2048 and 512 x 4096 (tests/benchmarks/svd_routes.py, float32, one thread), it is faster than LAPACK's SVD of the
taller side, 1.6 to 4 times than the float64 one and 1.1 to 2.3 times than the float32 one, and more exact than float32.
Largest errors of what an OPCM projection removes, relative to it, over 2, 5 and 8 decades of spectrum:

    leading block           Gram 1e-14                  float32 SVD 5e-6
    diagonal beyond it      Gram 2e-11, 3e-6, 1e-3      float32 SVD 3e-4, 0.3, 0.5

What follows the decomposition are products with orthonormal bases, which lose nothing: they are taken in the dtype of
the inputs, float32 in a merge. That adds 2e-7 to 1e-6 of |D| and saves a quarter of the time (768 x 2048: 0.19 s
against 0.25 s). The float64 SVD steps in where eigh does not converge. CUDA takes the same route; the benchmark
times its drivers beside it where there is a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

NUMERICAL_RANK = 1e-6
"""Singular directions below this share of the largest are rounding: their basis, and so a projection, is arbitrary."""

CLEAR = 1e-3
"""Singular directions above this share of the largest come out of float32 products with five digits or more."""

_COLUMNS, _ROWS = 1024, 256  # of the pieces in which a matrix is copied to float64, and a Gram matrix filled


def slice_by_slice(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return work(*tensors) of matrices; of 3-D stacks, the stack of what it returns for each slice."""
    if tensors[0].ndim == 3:
        return torch.stack([work(*matrices) for matrices in zip(*tensors, strict=True)])
    return work(*tensors)


def left_singular(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (q, k) and s (k,) of X (q, n), q <= n, X not zero: float64, descending, cut at the numerical rank k."""
    try:
        u, s = by_gram(x)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        u, s = by_svd(x)
    k = int((s > NUMERICAL_RANK * s[0]).sum())
    return u[:, :k], s[:k]


def by_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (q, q) and s (q,) of X (q, n), q <= n, float64 and descending, by eigh of X X'."""
    w, u = torch.linalg.eigh(_gram(x))
    return u.flip(1), w.flip(0).clamp_min(0).sqrt()


def by_svd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (q, q) and s (q,) of X (q, n), q <= n, float64 and descending, by an SVD of the taller side."""
    _, s, uh = torch.linalg.svd(x.T.double(), full_matrices=False)
    return uh.T, s


def right_singular(x: Tensor, rank: int) -> Tensor:
    """Return V (n, r) of X (m, n), X not zero, float64: its leading right singular vectors, r <= rank, X's own rank."""
    if len(x) >= x.shape[1]:
        return left_singular(x.T)[0][:, :rank]
    u, s = left_singular(x)
    return times_transposed(x.T, (u / s)[:, :rank].T)


def right_rows(u: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """Return V' (k, n) = U'X / s, rounded to the dtype of X (q, n), from U (q, k) and s (k,), float64 and descending.

    Rounding a product in that dtype costs a direction s_1 / s_i times its precision: only those of little weight are
    computed in float64.
    """
    clear = int((s > CLEAR * s[0]).sum()) if len(s) else 0
    rows = torch.empty(len(s), x.shape[1], dtype=x.dtype, device=x.device)
    torch.mm(u[:, :clear].T.to(x.dtype), x, out=rows[:clear])
    rows[:clear].div_(s[:clear, None].to(x.dtype))
    rows[clear:] = times_transposed(u[:, clear:].T, x.T) / s[clear:, None]
    return rows


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return A B' (p, q) of A (p, n) and B (q, n), in float64."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for piece in _pieces(a.shape[1]):
        total.addmm_(a[:, piece].double(), b[:, piece].double().T)
    return total


def summed(plus: Sequence[Tensor], *, minus: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Return the sum of `plus` (m, n) less all A (m, k) @ B (k, n) of `minus`, rounded once, to the dtype of `like`."""
    out = torch.empty_like(like)
    for piece in _pieces(like.shape[1]):
        total = torch.zeros_like(out[:, piece], dtype=torch.float64)
        for term in plus:
            total += term[:, piece]
        for a, b in minus:
            total.addmm_(a, b[:, piece].double(), alpha=-1)
        out[:, piece] = total
    return out


def _gram(x: Tensor) -> Tensor:
    """Return the lower triangle of X X' (q, q), in float64; eigh does not read the rest."""
    total = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for piece in _pieces(x.shape[1]):
        wide = x[:, piece].double()
        for start in range(0, len(x), _ROWS):
            stop = start + _ROWS
            total[start:stop, :stop].addmm_(wide[start:stop], wide[:stop].T)
    return total


def _pieces(n: int) -> Iterator[slice]:
    for start in range(0, n, _COLUMNS):
        yield slice(start, start + _COLUMNS)
