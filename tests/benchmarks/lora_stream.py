"""A stream of LoRA adapters at 7B shapes: the factored fold of all modules against the dense one.

    python tests/benchmarks/lora_stream.py                     Llama-2-7B, 16 adapters of rank 16 on all linear maps
    python tests/benchmarks/lora_stream.py --layers 1          one layer only: the same ratios

Prints Markdown. Every module is really folded in factors (random adapters, made module by module; that is not counted),
by two threads with one BLAS thread each. The dense path, `rule.update` on float32 matrices, is measured for two appends
on one module of each shape and scaled to all modules and appends. Relative errors are those of the running sum against
OPCM's definition in float64, on the same modules after the same appends.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: one BLAS thread for each worker

import argparse
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Weight, get_rule
from hf_contmerge.merging._factored import Factors, fold_factors

HIDDEN, INTERMEDIATE = 4096, 11008
LAYER = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HIDDEN),
    "v_proj": (HIDDEN, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
WORKERS = 2
NUMERICAL_RANK = 1e-6  # of the rule

Shape = tuple[int, int]
Svd = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Spent:
    """Seconds of one fold: on the clock and of the thread's processor time."""

    shape: Shape
    worker: int
    wall: float
    cpu: float


@dataclass(frozen=True)
class Dense:
    """What one module of a shape showed: processor seconds of an append, and the two paths' errors."""

    append: float
    error: float
    factored_error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rule = get_rule("opcm")
    before = peak_memory()
    spent = fold_all(rule, args.layers, args.adapters, args.rank)
    peak = peak_memory()
    print(f"{args.adapters} adapters of rank {args.rank}, Llama-2-7B shapes, {args.layers} layers, {rule}, random.")
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores.\n")
    print(f"Gram form of the reference against LAPACK's SVD, 1024 x 2752: {gram_error(args.rank):.1e}\n", flush=True)
    dense = {shape: measure_dense(rule, shape, args.rank) for shape in dict.fromkeys(LAYER.values())}
    report(spent, dense, appends=args.adapters - 1)
    wall = max(sum(s.wall for s in spent if s.worker == w) for w in range(WORKERS))
    print(f"\nFactored, all modules: {wall:.1f} s on the clock, {WORKERS} threads.")
    print(f"Peak memory of the process: {peak:.2f} GB; before the first fold, with torch loaded: {before:.2f} GB.")


def fold_all(rule: MergeRule, layers: int, count: int, rank: int) -> list[Spent]:
    """Fold every module of the model; the states are dropped, as the engine drops what it has written."""
    todo = iter([(f"{i}.{name}", shape) for i in range(layers) for name, shape in LAYER.items()])
    lock, spent = threading.Lock(), list[Spent]()

    def work(worker: int) -> None:
        for name, shape in one_at_a_time(todo, lock):
            experts = adapters(shape, count, rank, seed=name)
            wall, cpu = time.perf_counter(), time.thread_time()
            fold_factors(rule, None, experts, Weight(name, True, 1))
            spent.append(Spent(shape, worker, time.perf_counter() - wall, time.thread_time() - cpu))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(spent) == layers * len(LAYER), "a worker failed"
    return spent


def one_at_a_time(items: Iterator[tuple[str, Shape]], lock: threading.Lock) -> Iterator[tuple[str, Shape]]:
    while True:
        with lock:
            item = next(items, None)
        if item is None:
            return
        yield item


def adapters(shape: Shape, count: int, rank: int, *, seed: str) -> list[Factors]:
    generator = torch.Generator().manual_seed(sum(ord(c) * 131**i for i, c in enumerate(seed)) % 2**31)
    m, n = shape
    return [
        (torch.randn(m, rank, generator=generator), 0.01 * torch.randn(rank, n, generator=generator))
        for _ in range(count)
    ]


def measure_dense(rule: MergeRule, shape: Shape, rank: int) -> Dense:
    """Fold three experts densely; the first is taken whole and costs nothing, the other two are timed."""
    experts = adapters(shape, 3, rank, seed=str(shape))
    running, cpu = torch.zeros(shape), []
    for stage, (left, right) in enumerate(experts, 1):
        start = time.thread_time()
        running = rule.update(running, left @ right, Weight("w", True, stage))
        cpu.append(time.thread_time() - start)
    exact = fold_by_definition(experts, gram_svd)
    factored, _ = fold_factors(rule, None, experts, Weight("w", True, 1))
    return Dense(sum(cpu[1:]) / 2, relative(running, exact), relative(factored.dense(), exact))


def fold_by_definition(experts: Sequence[Factors], svd: Svd, alpha: float = 0.5) -> Tensor:
    """OPCM (`block`) in float64: the leading block of each D in S's singular bases goes."""
    first, *others = (left.double() @ right.double() for left, right in experts)
    running = first
    for d in others:
        u, s, v = svd(running)
        coefficients = u.T @ d @ v
        r = int((s.cumsum(0) / s.sum() <= alpha).sum())
        struck = torch.zeros_like(coefficients)
        struck[:r, :r] = coefficients[:r, :r]
        running = running + d - u @ struck @ v.T
    return running


def lapack_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u, s, vh.T


def gram_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the eigenvectors of X X' or X'X; singular values below NUMERICAL_RANK / 100 count as none."""
    if x.shape[0] > x.shape[1]:
        u, s, v = gram_svd(x.T)
        return v, s, u
    w, u = torch.linalg.eigh(x @ x.T)
    s, u = w.flip(0).clamp_min(0).sqrt(), u.flip(1)
    some = int((s > NUMERICAL_RANK / 100 * s[0]).sum())
    s, u = s[:some], u[:, :some]
    return u, s, (x.T @ u) / s


def gram_error(rank: int) -> float:
    """Return how far the Gram form is from LAPACK's SVD where that is quick."""
    experts = adapters((1024, 2752), 4, rank, seed="check")
    return relative(fold_by_definition(experts, gram_svd), fold_by_definition(experts, lapack_svd))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def report(spent: Sequence[Spent], dense: dict[Shape, Dense], *, appends: int) -> None:
    """Print a line for each shape and one for all of them."""
    print(
        "| shape | modules | factored, CPU s | dense, CPU s per append | dense, scaled, CPU s | times faster |", end=""
    )
    print(" error, factored | error, dense |\n|---|---|---|---|---|---|---|---|")
    totals = [0.0, 0.0]
    for shape, found in dense.items():
        each = [s.cpu for s in spent if s.shape == shape]
        scaled = found.append * appends * len(each)
        totals = [totals[0] + sum(each), totals[1] + scaled]
        line = f"| {shape[0]} x {shape[1]} | {len(each)} | {sum(each):.1f} | {found.append:.1f} | {scaled:.0f} |"
        print(f"{line} {scaled / sum(each):.0f} | {found.factored_error:.1e} | {found.error:.1e} |")
    worst = max(found.factored_error for found in dense.values()), max(found.error for found in dense.values())
    print(f"| all | {len(spent)} | {totals[0]:.1f} | | {totals[1]:.0f} | {totals[1] / totals[0]:.0f} |", end="")
    print(f" {worst[0]:.1e} | {worst[1]:.1e} |")


def peak_memory() -> float:
    """Return the process's peak resident memory in GB (10^9 bytes; Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
