"""`covariance`, `curvature` and `input_space` with statistics, against their formulas in float64."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, get_rule
from hf_contmerge.testing.rules import draw, weight, zeros

Statistics = Sequence[Mapping[str, Tensor]]
M, N = 12, 20


def merged(rule: MergeRule, task_vectors: Sequence[Tensor], statistics: Statistics = ()) -> Tensor:
    """Return merged - base of a matrix."""
    running: Any = zeros(rule, task_vectors[0].shape)
    for stage, d in enumerate(task_vectors, 1):
        given = statistics[stage - 1] if statistics else {}
        running = rule.update(running, d, replace(weight(True, stage, shape=d.shape), statistics=given))
    return rule.read_out(running, weight(True, len(task_vectors), shape=task_vectors[0].shape))


def inputs(seed: int, rank: int = 3 * N) -> Tensor:
    return draw((rank, N), 1, seed=seed)[0]


def moments(*seeds: int) -> list[dict[str, Tensor]]:
    return [{"inputs": inputs(s).T @ inputs(s) / (3 * N)} for s in seeds]


# covariance


@pytest.mark.parametrize("space", ["update", "inputs"])
@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_covariance_returns_one_expert_and_the_mean_of_equal_ones(space: str, form: str) -> None:
    rule, (d,) = get_rule("covariance", space=space, form=form), draw((N + 5, N), 1)
    torch.testing.assert_close(merged(rule, [d], moments(1)), d, rtol=0, atol=2e-2)
    torch.testing.assert_close(merged(rule, [d] * 3, moments(1) * 3), d, rtol=0, atol=2e-2)


def test_covariance_of_updates_adds_experts_with_orthogonal_rows() -> None:
    q = torch.linalg.qr(draw((N, N), 1)[0]).Q
    one, two = draw((M, 8), 1)[0] @ q[:8], draw((M, 8), 1, seed=2)[0] @ q[8:16]
    torch.testing.assert_close(merged(get_rule("covariance"), [one, two]), one + two, rtol=0, atol=2e-2)


def test_covariance_of_inputs_is_regmean() -> None:
    vectors, statistics = draw((M, N), 3), moments(1, 2, 3)
    grams = [0.9 * g + 0.1 * torch.diag(g.diagonal()) for g in (s["inputs"].double() for s in statistics)]
    product = sum(d.double() @ g for d, g in zip(vectors, grams, strict=True))
    wanted = product @ torch.stack(grams).sum(0).inverse()
    found = merged(get_rule("covariance", space="inputs"), vectors, statistics)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    mean = torch.stack(vectors).mean(0)
    same = merged(get_rule("covariance", space="inputs"), vectors, moments(1) * 3)
    torch.testing.assert_close(same, mean, rtol=0, atol=1e-5)


def test_covariance_of_inputs_without_energy_stays_finite() -> None:
    dead = torch.zeros(N, N)
    dead[:3, :3] = inputs(1)[:, :3].T @ inputs(1)[:, :3]
    found = merged(get_rule("covariance", space="inputs", a=1.0), draw((M, N), 2), [{"inputs": dead}] * 2)
    assert found.isfinite().all()
    assert not found[:, 3:].any()  # what no expert saw is not changed


@pytest.mark.parametrize(("width", "tokens"), [(N, N - 1), (N, 3), (256, 255)])
def test_covariance_of_inputs_that_depend_on_each_other_does_not_amplify_rounding(width: int, tokens: int) -> None:
    """As those of LayerNorm, whose sum is 0, or of few tokens; plain RegMean, a = 1, then has no inverse."""
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64)).Q[:, :tokens]
    seen = [(torch.randn(2 * width, tokens, generator=random, dtype=torch.float64) @ turn.T) for _ in range(2)]
    exact = [x.T @ x / len(x) for x in seen]
    vectors = draw((M, width), 2)
    found = merged(get_rule("covariance", space="inputs", a=1.0), vectors, [{"inputs": g.float()} for g in exact])
    grams = [(1 - 1e-4) * g + 1e-4 * g.diagonal().diag() for g in exact]
    wanted = sum(d.double() @ g for d, g in zip(vectors, grams, strict=True)) @ sum(grams).inverse()  # pyright: ignore
    assert float((found.double() - wanted).norm() / wanted.norm()) < 0.01
    alone = merged(get_rule("covariance", space="inputs", a=1.0), vectors[:1], [{"inputs": exact[0].float()}])
    assert float((alone - vectors[0]).norm() / vectors[0].norm()) < 0.01


def test_covariance_of_low_rank_updates_takes_the_smallest_eps() -> None:
    left, right = draw((256, 2), 1)[0], draw((2, 256), 1)[0]
    found = merged(get_rule("covariance", eps=1e-6), [left @ right])
    assert float((found - left @ right).norm() / (left @ right).norm()) < 0.02
    for eps in (1e-7, 2.0):
        with pytest.raises(ValueError, match=r"eps must be between 1e-06 \(rounding\) and 1"):
            get_rule("covariance", eps=eps)


def test_curvature_has_no_negative_power() -> None:
    with pytest.raises(ValueError, match="power must be 0 or more"):
        get_rule("curvature", power=-1.0)


def test_covariance_takes_the_mean_above_its_limit_of_inputs() -> None:
    vectors = draw((M, N), 3)
    rule = get_rule("covariance", max_inputs=N - 1)
    torch.testing.assert_close(merged(rule, vectors), torch.stack(vectors).mean(0))
    assert list(rule.parts(weight(True, shape=(M, N)))) == ["sum"]


@pytest.mark.parametrize("rank", [1, 4])
def test_covariance_of_low_rank_updates_does_not_amplify_rounding(rank: int) -> None:
    left, right = draw((60, rank), 1)[0], draw((rank, 200), 1, seed=3)[0]
    d = left @ right * 1e-3
    found = merged(get_rule("covariance"), [d])
    assert (found - d).norm() < 2e-3 * d.norm()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("covariance", {}), ("covariance", {"space": "inputs"}), ("covariance", {"form": "diagonal"}), ("curvature", {})],
)
def test_the_order_of_experts_does_not_matter(name: str, parameters: dict[str, Any]) -> None:
    rule, vectors = get_rule(name, **parameters), draw((M, N), 3)
    fishers = [d.square() for d in draw((M, N), 3, seed=9)]
    statistics = [{**s, "fisher": f} for s, f in zip(moments(1, 2, 3), fishers, strict=True)]
    found = [
        merged(rule, [vectors[i] for i in order], [statistics[i] for i in order])
        for order in itertools.permutations(range(3))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)


# curvature


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_curvature_is_the_mean_weighted_by_powers(power: float) -> None:
    vectors, v = draw((M, N), 3), [1e-12 * f.square() for f in draw((M, N), 3, seed=9)]
    found = merged(get_rule("curvature", power=power), vectors, [{"fisher": f} for f in v])
    shares = torch.stack([f.double() ** power for f in v])
    wanted = (shares * torch.stack(vectors)).sum(0) / shares.sum(0)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_curvature_of_equal_importance_is_the_mean_and_of_one_expert_that_expert() -> None:
    vectors, v = draw((M, N), 3), draw((M, N), 1, seed=9)[0].square()
    rule = get_rule("curvature", importance="adam")
    assert rule.needs == ("adam",)
    found = merged(rule, vectors, [{"adam": v}] * 3)
    torch.testing.assert_close(found, torch.stack(vectors).mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(merged(rule, vectors[:1], [{"adam": v}]), vectors[0], rtol=0, atol=1e-5)


def test_curvature_prunes_what_hardly_matters() -> None:
    (d,), v = draw((10, 10), 1), torch.ones(10, 10)
    v[0] = 1e6
    kept = merged(get_rule("curvature", density=0.1), [d], [{"fisher": v}]) != 0
    assert kept.sum() == 10
    assert kept[0].all()


# input_space


def test_input_space_keeps_what_earlier_stages_compute() -> None:
    x = draw((5, N), 1, seed=4)[0]  # inputs of rank 5
    one, two, three = draw((M, N), 3)
    moment = {"inputs": x.T @ x / 5}
    rule = get_rule("input_space", energy=1.0)
    found = merged(rule, [one, two, three], [moment, *moments(2, 3)])
    torch.testing.assert_close(found @ x.T, one @ x.T, rtol=0, atol=1e-4)
    assert not torch.allclose(found, one)
    assert not torch.allclose(merged(get_rule("input_space", energy=0.0), [one, two], [moment] * 2) @ x.T, one @ x.T)


def test_input_space_without_energy_is_the_sum_and_with_all_of_it_is_closed() -> None:
    vectors, statistics = draw((M, N), 3), moments(1, 2, 3)
    total = torch.stack(vectors).sum(0)
    torch.testing.assert_close(merged(get_rule("input_space", energy=0.0), vectors, statistics), total)
    closed = merged(get_rule("input_space", energy=1.0), vectors, statistics)
    torch.testing.assert_close(closed, vectors[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [N, 700])
def test_directions_stay_orthonormal_over_twenty_stages(width: int) -> None:
    rule, shape = get_rule("input_space", rank=16), (4, width)
    running: Any = zeros(rule, shape)
    for stage in range(1, 21):
        x = draw((30, width), 1, seed=stage)[0] * torch.linspace(3, 0.1, width)
        given = replace(weight(True, stage, shape=shape), statistics={"inputs": x.T @ x / 30})
        running = rule.update(running, draw(shape, 1, seed=stage)[0], given)
    basis = running["inputs"]
    gram = basis.T @ basis
    used = int((gram.diagonal() > 0.5).sum())
    assert used == 16 if width > N else 8 < used <= 16
    torch.testing.assert_close(gram[:used, :used], torch.eye(used), rtol=0, atol=1e-5)
    assert not basis[:, used:].any()


def test_subspace_iteration_finds_the_leading_directions() -> None:
    x = draw((400, 600), 1)[0] * torch.cat([torch.full((20,), 10.0), torch.ones(580)])
    rule = get_rule("input_space", rank=20)
    running = rule.update(
        zeros(rule, (3, 600)), draw((3, 600), 1)[0],
        replace(weight(True, 1, shape=(3, 600)), statistics={"inputs": x.T @ x / 400}),
    )  # fmt: skip
    assert isinstance(running, Mapping)
    lead = torch.linalg.svd(x, full_matrices=False).Vh[:20]
    assert (lead @ running["inputs"]).square().sum() > 20 * 0.999


def test_wide_maps_protect_channels() -> None:
    rule, width = get_rule("input_space", energy=0.5), 8193
    moment = torch.zeros(width)
    moment[7], moment[9] = 3.0, 2.0
    one, two = draw((2, width), 2)
    found = merged(rule, [one, two], [{"inputs": moment}, {"inputs": moment}])
    assert torch.equal(found[:, 7], one[:, 7])
    assert torch.equal(found[:, 9], (one + two)[:, 9])
