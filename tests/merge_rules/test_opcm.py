"""OPCM against its definition with full singular matrices, its published recursion, and known energies."""

from collections.abc import Sequence
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from hf_contmerge.merge_rules import Norms, Weight
from hf_contmerge.merge_rules.opcm import NUMERICAL_RANK, Opcm

VARIANTS = ("fusionbench", "block", "paper")
every_variant = pytest.mark.parametrize("variant", VARIANTS)

Model = dict[str, Tensor]
"""Name -> tensor; only names that start with "map" are linear maps."""


def weight(is_matrix: bool) -> Weight:
    return Weight("w", is_matrix, stage=2)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rank_deficient(m: int, n: int, *, rank: int) -> Tensor:
    return gaussian(m, rank, seed=1) @ gaussian(rank, n, seed=2)


def spectrum(m: int, n: int, *, decades: float) -> Tensor:
    """Return a matrix whose singular values fall evenly on a logarithmic scale, from 1 to 10^-decades."""
    q = min(m, n)
    u, v = (torch.linalg.qr(gaussian(k, q, seed=k)).Q for k in (m, n))
    return (u * torch.logspace(0, -decades, q, dtype=torch.float64)) @ v.T


def clean_by_definition(s_matrix: Tensor, d: Tensor, *, alpha: float, variant: str) -> Tensor:
    """Express D in the full bases of S, one coefficient after the other struck out as the method says."""
    u, s, vh = torch.linalg.svd(s_matrix.double(), full_matrices=True)
    a = u.T @ d.double() @ vh.T
    share = s.cumsum(0) / s.sum()
    numerical = int((s > NUMERICAL_RANK * s[0]).sum())
    if alpha >= 1:
        r = numerical
    elif variant == "paper":
        r = min(next(i for i, c in enumerate(share, 1) if c >= alpha), numerical)
    else:
        r = min(sum(1 for c in share if c <= alpha), numerical)
    i, j = torch.meshgrid(torch.arange(len(a)), torch.arange(len(a.T)), indexing="ij")
    struck = (i < r) | (j < r) if variant == "paper" else (i < r) & (j < r)
    if variant != "block":
        struck |= (i == j) & (i < numerical)
    return u @ torch.where(struck, 0, a) @ vh


def clean(s_matrix: Tensor, d: Tensor, **parameters: Any) -> Tensor:
    """Return what `update` adds to the running matrix."""
    return Opcm(**parameters).update(s_matrix, d, weight(True)) - s_matrix


def energy(part: Tensor, whole: Tensor) -> float:
    return ((part.norm() / whole.norm()) ** 2).item()


MATRICES = {
    "wide": gaussian(20, 33),
    "tall": gaussian(33, 20),
    "square": gaussian(24, 24),
    "one row": gaussian(1, 9),
    "one column": gaussian(9, 1),
    "wide, rank 5": rank_deficient(20, 33, rank=5),
    "tall, rank 5": rank_deficient(33, 20, rank=5),
    "very wide": gaussian(12, 50),
    "very tall": gaussian(50, 12),
    "very wide, rank 5": rank_deficient(12, 50, rank=5),
    "square, rank 1": rank_deficient(24, 24, rank=1),
    "one row filled": torch.nn.functional.pad(gaussian(1, 33), (0, 0, 0, 19)),
}
every_matrix = pytest.mark.parametrize("running", MATRICES.values(), ids=MATRICES.keys())


# The projection


@every_matrix
@every_variant
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0, 1.5])
def test_thin_factors_give_what_full_ones_define(running: Tensor, variant: Any, alpha: float) -> None:
    d = gaussian(*running.shape, seed=7)
    expected = clean_by_definition(running, d, alpha=alpha, variant=variant)
    torch.testing.assert_close(clean(running, d, alpha=alpha, variant=variant), expected, rtol=0, atol=1e-10)


@every_matrix
@pytest.mark.parametrize("variant", ["fusionbench", "paper"])
def test_what_is_added_is_orthogonal_to_what_was_there(running: Tensor, variant: Any) -> None:
    d = gaussian(*running.shape, seed=7)
    overlap = (clean(running, d, variant=variant) * running).sum() / running.norm() / d.norm()
    assert abs(overlap.item()) < 1e-12


@pytest.mark.parametrize(
    ("variant", "kept", "tolerance"), [("fusionbench", 0.0, 1e-12), ("paper", 0.0, 1e-12), ("block", 0.35, 0.02)]
)
def test_energy_kept_of_the_same_expert_again(variant: Any, kept: float, tolerance: float) -> None:
    s = gaussian(256, 384)
    assert energy(clean(s, s, variant=variant), s) == pytest.approx(kept, abs=tolerance)


@pytest.mark.parametrize(("variant", "kept"), [("fusionbench", 0.93), ("block", 0.93), ("paper", 0.53)])
def test_energy_kept_of_an_unrelated_expert(variant: Any, kept: float) -> None:
    s, d = gaussian(256, 384), gaussian(256, 384, seed=1)
    assert energy(clean(s, d, variant=variant), d) == pytest.approx(kept, abs=0.01)


@every_variant
def test_alpha_1_protects_all_directions_of_numerical_rank(variant: Any) -> None:
    s, d = rank_deficient(20, 33, rank=5), gaussian(20, 33, seed=7)
    kept = clean(s, d, alpha=1.0, variant=variant)
    u, _, vh = torch.linalg.svd(s)
    assert (u[:, :5].T @ kept @ vh[:5].T).abs().max() < 1e-10
    assert torch.equal(kept, clean(s, d, alpha=7.0, variant=variant))
    full_rank = gaussian(24, 24)
    assert clean(full_rank, gaussian(24, 24, seed=1), alpha=1.0, variant=variant).abs().max() < 1e-10


@every_variant
def test_the_first_expert_is_taken_whole(variant: Any) -> None:
    d = gaussian(5, 8, dtype=torch.float32)
    assert torch.equal(Opcm(variant=variant).update(torch.zeros(5, 8), d, weight(True)), d)


def _no_svd(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a decomposition was made")


@every_variant
def test_an_expert_that_did_not_change_a_matrix_costs_no_decomposition(
    variant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", _no_svd)
    monkeypatch.setattr(torch.linalg, "svd", _no_svd)
    s = gaussian(5, 8, dtype=torch.float32)
    assert Opcm(variant=variant).update(s, torch.zeros(5, 8), weight(True)) is s


def test_what_is_no_matrix_is_added_without_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", _no_svd)
    for shape in [(7,), (5, 8), (3, 5, 8)]:
        s, d = gaussian(*shape), gaussian(*shape, seed=1)
        assert torch.equal(Opcm().update(s, d, weight(False)), s + d)


@every_variant
def test_a_stack_of_experts_is_projected_slice_by_slice(variant: Any) -> None:
    s, d = gaussian(4, 6, 9, dtype=torch.float32), gaussian(4, 6, 9, seed=1, dtype=torch.float32)
    s[1], d[2] = 0, 0  # an expert untouched so far, and one that this stage did not touch
    rule = Opcm(variant=variant)
    slices = [rule.update(s[k], d[k], weight(True)) for k in range(4)]
    assert torch.equal(rule.update(s, d, weight(True)), torch.stack(slices))
    assert torch.equal(slices[1], d[1])
    assert torch.equal(slices[2], s[2])


def _does_not_converge(*_: object, **__: object) -> NoReturn:
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")  # pyright: ignore


@every_matrix
@every_variant
def test_where_eigh_fails_the_svd_steps_in(running: Tensor, variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    d = gaussian(*running.shape, seed=7)
    expected = clean(running, d, variant=variant)
    monkeypatch.setattr(torch.linalg, "eigh", _does_not_converge)
    torch.testing.assert_close(clean(running, d, variant=variant), expected, rtol=0, atol=1e-10)


# Bounds on |ours - exact| / |D| for float32 inputs, a few times what is seen: the rounding of float32 products, and for
# the diagonal over 8 decades what the Gram matrix blurs in single directions near the numerical rank.
@pytest.mark.parametrize(("decades", "bounds"), [(2, (3e-7, 3e-7)), (5, (3e-7, 1e-6)), (8, (3e-7, 5e-6))])
@pytest.mark.parametrize("n", [96, 200])
@every_variant
def test_accuracy_over_wide_spectra(variant: Any, n: int, decades: int, bounds: tuple[float, float]) -> None:
    s = spectrum(64, n, decades=decades).float()
    d = gaussian(64, n, seed=7, dtype=torch.float32)
    error = clean(s, d, variant=variant).double() - clean_by_definition(s, d, alpha=0.5, variant=variant)
    assert (error.norm() / d.norm()).item() < bounds[variant != "block"]


# The whole model


def model(seed: int, dtype: torch.dtype = torch.float64) -> Model:
    shapes = {"map.tall": (12, 7), "map.wide": (6, 15), "map.stack": (3, 5, 8), "embedding": (20, 6), "norm": (9,)}
    return {n: gaussian(*shape, seed=100 * seed + k, dtype=dtype) for k, (n, shape) in enumerate(shapes.items())}


def minus(a: Model, b: Model) -> Model:
    return {n: a[n] - b[n] for n in a}


def norm(m: Model) -> float:
    return sum(x.double().square().sum().item() for x in m.values()) ** 0.5


def fold(rule: Opcm, base: Model, experts: Sequence[Model]) -> Model:
    """Merge as merge_stream does: a running tensor per weight, and one scale at the end."""
    running, norms = {n: torch.zeros_like(x) for n, x in base.items()}, []
    for expert in experts:
        task_vector = minus(expert, base)
        norms.append(norm(task_vector))
        running = {n: rule.update(s, task_vector[n], weight(n.startswith("map"))) for n, s in running.items()}
    scale = rule.scale(Norms(tuple(norms), norm(running)))
    return {n: base[n] + scale * running[n] for n in base}


def clean_slices(s: Tensor, d: Tensor, **parameters: Any) -> Tensor:
    if d.ndim == 3:
        return torch.stack([clean_by_definition(x, y, **parameters) for x, y in zip(s, d, strict=True)])
    return clean_by_definition(s, d, **parameters)


def published_recursion(base: Model, experts: Sequence[Model], **parameters: Any) -> Model:
    """W_t = W_0 + (lambda_{t-1} (W_{t-1} - W_0) + clean(W_{t-1} - W_0, D_t)) / lambda_t, starting from W_1 = theta_1.

    lambda_1 = 1, and lambda_t is such that |W_t - W_0| is the mean norm of the task vectors so far.
    """
    merged, last, norms = experts[0], 1.0, [norm(minus(experts[0], base))]
    for expert in experts[1:]:
        change, d = minus(merged, base), minus(expert, base)
        norms.append(norm(d))
        new = {n: clean_slices(change[n], d[n], **parameters) if n.startswith("map") else d[n] for n in base}
        total = {n: last * change[n] + new[n] for n in base}
        last = norm(total) / (sum(norms) / len(norms))
        merged = {n: base[n] + total[n] / last for n in base}
    return merged


@every_variant
@pytest.mark.parametrize("alpha", [0.4, 0.6])
def test_the_fold_equals_the_published_recursion(variant: Any, alpha: float) -> None:
    base, *experts = (model(seed) for seed in range(6))
    ours = fold(Opcm(alpha=alpha, variant=variant), base, experts)
    theirs = published_recursion(base, experts, alpha=alpha, variant=variant)
    for n in base:
        torch.testing.assert_close(ours[n], theirs[n], rtol=0, atol=1e-10)


@every_variant
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_merged_model_is_as_far_from_the_base_as_the_experts_on_average(variant: Any, count: int) -> None:
    base, *experts = (model(seed, torch.float32) for seed in range(count + 1))
    distance = norm(minus(fold(Opcm(variant=variant), base, experts), base))
    mean = sum(norm(minus(e, base)) for e in experts) / count
    assert distance == pytest.approx(mean, rel=1e-6)


@every_variant
def test_one_expert_is_returned_unchanged(variant: Any) -> None:
    base, expert = model(0, torch.float32), model(1, torch.float32)
    merged = fold(Opcm(variant=variant), base, [expert])
    for n, w in base.items():
        assert torch.equal(merged[n], w + (expert[n] - w))


def test_experts_that_cancel_leave_the_base() -> None:
    base = {"norm": torch.zeros(4)}
    there, back = {"norm": torch.ones(4)}, {"norm": -torch.ones(4)}
    assert torch.equal(fold(Opcm(), base, [there, back])["norm"], base["norm"])
