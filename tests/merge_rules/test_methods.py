"""Each merge rule against what is known of it: special cases, identities, mergekit's own method of the same name."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import GroupMergeMethod, TensorGroup
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, _linear, get_rule
from hf_contmerge.testing.folding import draw, fold, merge, weight

# The first ones


def fold_magmax(task_vectors: Sequence[Tensor]) -> Tensor:
    return fold(get_rule("magmax"), task_vectors)


def batch_magmax(task_vectors: Sequence[Tensor]) -> Tensor:
    latest_first = torch.stack(list(task_vectors)).flip(0)  # argmax takes the first of equals
    return latest_first.gather(0, latest_first.abs().argmax(0, keepdim=True))[0]


def tying(count: int) -> list[Tensor]:
    """Return task vectors of a few whole numbers, so that equal magnitudes of either sign are everywhere."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(-2, 3, (40, 50), generator=generator).float() for _ in range(count)]


@pytest.mark.parametrize("task_vectors", [draw((40, 50), 5), tying(5)], ids=["gaussian", "with ties"])
def test_magmax_in_a_stream_equals_magmax_in_one_go(task_vectors: list[Tensor]) -> None:
    assert torch.equal(fold_magmax(task_vectors), batch_magmax(task_vectors))


def test_magmax_lets_the_later_stage_win_a_tie() -> None:
    first, second = torch.tensor([1.0, -1.0, 1.0, 2.0]), torch.tensor([-1.0, 1.0, 1.0, -1.0])
    assert fold_magmax([first, second]).tolist() == [-1.0, 1.0, 1.0, 2.0]
    assert fold_magmax([second, first]).tolist() == [1.0, -1.0, 1.0, 2.0]


def test_the_order_of_experts_decides_only_exact_ties_of_magmax() -> None:
    task_vectors = tying(3)
    folds = [fold_magmax(order) for order in itertools.permutations(task_vectors)]
    largest = torch.stack(task_vectors).abs().amax(0)
    has_tie = (torch.stack(task_vectors).abs() == largest).sum(0) > 1
    assert has_tie.any()
    for state in folds:
        assert torch.equal(state.abs(), largest)
        assert torch.equal(state[~has_tie], folds[0][~has_tie])
    assert any(not torch.equal(state, folds[0]) for state in folds)


def test_magmax_with_lambda_0_is_the_base() -> None:
    base, *experts = draw((6, 4), 4)
    assert torch.equal(merge(get_rule("magmax", **{"lambda": 0.0}), base, experts), base)


def test_magmax_halves_the_change_by_default() -> None:
    assert get_rule("magmax").scale(Norms((1.0,), 1.0)) == 0.5


def test_average_is_the_mean_of_the_experts() -> None:
    base, *experts = draw((6, 4), 6)
    torch.testing.assert_close(merge(get_rule("average"), base, experts), torch.stack(experts).mean(0))


def test_task_arithmetic_adds_what_each_expert_changed() -> None:
    base, one, two = draw((6, 4), 3)
    merged = merge(get_rule("task_arithmetic", **{"lambda": 0.3}), base, [one, two])
    torch.testing.assert_close(merged, base + 0.3 * (one - base) + 0.3 * (two - base))


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.9, 1.0])
def test_ema_moves_the_merged_model_a_step_towards_each_expert(beta: float) -> None:
    base, *experts = draw((6, 4), 5)
    model = base
    for expert in experts:
        model = beta * model + (1 - beta) * expert
    torch.testing.assert_close(merge(get_rule("ema", beta=beta), base, experts), model, rtol=1e-5, atol=1e-6)


def test_slao_moves_the_merged_model_by_one_over_the_root_of_the_stage() -> None:
    base, one, two, three = draw((6, 4), 4)
    model = one + (two - one) / 2**0.5
    model = model + (three - model) / 3**0.5
    torch.testing.assert_close(merge(get_rule("slao"), base, [one, two, three]), model)


# random_mix


def owners(rule: MergeRule, shape: Sequence[int], count: int, *, name: str = "w") -> Tensor:
    """Return the stage that each element is of: expert t's task vector is t everywhere."""
    return fold(rule, [torch.full(tuple(shape), float(t)) for t in range(1, count + 1)], name=name)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_random_mix_gives_all_experts_equal_shares(count: int) -> None:
    shares = (
        owners(get_rule("random_mix"), (300, 400), count).flatten().long().bincount(minlength=count + 1)[1:] / 120_000
    )
    assert shares.tolist() == pytest.approx([1 / count] * count, abs=0.008)  # six standard deviations or more


def test_random_mix_draws_anew_for_each_seed_weight_and_stage() -> None:
    rule = get_rule("random_mix")
    others = [owners(get_rule("random_mix", seed=1), (50, 60), 2), owners(rule, (50, 60), 2, name="v")]
    zero, one = torch.zeros(50, 60), torch.ones(50, 60)
    for stage in (2, 3):  # of those that stage 2 takes, stage 3 takes a third too
        others.append(rule.update(zero, one, weight(True, stage)) + 1)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(others, 2))
    assert torch.equal(others[2], owners(rule, (50, 60), 2))


def test_random_mix_repeats_itself_whatever_else_is_drawn() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = owners(get_rule("random_mix"), (50, 60), 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(owners(get_rule("random_mix"), (50, 60), 3), first)


# ties


def mergekit_ties(base: Tensor, experts: Sequence[Tensor], density: float, lambda_: float) -> Tensor:
    count = range(1, len(experts) + 1)
    method = registry.get("ties")
    assert isinstance(method, GroupMergeMethod)
    return method.merge_group(
        TensorGroup.from_tensors([base, *experts], base_index=0),
        **{"weight": dict.fromkeys(count, 1.0), "density": dict.fromkeys(count, density), "lambda": lambda_},
        normalize=True, rescale=False, int8_mask=False,
    )  # fmt: skip


def quantised(shape: Sequence[int], count: int) -> list[Tensor]:
    """Return models as bfloat16 keeps them: many changes have equal magnitudes."""
    base, *changes = draw(shape, count)
    return [(base + 0.01 * change).bfloat16().float() for change in (torch.zeros_like(base), *changes)]


@pytest.mark.parametrize("make", [draw, quantised], ids=["gaussian", "equal magnitudes"])
@pytest.mark.parametrize("shape", [(), (3,), (50, 60), (3, 40, 50)], ids=str)
@pytest.mark.parametrize(("density", "lambda_"), [(0.2, 1.0), (0.2, 0.55), (0.7, 1.0), (1.0, 0.3), (1e-6, 1.0)])
def test_ties_is_mergekits(make: Any, shape: tuple[int, ...], density: float, lambda_: float) -> None:
    base, *experts = make(shape, 5)
    ours = merge(get_rule("ties", **{"density": density, "lambda": lambda_}), base, experts)
    torch.testing.assert_close(ours, mergekit_ties(base, experts, density, lambda_), rtol=1e-6, atol=1e-6)


def test_ties_averages_what_agrees_with_the_sign_of_the_sum() -> None:
    experts = [torch.tensor(row) for row in ([3.0, -4.0, 1.0, 0.0], [-1.0, 1.0, -1.0, 0.0], [1.0, 1.0, 0.0, 0.0])]
    merged = merge(get_rule("ties", density=1.0), torch.zeros(4), experts)
    assert merged.tolist() == [2.0, -4.0, 1.0, 0.0]


@pytest.mark.parametrize("density", [0.0, -0.2, 1.5])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=f"above 0 and at most 1 .*; got {density}"):
        get_rule("ties", density=density)


# iso_c


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (3, 8, 11)])
def test_iso_c_makes_all_singular_values_their_mean(shape: tuple[int, ...]) -> None:
    rule, task_vectors = get_rule("iso_c"), draw(shape, 3)
    isotropic = rule.read_out(fold(rule, task_vectors), weight(True, 3))
    mean = torch.linalg.svdvals(torch.stack(task_vectors).sum(0)).mean(-1, keepdim=True)
    torch.testing.assert_close(torch.linalg.svdvals(isotropic), mean.expand(*shape[:-2], min(shape[-2:])))


def test_iso_c_leaves_out_directions_that_are_rounding() -> None:
    factors = [(left, right) for left, right in zip(draw((30, 2), 3), draw((2, 40), 3, seed=1), strict=True)]
    rule = get_rule("iso_c")
    state = fold(rule, [left @ right for left, right in factors])
    u, s, vh = torch.linalg.svd(state.double())
    expected = s[:6].mean() * u[:, :6] @ vh[:6]
    torch.testing.assert_close(rule.read_out(state, weight(True, 3)).double(), expected, rtol=0, atol=1e-5)


def test_iso_c_averages_what_is_no_matrix() -> None:
    rule, task_vectors = get_rule("iso_c"), draw((5, 7), 3)
    read = rule.read_out(fold(rule, task_vectors, is_matrix=False), weight(False, 3))
    torch.testing.assert_close(read, torch.stack(task_vectors).mean(0))


# null_space


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_null_space_keeps_the_answers_to_the_leading_inputs(shape: tuple[int, int], rank: int) -> None:
    rule, task_vectors = get_rule("null_space", rank=rank), draw(shape, 3)
    before, after = fold(rule, task_vectors[:2]), fold(rule, task_vectors)
    vh = torch.linalg.svd(before.double()).Vh  # all inputs, also those that no expert reacted to
    leading, others = vh[:rank].float().T, vh[rank:].float().T
    torch.testing.assert_close(after @ leading, before @ leading, rtol=0, atol=1e-5)
    torch.testing.assert_close(after @ others, (before + task_vectors[2]) @ others, rtol=0, atol=1e-5)


def test_null_space_frees_inputs_that_no_expert_reacted_to() -> None:
    earlier, new = draw((20, 12), 2)
    earlier[:, 4:] = 0
    state = fold(get_rule("null_space"), [earlier, new])
    torch.testing.assert_close(state, torch.cat([earlier[:, :4], new[:, 4:]], dim=1), rtol=0, atol=1e-5)


def test_null_space_of_rank_0_adds_and_of_all_inputs_takes_the_first_expert() -> None:
    first, second = draw((20, 12), 2)
    torch.testing.assert_close(fold(get_rule("null_space", rank=0), [first, second]), first + second)
    torch.testing.assert_close(fold(get_rule("null_space", rank=12), [first, second]), first, rtol=0, atol=1e-5)


def test_a_rank_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 or more .*; got -1"):
        get_rule("null_space", rank=-1)


# Decompositions


DECOMPOSING = [get_rule(name) for name in ("iso_c", "null_space", "opcm")]
every_decomposing_rule = pytest.mark.parametrize("rule", [*DECOMPOSING, get_rule("opcm", variant="paper")], ids=str)


@every_decomposing_rule
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (12, 50), (50, 12)])
def test_large_matrices_are_worked_on_in_pieces(
    rule: MergeRule, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_vectors = draw(shape, 3)
    whole = rule.read_out(fold(rule, task_vectors), weight(True, 3))
    monkeypatch.setattr(_linear, "_COLUMNS", 7)
    monkeypatch.setattr(_linear, "_ROWS", 3)
    pieces = rule.read_out(fold(rule, task_vectors), weight(True, 3))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)


@every_decomposing_rule
def test_the_scale_of_the_weights_does_not_matter(rule: MergeRule) -> None:
    task_vectors = draw((9, 20), 3)
    expected = rule.read_out(fold(rule, task_vectors), weight(True, 3))
    for factor in (1e-30, 1e30):
        read = rule.read_out(fold(rule, [factor * d for d in task_vectors]), weight(True, 3))
        torch.testing.assert_close(read / factor, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", DECOMPOSING, ids=str)
def test_slices_of_a_stack_are_matrices_of_their_own(rule: MergeRule) -> None:
    task_vectors = draw((4, 6, 9), 3)
    task_vectors[0][1], task_vectors[1][2] = 0, 0  # experts that a stage did not touch
    read = rule.read_out(fold(rule, task_vectors), weight(True, 3))
    slices = [rule.read_out(fold(rule, [d[k] for d in task_vectors]), weight(True, 3)) for k in range(4)]
    assert torch.equal(read, torch.stack(slices))


# dare, stitch, blend


def test_the_mean_of_dares_draws_is_task_arithmetic() -> None:
    base, *experts = draw((20, 30), 4)
    wanted = merge(get_rule("task_arithmetic", **{"lambda": 0.4}), base, experts)
    draws = torch.stack([merge(get_rule("dare", seed=seed), base, experts) for seed in range(200)])
    error = (draws.mean(0) - wanted).mean().abs()
    assert error < 3 * draws.mean((1, 2)).std() / 200**0.5
    assert torch.equal(merge(get_rule("dare", p=0.0), base, experts), wanted)


def test_dare_keeps_a_tenth_of_the_elements() -> None:
    state = fold(get_rule("dare"), draw((300, 400), 1))
    assert (state != 0).float().mean() == pytest.approx(0.1, abs=0.005)
    assert not torch.equal(state, fold(get_rule("dare", seed=1), draw((300, 400), 1)))


def test_stitch_of_everything_is_the_average() -> None:
    base, *experts = draw((20, 30), 4)
    experts[0][:5] = base[:5]  # what an expert did not change counts, too
    wanted = merge(get_rule("average"), base, experts)
    torch.testing.assert_close(merge(get_rule("stitch", sparsity=1.0), base, experts), wanted)


def test_stitch_averages_where_experts_overlap() -> None:
    one, two = torch.zeros(10), torch.zeros(10)
    one[0], one[1], two[1], two[2] = 4.0, 2.0, 6.0, -3.0
    state = fold(get_rule("stitch", sparsity=0.2), [one, two])
    assert get_rule("stitch").read_out(state, weight(False, 2)).tolist() == [4.0, 4.0, -3.0, *[0.0] * 7]


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_other_rules_are_points_of_blend(stages: int) -> None:
    base, *experts = draw((6, 4), stages + 1)
    steps = {
        "average": lambda t: ((t - 1) / t, 1 / t),
        "ema": lambda _: (0.25, 0.75),
        "task_arithmetic": lambda _: (1.0, 0.3),
        "slao": lambda t: (1 - t**-0.5, t**-0.5),
    }
    for name, step in steps.items():
        running = torch.zeros_like(base)
        for t, expert in enumerate(experts, 1):
            keep, take = step(t)
            running = get_rule("blend", keep=keep, take=take).update(running, expert - base, weight(True, t))
        rule = get_rule(name, beta=0.25) if name == "ema" else get_rule(name)
        torch.testing.assert_close(base + running, merge(rule, base, experts), rtol=1e-5, atol=1e-6)
