"""Float64 linear algebra for rules with matrix decompositions.

One route serves all shapes: eigh of the smaller side's float64 Gram matrix; bases are never completed to a square. On
each of seven shapes, from 64 x 64 to 2048 x 2048 and 512 x 4096 (tests/benchmarks/svd_routes.py, float32, one thread),
it is faster than LAPACK's SVD of the taller side: 1.6 to 4 times (float64) and 1.1 to 2.3 times (float32). It is more
exact than the float32 SVD. Largest relative errors of the part removed by an OPCM projection, over 2, 5 and 8 decades
of spectrum:

    leading block           Gram 1e-14                  float32 SVD 5e-6
    diagonal beyond it      Gram 2e-11, 3e-6, 1e-3      float32 SVD 3e-4, 0.3, 0.5

Products with orthonormal bases lose no precision, so after the decomposition they use the dtype of the inputs, float32
in a merge. This adds errors of 2e-7 to 1e-6 of |D| and saves a quarter of the time (768 x 2048: 0.19 s against 0.25 s).
The float64 SVD is the fallback if eigh does not converge. CUDA uses the same route; the benchmark also times its
drivers on machines with a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

NUMERICAL_RANK = 1e-6
"""Singular directions below this share of the largest are rounding errors with an arbitrary basis."""

CLEAR = 1e-3
"""Singular directions above this share of the largest keep five digits or more in float32 products."""

_COLUMNS, _ROWS = 1024, 256  # of the pieces for float64 copies and Gram matrices


def slice_by_slice(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply `work` to matrices or slices of stacks."""
    if tensors[0].ndim == 3:
        if not len(tensors[0]):
            return tensors[0].clone()
        return torch.stack([work(*matrices) for matrices in zip(*tensors, strict=True)])
    return work(*tensors)


def left_singular(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors and values of X.

    X (q, n) is nonzero with q <= n. U (q, k) and s (k,) are float64, descending and cut at the numerical rank k.
    """
    try:
        u, s = by_gram(x)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        u, s = by_svd(x)
    k = int((s > NUMERICAL_RANK * s[0]).sum())
    return u[:, :k], s[:k]


def by_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors and values by eigh.

    X is (q, n) with q <= n; eigh decomposes X X'. U (q, q) and s (q,) are float64 and descending.
    """
    w, u = torch.linalg.eigh(_gram(x))
    return u.flip(1), w.flip(0).clamp_min(0).sqrt()


def by_svd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors and values by SVD.

    X is (q, n) with q <= n; the SVD is of the taller side. U (q, q) and s (q,) are float64 and descending.
    """
    _, s, uh = torch.linalg.svd(x.T.double(), full_matrices=False)
    return uh.T, s


def right_singular(x: Tensor, rank: int) -> Tensor:
    """Return the leading right singular vectors.

    X (m, n) is nonzero, V is (n, r); r is `rank` or X's own rank, if smaller. The result is float64.
    """
    if len(x) >= x.shape[1]:
        return left_singular(x.T)[0][:, :rank]
    u, s = left_singular(x)
    return times_transposed(x.T, (u / s)[:, :rank].T)


def right_rows(u: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """Return V' = U'X / s in X's dtype.

    U (q, k) and s (k,) are float64 and descending; X is (q, n), V' (k, n). Rounding costs direction i a factor
    s_1 / s_i of precision, so directions of little weight are computed in float64.
    """
    clear = int((s > CLEAR * s[0]).sum()) if len(s) else 0
    rows = torch.empty(len(s), x.shape[1], dtype=x.dtype, device=x.device)
    torch.mm(u[:, :clear].T.to(x.dtype), x, out=rows[:clear])
    rows[:clear].div_(s[:clear, None].to(x.dtype))
    rows[clear:] = times_transposed(u[:, clear:].T, x.T) / s[clear:, None]
    return rows


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return A B' in float64: (p, n), (q, n) -> (p, q)."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for piece in _pieces(a.shape[1]):
        total.addmm_(a[:, piece].double(), b[:, piece].double().T)
    return total


def summed(plus: Sequence[Tensor], *, minus: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Return sum(plus) less all A @ B, rounded once.

    `plus` has (m, n) tensors, `minus` pairs A (m, k), B (k, n). The result has the dtype of `like`.
    """
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
    """Return X X' in float64, lower triangle only.

    eigh does not read the rest.
    """
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
