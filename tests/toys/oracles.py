"""Every merge rule's oracle: the method over all task vectors at once, in float64, as literally as its paper has it.

Not as our code does it. Singular directions that are rounding errors are left out, as the rules' docstrings say.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def average(task_vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(task_vectors)).mean(0)


def blend(task_vectors: Sequence[Tensor], *, keep: float, take: float) -> Tensor:
    t = len(task_vectors)
    return torch.stack([take * keep ** (t - i) * d for i, d in enumerate(task_vectors, 1)]).sum(0)


def covariance(
    task_vectors: Sequence[Tensor], *, space: str, form: str, a: float, eps: float, max_inputs: int
) -> Tensor:
    assert (space, form, a, max_inputs) == ("update", "full", 0.9, 8192)
    moments = [d.T @ d for d in task_vectors]
    total = torch.stack(moments).sum(0)
    ridge = eps * total.square().sum() / total.trace() * torch.eye(len(total), dtype=total.dtype)
    inverse = (total + ridge).inverse()
    product = torch.stack([d @ g for d, g in zip(task_vectors, moments, strict=True)]).sum(0)
    return product @ inverse @ total @ inverse


def dare(task_vectors: Sequence[Tensor], *, p: float, lambda_: float, seed: int) -> Tensor:
    total = torch.zeros_like(task_vectors[0])
    for stage, d in enumerate(task_vectors, 1):
        digest = hashlib.sha256(f"{seed}/w/{stage}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        total += d * (torch.rand(d.shape, generator=generator) >= p) / (1 - p)
    return lambda_ * total


def sum_without_statistics(task_vectors: Sequence[Tensor], **_: Any) -> Tensor:
    return torch.stack(list(task_vectors)).sum(0)  # with statistics: test_data_aware.py


def mean_without_statistics(task_vectors: Sequence[Tensor], **_: Any) -> Tensor:
    return torch.stack(list(task_vectors)).mean(0)  # with statistics: test_data_aware.py


def stitch(task_vectors: Sequence[Tensor], *, sparsity: float, lambda_: float, embeddings: bool) -> Tensor:
    assert not embeddings
    kept = torch.stack(list(task_vectors))
    for d in kept:
        d[d.abs() < d.abs().quantile(1 - int(sparsity * d.numel()) / d.numel(), interpolation="higher")] = 0
    return lambda_ * kept.sum(0) / (kept != 0).sum(0).clamp_min(1)


def ema(task_vectors: Sequence[Tensor], *, beta: float) -> Tensor:
    t = len(task_vectors)
    return torch.stack([(1 - beta) * beta ** (t - i) * d for i, d in enumerate(task_vectors, 1)]).sum(0)


def numerical_rank(s: Tensor) -> int:
    """Return the number of singular values that are more than rounding."""
    return int((s > 1e-6 * s[0]).sum())


def on_slices(method: Callable[..., Tensor], task_vectors: Sequence[Tensor], **parameters: Any) -> Tensor:
    """Apply a method for matrices, to each slice of stacks."""
    if task_vectors[0].ndim < 3:
        return method(task_vectors, **parameters)
    return torch.stack([method(slices, **parameters) for slices in zip(*task_vectors, strict=True)])


def iso_c(task_vectors: Sequence[Tensor], *, alpha: float) -> Tensor:
    return on_slices(isotropic, task_vectors, alpha=alpha)


def isotropic(task_vectors: Sequence[Tensor], *, alpha: float) -> Tensor:
    u, s, vh = torch.linalg.svd(torch.stack(list(task_vectors)).sum(0), full_matrices=False)
    k = numerical_rank(s)
    return alpha * s[:k].mean() * u[:, :k] @ vh[:k] if k else torch.zeros_like(task_vectors[0])


def magmax(task_vectors: Sequence[Tensor], *, lambda_: float) -> Tensor:
    latest_first = torch.stack(list(task_vectors)).flip(0)  # argmax takes the first of equals
    return lambda_ * latest_first.gather(0, latest_first.abs().argmax(0, keepdim=True))[0]


def null_space(task_vectors: Sequence[Tensor], *, rank: int) -> Tensor:
    return on_slices(filtered, task_vectors, rank=rank)


def filtered(task_vectors: Sequence[Tensor], *, rank: int) -> Tensor:
    running = task_vectors[0]
    for d in task_vectors[1:]:
        _, s, vh = torch.linalg.svd(running, full_matrices=False)
        lead = vh[: min(rank, numerical_rank(s))]
        running = running + d @ (torch.eye(d.shape[1], dtype=d.dtype) - lead.T @ lead)
    return running


def opcm(task_vectors: Sequence[Tensor], *, alpha: float, variant: str) -> Tensor:
    """Scale a single weight, as if it were the model; finer points are in test_opcm.py."""
    return as_long_as_the_mean(on_slices(projected, task_vectors, alpha=alpha, variant=variant), task_vectors)


def as_long_as_the_mean(running: Tensor, task_vectors: Sequence[Tensor]) -> Tensor:
    mean_norm = torch.stack([d.norm() for d in task_vectors]).mean()
    return running * mean_norm / running.norm() if running.any() else running


def projected(task_vectors: Sequence[Tensor], *, alpha: float, variant: str) -> Tensor:
    running = task_vectors[0]
    for d in task_vectors[1:]:
        u, s, vh = torch.linalg.svd(running)
        k = numerical_rank(s)
        share = s[:k].cumsum(0) / s[:k].sum()
        a = u.T @ d @ vh.T
        if variant == "paper":
            r = min(int((share < alpha).sum()) + 1, k) if alpha < 1 else k
            a[:r], a[:, :r] = 0, 0
        else:
            r = int((share <= alpha).sum()) if alpha < 1 else k
            a[:r, :r] = 0
        if variant != "block":
            a[:k, :k].fill_diagonal_(0)
        running = running + u @ a @ vh
    return running


def random_mix(task_vectors: Sequence[Tensor], *, seed: int) -> Tensor:
    """Read the draws backwards: the last stage that took an element has it."""
    mixed, free = torch.zeros_like(task_vectors[0]), torch.ones_like(task_vectors[0], dtype=torch.bool)
    for stage, d in reversed(list(enumerate(task_vectors, 1))):
        digest = hashlib.sha256(f"{seed}/w/{stage}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        drawn = free & (torch.rand(d.shape, generator=generator) < 1 / stage)
        mixed[drawn], free[drawn] = d[drawn], False
    return mixed


def slao(task_vectors: Sequence[Tensor]) -> Tensor:
    shares = [1 / t**0.5 for t in range(1, len(task_vectors) + 1)]
    left = [math.prod(1 - later for later in shares[t:]) for t in range(1, len(shares) + 1)]
    return torch.stack([a * b * d for a, b, d in zip(shares, left, task_vectors, strict=True)]).sum(0)


def stitch_elsewhere(task_vectors: Sequence[Tensor], **parameters: Any) -> Tensor:
    """Leave tables (embeddings, heads) as they are."""
    table = task_vectors[0].ndim == 2
    return torch.zeros_like(task_vectors[0]) if table else stitch(task_vectors, **parameters)


def task_arithmetic(task_vectors: Sequence[Tensor], *, lambda_: float) -> Tensor:
    return lambda_ * torch.stack(list(task_vectors)).sum(0)


def ties(task_vectors: Sequence[Tensor], *, density: float, lambda_: float) -> Tensor:
    trimmed = torch.stack(list(task_vectors))
    for d in trimmed:
        d[d.abs() < d.abs().quantile(1 - int(density * d.numel()) / d.numel(), interpolation="higher")] = 0
    elected = torch.where(trimmed.sum(0) >= 0, 1, -1)
    agrees = trimmed.sign() == elected
    return lambda_ * (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


@dataclass(frozen=True)
class Oracle:
    """What a rule must equal."""

    merged_minus_base: Callable[..., Tensor]
    """For matrices and stacks; for all weights, if there is no `elsewhere`."""
    whole: dict[str, Any] | None
    """Parameters under which a single expert comes out whole; None: there are none."""
    elsewhere: Callable[..., Tensor] | None = None
    """For weights that are no matrices."""

    def of(self, task_vectors: Sequence[Tensor], *, is_matrix: bool, **parameters: Any) -> Tensor:
        """Return merged - base of one weight."""
        method = self.merged_minus_base if is_matrix else self.elsewhere or self.merged_minus_base
        return method(task_vectors, **parameters)


ORACLES = {
    "average": Oracle(average, {}),
    "blend": Oracle(blend, {"take": 1.0}),
    "covariance": Oracle(
        lambda vectors, **p: on_slices(covariance, vectors, **p), None, lambda vectors, **_: average(vectors)
    ),
    "curvature": Oracle(mean_without_statistics, {}),
    "dare": Oracle(dare, {"p": 0.0, "lambda": 1.0}),
    "ema": Oracle(ema, {"beta": 0.0}),
    "input_space": Oracle(sum_without_statistics, {}),
    "iso_c": Oracle(iso_c, None, lambda vectors, alpha: alpha * average(vectors)),
    "magmax": Oracle(magmax, {"lambda": 1.0}),
    "null_space": Oracle(null_space, {}, lambda vectors, rank: sum(vectors)),
    "opcm": Oracle(opcm, {}, lambda vectors, alpha, variant: as_long_as_the_mean(sum(vectors), vectors)),
    "random_mix": Oracle(random_mix, {}),
    "slao": Oracle(slao, {}),
    "stitch": Oracle(stitch, {"sparsity": 1.0, "embeddings": True}, stitch_elsewhere),
    "task_arithmetic": Oracle(task_arithmetic, {"lambda": 1.0}),
    "ties": Oracle(ties, {"density": 1.0}),
}
