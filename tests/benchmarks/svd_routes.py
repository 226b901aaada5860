"""Ways to decompose a running matrix: their time, and what an OPCM projection built on each gets wrong.

    python tests/benchmarks/svd_routes.py                  on one core, and on CUDA too where there is one; 3 minutes
    python tests/benchmarks/svd_routes.py --largest 600    only shapes whose smaller side is at most that

Prints two Markdown tables. Inputs are float32, with singular values from 1 down to 10^-2, 10^-5 and 10^-8, evenly on a
logarithmic scale. Errors are |removed - reference| / |reference| of what OPCM removes from a random matrix, for the
leading block (half of the nuclear norm) and for the diagonal beyond it; the reference is a float64 SVD on the CPU. The
second table has whole updates by OPCM's variants, and a Gram route that computes the leading eigenvectors alone.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: rules run on one BLAS thread for each worker

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_contmerge.merge_rules import Weight
from hf_contmerge.merge_rules._linear import NUMERICAL_RANK, by_gram
from hf_contmerge.merge_rules.opcm import Opcm

SHAPES = {
    "core of a LoRA stream": (64, 64),
    "slice of an expert stack": (256, 1024),
    "wide": (576, 1536),
    "tall": (1536, 576),
    "square": (1024, 1024),
    "very wide": (512, 4096),
    "large": (2048, 2048),
}
DECADES = (2, 5, 8)
ALPHA = 0.5

Factors = tuple[Tensor, Tensor, Tensor | None]
"""U (q, q), s (q,) and V (n, q) of X (q, n), q <= n; V is None where the route does not need it."""
Route = Callable[[Tensor], Factors]


@dataclass(frozen=True)
class Case:
    """One running matrix (q, n), q <= n, a task vector, and what is to be removed from it: block and diagonal."""

    running: Tensor
    task_vector: Tensor
    reference: tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=10**6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA"
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread; {card}.\n")
    spectra = " / ".join(f"{d}" for d in DECADES)
    print(f"| shape | route | ms | error of the block, {spectra} decades | error of the diagonal, {spectra} decades |")
    print("|---|---|---|---|---|")
    for what, shape in SHAPES.items():
        if min(shape) <= args.largest:
            cases = [draw(shape, decades) for decades in DECADES]
            for name, route in routes().items():
                print(f"| {what}, {shape[0]} x {shape[1]} | {name} | {measure(route, cases)} |", flush=True)
    print("\nWhole updates; S and D of normal noise, in float32 (`block`) or float64.\n")
    print("| shape | r of q | block, ms | fusionbench / block | paper / block | eigh alone / block | partial / eigh |")
    print("|---|---|---|---|---|---|---|")
    for what, shape in SHAPES.items():
        if min(shape) <= args.largest:
            print(f"| {what}, {shape[0]} x {shape[1]} | {updates(shape)} |", flush=True)


def updates(shape: tuple[int, int]) -> str:
    """Return the cells of a shape: ratios of processor times, all measured in turns."""
    generator, weight = torch.Generator().manual_seed(0), Weight("w", True, 2)
    s, d = (torch.randn(shape, generator=generator) for _ in range(2))
    x = s if shape[0] <= shape[1] else s.T
    gram = x.double() @ x.T.double()
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    r = int((values.cumsum(0) / values.sum() <= ALPHA).sum())
    ways: dict[str, Callable[[], object]] = {
        "block": lambda: Opcm(variant="block").update(s, d, weight),
        "fusionbench": lambda: Opcm(variant="fusionbench").update(s.double(), d.double(), weight),
        "paper": lambda: Opcm(variant="paper").update(s.double(), d.double(), weight),
        "eigh": lambda: torch.linalg.eigh(gram),
        "partial": lambda: leading(gram.numpy(), r),
    }
    spent: dict[str, float] = {}
    for _ in range(3):
        for name, way in ways.items():
            start = time.process_time()
            way()
            spent[name] = min(spent.get(name, math.inf), time.process_time() - start)
    block, eigh = spent["block"], spent["eigh"]
    ratios = (spent["fusionbench"] / block, spent["paper"] / block, eigh / block, spent["partial"] / eigh)
    return f"{r} of {len(x)} | {1000 * block:.3g} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios)


def leading(gram: Any, r: int) -> Any:
    """Return all eigenvalues and the leading eigenvectors: LAPACK's tridiagonal form, then r vectors alone.

    SciPy's calls hold Python's lock, so that the workers of a merge would wait for each other.
    """
    from scipy.linalg import lapack

    q = len(gram)
    form, diagonal, beside, tau, _ = lapack.dsytrd(gram, lower=1, lwork=64 * q)
    values, _ = lapack.dsterf(diagonal.copy(), beside.copy())
    _, _, vectors, _ = lapack.dstemr(diagonal, np.append(beside, 0.0), 2, 0.0, 1.0, q - r + 1, q, compute_v=1)
    vectors = np.asfortranarray(vectors[:, :r])
    vectors[1:] = lapack.dormqr("L", "N", np.asfortranarray(form[1:, :-1]), tau, vectors[1:].copy("F"), 64 * r)[0]
    return values, vectors


def routes() -> dict[str, Route]:
    """Return the ways to decompose, each by what the table calls it."""
    ways: dict[str, Route] = {
        "float32 SVD (gesdd)": svd(torch.float32),
        "float32 SVD, taller side": svd(torch.float32, taller=True),
        "float64 SVD (gesdd), the reference": svd(torch.float64),
        "float64 SVD, taller side": svd(torch.float64, taller=True),
        "float64 Gram, eigh": lambda x: (*by_gram(x), None),
    }
    if torch.cuda.is_available():
        ways["CUDA float64 Gram, eigh"] = lambda x: (*by_gram(x.cuda()), None)
        for driver in ("gesvd", "gesvdj", "gesvda"):
            for dtype in (torch.float32, torch.float64):
                ways[f"CUDA {str(dtype).removeprefix('torch.')} {driver}"] = svd(dtype, driver=driver)
    return ways


def svd(dtype: torch.dtype, *, taller: bool = False, driver: str | None = None) -> Route:
    """Return a thin SVD as a route: of X (q, n) or of its transpose, on the CPU, or by a driver on CUDA."""

    def route(x: Tensor) -> Factors:
        x = (x.cuda() if driver else x).to(dtype)
        if taller:
            v, s, uh = torch.linalg.svd(x.T.contiguous(), full_matrices=False, driver=driver)
            return uh.T, s, v
        u, s, vh = torch.linalg.svd(x, full_matrices=False, driver=driver)
        return u, s, vh.T

    return route


def draw(shape: tuple[int, int], decades: int) -> Case:
    """Make a case (smaller side first), with its reference from a float64 SVD."""
    generator = torch.Generator().manual_seed(decades)
    q, n = sorted(shape)
    left, right = (torch.randn(k, q, generator=generator, dtype=torch.float64) for k in (q, n))
    s = torch.logspace(0, -decades, q, dtype=torch.float64)
    running = ((torch.linalg.qr(left).Q * s) @ torch.linalg.qr(right).Q.T).float()
    task_vector = torch.randn(q, n, generator=generator)
    if shape != (q, n):  # as it lies in memory when a tall matrix is transposed
        running = running.T.contiguous().T
    return Case(running, task_vector, removed(svd(torch.float64)(running), running, task_vector))


def removed(factors: Factors, running: Tensor, task_vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a projection built on these factors takes from a task vector: block and diagonal, in float64."""
    u, s = (f.cpu().double() for f in factors[:2])
    v = running.double().T @ u / s.clamp_min(1e-300) if factors[2] is None else factors[2].cpu().double()
    coefficients = u.T @ task_vector.double() @ v
    r, k = int((s.cumsum(0) / s.sum() <= ALPHA).sum()), int((s > NUMERICAL_RANK * s[0]).sum())
    block = u[:, :r] @ coefficients[:r, :r] @ v[:, :r].T
    return block, (u[:, r:k] * coefficients.diagonal()[r:k]) @ v[:, r:k].T


def measure(route: Route, cases: list[Case]) -> str:
    """Return the cells of a route: the median time over the spectra (best of two each), and its errors."""
    times, errors = [], list[list[float]]()
    for case in cases:
        spent = [seconds(route, case.running) for _ in range(2)]
        times.append(min(s for s, _ in spent))
        parts = removed(spent[0][1], case.running, case.task_vector)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(parts, case.reference, strict=True)])
    cells = [f"{1000 * statistics.median(times):.3g}"]
    cells += [" / ".join(f"{e[k]:.0e}" for e in errors) for k in (0, 1)]
    return " | ".join(cells)


def seconds(route: Route, x: Tensor) -> tuple[float, Factors]:
    start = time.perf_counter()
    factors = route(x)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, factors


if __name__ == "__main__":
    main()
