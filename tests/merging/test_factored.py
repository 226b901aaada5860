"""The factored state against dense folds in float64, for every basis_free rule; it finds a new one by itself."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, Weight, get_rule, parameter_types, rule_class, rule_names
from hf_contmerge.merge_rules.opcm import NUMERICAL_RANK, Opcm
from hf_contmerge.merging._factored import TOLERANCE, Factored, Factors, fold_factors, pays


def variants(name: str) -> list[MergeRule]:
    """Return a rule with its defaults, once for every choice of the parameters that offer one."""
    choices = {w: get_args(t) for w, (t, _) in parameter_types(rule_class(name)).items() if get_origin(t) is Literal}
    return [
        get_rule(name, **dict(zip(choices, picked, strict=True))) for picked in itertools.product(*choices.values())
    ]


RULES = [rule for name in rule_names() if rule_class(name).basis_free for rule in variants(name)]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)
every_shape = pytest.mark.parametrize("shape", [(70, 90), (90, 70), (20, 90), (90, 20)], ids=str)
either_kind = pytest.mark.parametrize("is_matrix", [True, False], ids=["matrix", "table"])


def adapters(shape: Sequence[int], count: int, *, rank: int = 3, seed: int = 0) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    return [
        (torch.randn(m, rank, generator=generator), 0.01 * torch.randn(rank, n, generator=generator))
        for _ in range(count)
    ]


def product(factors: Factors) -> Tensor:
    return factors[0].double() @ factors[1].double()


def clean_by_definition(rule: Opcm, s_matrix: Tensor, d: Tensor) -> Tensor:
    """What OPCM adds: D in the full bases of S, the coefficients struck out that the method names."""
    u, s, vh = torch.linalg.svd(s_matrix)
    a, share, numerical = u.T @ d @ vh.T, s.cumsum(0) / s.sum(), int((s > NUMERICAL_RANK * s[0]).sum())
    paper = rule.variant == "paper"
    r = int((share < rule.alpha).sum()) + 1 if paper else int((share <= rule.alpha).sum())
    i, j = torch.meshgrid(torch.arange(len(a)), torch.arange(len(a.T)), indexing="ij")
    struck = (i < r) | (j < r) if paper else (i < r) & (j < r)
    if rule.variant != "block":
        struck |= (i == j) & (i < numerical)
    return u @ torch.where(struck, 0, a) @ vh


def dense_fold(rule: MergeRule, deltas: Sequence[Tensor], *, is_matrix: bool) -> Tensor:
    running = torch.zeros_like(deltas[0])
    for stage, d in enumerate(deltas, 1):
        if isinstance(rule, Opcm) and is_matrix and bool(running.any()):
            running = running + clean_by_definition(rule, running, d)
        else:
            running = rule.update(running, d, Weight("w", is_matrix, stage))
    return running


def fold(
    rule: MergeRule,
    experts: Sequence[Factors | None],
    before: Factored | None = None,
    *,
    is_matrix: bool = True,
    first: int = 1,
) -> Factored:
    return fold_factors(rule, before, experts, Weight("w", is_matrix, first))[0]


def fold_one_by_one(rule: MergeRule, experts: Sequence[Factors | None], *, is_matrix: bool = True) -> Factored:
    state = None
    for stage, expert in enumerate(experts, 1):
        state = fold(rule, [expert], state, is_matrix=is_matrix, first=stage)
    assert state is not None
    return state


def exact(state: Factored) -> Tensor:
    return state.left.double() @ state.core.double() @ state.right.double().T


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def skew(basis: Tensor) -> float:
    """How far columns are from orthonormal: the norm of Q'Q - I."""
    if not basis.shape[1]:
        return 0.0
    wide = basis.double()
    return float(torch.linalg.matrix_norm(wide.T @ wide - torch.eye(wide.shape[1]), ord=2))


def same_directions(expert: Factors, seed: int) -> Factors:
    """Return an unrelated expert whose factors lie in the span of another's."""
    generator = torch.Generator().manual_seed(seed)
    mix_left, mix_right = (torch.randn(2, expert[0].shape[1], expert[0].shape[1], generator=generator)).unbind()
    return expert[0] @ mix_left, mix_right @ expert[1]


# Exactness


@either_kind
@every_shape
@every_rule
def test_16_experts_give_what_a_dense_fold_in_float64_gives(rule: MergeRule, shape: Any, is_matrix: bool) -> None:
    experts = adapters(shape, 16)
    wanted = dense_fold(rule, [product(e) for e in experts], is_matrix=is_matrix)
    at_once = fold(rule, experts, is_matrix=is_matrix)
    one_by_one = fold_one_by_one(rule, experts, is_matrix=is_matrix)
    assert error(at_once.dense(), wanted) < 1e-5
    assert error(one_by_one.dense(), wanted) < 1e-5
    # With all of the smaller side's directions in use, the other side's are rounded anew at each call.
    assert error(exact(one_by_one), exact(at_once)) < (1e-6 if min(shape) > 48 else 5e-6)
    assert at_once.rank == one_by_one.rank == min(*shape, 48)
    assert at_once.norm() == pytest.approx(float(wanted.norm()), rel=1e-5)
    assert at_once.shape == wanted.shape


@every_rule
def test_experts_of_different_ranks_and_some_that_do_not_touch_the_weight(rule: MergeRule) -> None:
    ranks = (4, 1, 0, 7, 2, 3)
    experts = [adapters((40, 50), 1, rank=r, seed=i)[0] for i, r in enumerate(ranks)]
    some: list[Factors | None] = [None, *experts[:2], None, None, *experts[2:], None]
    deltas = [torch.zeros(40, 50, dtype=torch.float64) if e is None else product(e) for e in some]
    wanted = dense_fold(rule, deltas, is_matrix=True)
    state, norms = fold_factors(rule, None, some, Weight("w", True, 1))
    assert error(state.dense(), wanted) < 1e-5
    assert norms == pytest.approx([float(d.norm()) for d in deltas], rel=1e-6)
    one_by_one = Factored.zeros((40, 50))
    for stage, expert in enumerate(some, 1):
        one_by_one = fold(rule, [expert], one_by_one, first=stage)
    assert error(exact(one_by_one), exact(state)) < 1e-6
    assert state.rank == one_by_one.rank == sum(ranks)


@every_rule
def test_the_first_expert_is_what_the_rule_makes_of_it(rule: MergeRule) -> None:
    expert = adapters((30, 50), 1)[0]
    wanted = rule.update(torch.zeros(30, 50, dtype=torch.float64), product(expert), Weight("w", True, 1))
    state, norms = fold_factors(rule, None, [expert], Weight("w", True, 1))
    assert error(state.dense(), wanted) < 1e-6
    assert state.norm() == pytest.approx(float(wanted.norm()), rel=1e-6)
    assert norms == pytest.approx([float(product(expert).norm())], rel=1e-6)
    assert state.left.dtype == state.right.dtype == state.dense().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_upcast_before_anything_is_done(dtype: torch.dtype) -> None:
    rule = get_rule("opcm")
    experts = [(a.to(dtype), b.to(dtype)) for a, b in adapters((40, 50), 4)]
    wanted = dense_fold(rule, [product(e) for e in experts], is_matrix=True)
    assert error(fold(rule, experts).dense(), wanted) < 1e-6


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_size_of_the_experts_does_not_matter(size: float) -> None:
    rule, experts = get_rule("opcm"), adapters((40, 50), 6)
    resized = [(a * size, b) if k % 2 else (a, b * size) for k, (a, b) in enumerate(experts)]
    state = fold(rule, resized)
    assert error(exact(state), size * exact(fold(rule, experts))) < 1e-5
    assert state.rank == 18


def test_a_tiny_expert_after_a_large_one_keeps_its_directions() -> None:
    large, small = adapters((40, 50), 2)
    tiny = (small[0] * 1e-2, small[1] * 1e-2)
    state = fold(get_rule("task_arithmetic"), [large, tiny])
    assert state.rank == 6
    assert error(exact(state) - product(large), product(tiny)) < 1e-2  # what rounding leaves of it


@every_rule
def test_more_columns_than_are_handled_at_once(rule: MergeRule) -> None:
    experts = adapters((40, 30), 5, rank=300)
    wanted = dense_fold(rule, [product(e) for e in experts], is_matrix=True)
    state = fold(rule, experts)
    assert state.rank == 30
    assert error(state.dense(), wanted) < 1e-5


@dataclass(frozen=True)
class ByStage(MergeRule):
    """A rule that reads which stage it is in, which sums do not."""

    basis_free = True

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running.lerp(task_vector, weight.stage**-0.5)

    def scale(self, norms: Norms) -> float:
        return 1.0


@pytest.mark.parametrize("rank", [3, 300], ids=["in one go", "in several"])
def test_a_rule_is_told_the_stage(rank: int) -> None:
    experts = adapters((40, 50), 5, rank=rank)
    wanted = dense_fold(ByStage(), [product(e) for e in experts], is_matrix=True)
    first = fold(ByStage(), experts[:2])
    assert error(exact(fold(ByStage(), experts)), wanted) < 1e-6
    assert error(exact(fold(ByStage(), experts[2:], first, first=3)), wanted) < 1e-6


# Directions


def test_orthonormality_does_not_drift() -> None:
    rule, shape = get_rule("opcm"), (300, 240)
    experts = adapters(shape, 64)
    first, state = fold(rule, experts[:1]), fold_one_by_one(rule, experts)
    assert state.rank == 192
    assert skew(state.left) < 1e-7
    assert skew(state.right) < 1e-7
    assert torch.equal(state.left[:, :3], first.left)  # written once, never touched again


@pytest.mark.parametrize("shared", [0, 1], ids=["the same B", "the same A"])
def test_orthonormality_does_not_drift_where_directions_are_rewritten(shared: int) -> None:
    first, *others = adapters((300, 240), 64)
    experts = [first, *((first[0], a) if shared == 0 else (b, first[1]) for b, a in others)]
    state = fold_one_by_one(get_rule("ema"), experts)
    assert state.rank == 3
    assert max(skew(state.left), skew(state.right)) < 5e-8  # 6e-8 is the rounding of a single float32
    assert error(exact(state), dense_fold(get_rule("ema"), [product(e) for e in experts], is_matrix=True)) < 1e-6


def test_an_expert_almost_in_the_span_brings_orthonormal_directions() -> None:
    first, other = adapters((60, 50), 2)
    inside = same_directions(first, 1)
    near = (inside[0] + 1e-4 * other[0], inside[1] + 1e-4 * other[1])
    for state in (fold(get_rule("average"), [first, near]), fold_one_by_one(get_rule("average"), [first, near])):
        assert state.rank == 6
        assert max(skew(state.left), skew(state.right)) < 1e-7
        assert error(exact(state), product(first) + product(near)) < 1e-6


def repeated(shape: Sequence[int]) -> dict[str, list[Factors]]:
    first, *others = adapters(shape, 6)
    return {
        "the same expert": [first] * 6,
        "the same A": [first, *((b, first[1]) for b, _ in others)],
        "the same B": [first, *((first[0], a) for _, a in others)],
        "the same span": [first, *(same_directions(first, seed) for seed in range(5))],
        "B = 0": [first, *((torch.zeros_like(b), a) for b, a in others)],
        "A = 0": [first, *((b, torch.zeros_like(a)) for b, a in others)],
        "columns twice": [(torch.cat([b, b], 1), torch.cat([a, 2 * a])) for b, a in [first, *others]],
        "columns that cancel": [(torch.cat([b, b], 1), torch.cat([a, -a])) for b, a in [first, *others]],
    }


RANKS = {
    "the same expert": 3,
    "the same A": 3,
    "the same B": 3,
    "the same span": 3,
    "B = 0": 3,
    "A = 0": 3,
    "columns twice": 18,
    "columns that cancel": 0,
}


@every_rule
@pytest.mark.parametrize("case", RANKS)
def test_the_rank_grows_by_new_directions_only(rule: MergeRule, case: str) -> None:
    experts = repeated((60, 50))[case]
    wanted = sum((product(e).norm() for e in experts), torch.zeros(()))
    for state in (fold(rule, experts), fold_one_by_one(rule, experts)):
        assert state.rank == RANKS[case]
        assert state.core.shape == (state.rank, state.rank)
        assert max(skew(state.left), skew(state.right)) < 1e-7
        assert torch.isfinite(state.dense()).all()
        assert state.norm() <= float(wanted) * (1 + 1e-6)


@pytest.mark.parametrize("case", RANKS)
def test_sums_of_dependent_experts_are_exact(case: str) -> None:
    experts = repeated((60, 50))[case]
    wanted = sum((product(e) for e in experts), torch.zeros(60, 50, dtype=torch.float64))
    found = exact(fold_one_by_one(get_rule("average"), experts))
    assert float((found - wanted).norm()) <= 6 * TOLERANCE * max(float(a.norm() * b.norm()) for a, b in experts)


@every_rule
def test_sequential_adapters(rule: MergeRule) -> None:
    """Each continues the one before: its factors change by a little in fresh directions, the A every other time."""
    b, a = adapters((60, 50), 1)[0]
    experts = []
    for step, (more_b, more_a) in enumerate(adapters((60, 50), 6, seed=1)):
        b, a = b + 0.1 * more_b, a + 0.1 * more_a if step % 2 else a
        experts.append((b, a))
    state = fold_one_by_one(rule, experts)
    assert state.rank == 12
    assert error(exact(state), exact(fold(rule, experts))) < 1e-5


def test_weights_with_one_row_or_one_column() -> None:
    for shape in [(1, 9), (9, 1), (1, 1)]:
        experts = adapters(shape, 4, rank=2)
        wanted = dense_fold(get_rule("opcm"), [product(e) for e in experts], is_matrix=True)
        state = fold(get_rule("opcm"), experts)
        assert state.rank == 1
        assert (exact(state) - wanted).norm() < 1e-6 * max(product(e).norm() for e in experts)


# Invariances


@every_rule
def test_how_an_expert_is_split_into_factors_does_not_matter(rule: MergeRule) -> None:
    experts = adapters((40, 50), 5)
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mixed = [(a.double() @ mix, torch.linalg.solve(mix, b.double())) for a, b in experts]
    assert error(exact(fold(rule, mixed)), exact(fold(rule, experts))) < 1e-6


@every_rule
def test_transposed_experts(rule: MergeRule) -> None:
    experts = adapters((40, 50), 5)
    turned = fold(rule, [(b.T, a.T) for a, b in experts])
    assert turned.shape == (50, 40)
    wanted = dense_fold(rule, [product(e).T for e in experts], is_matrix=True)
    assert error(exact(turned), wanted) < 1e-5


@every_rule
def test_inputs_are_left_as_they_were(rule: MergeRule) -> None:
    experts = adapters((40, 50), 3)
    copies = [(a.clone(), b.clone()) for a, b in experts]
    before = fold(rule, experts[:2])
    kept = [before.left.clone(), before.core.clone(), before.right.clone()]
    fold(rule, experts[2:], before, first=3)
    assert all(torch.equal(x, y) for x, y in zip((before.left, before.core, before.right), kept, strict=True))
    assert all(torch.equal(x, y) for e, c in zip(experts, copies, strict=True) for x, y in zip(e, c, strict=True))


def test_the_same_bytes_again() -> None:
    first, again = (fold(get_rule("opcm"), adapters((40, 50), 5)) for _ in range(2))
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.core, again.core)
    assert torch.equal(first.right, again.right)


# Zero


@every_rule
def test_zero_experts_decay_the_state_as_the_rule_says(rule: MergeRule) -> None:
    expert, zero = adapters((40, 50), 1)[0], torch.zeros(40, 50, dtype=torch.float64)
    state, norms = fold_factors(rule, None, [expert, None, None], Weight("w", True, 1))
    wanted = dense_fold(rule, [product(expert), zero, zero], is_matrix=True)
    assert error(state.dense(), wanted) < 1e-6
    assert norms[1:] == [0.0, 0.0]
    assert state.rank == 3


@every_rule
def test_nothing_but_zeros(rule: MergeRule) -> None:
    state = fold(rule, [None, (torch.zeros(8, 2), torch.ones(2, 9)), None])
    assert state.rank == 0
    assert state.norm() == 0
    assert torch.equal(state.dense(), torch.zeros(8, 9))
    left, right, left_out = state.truncated(None)
    assert (left.shape, right.shape, left_out) == ((8, 0), (0, 9), 0.0)
    assert fold(rule, [], state) == state


# Truncation


@pytest.mark.parametrize("shape", [(40, 50), (50, 40)], ids=str)
def test_what_a_truncation_leaves_out_is_the_tail_of_the_dense_svd(shape: Any) -> None:
    state = fold(get_rule("opcm"), adapters(shape, 5))
    s = torch.linalg.svdvals(exact(state))
    for rank in (0, 1, 7, 14):
        left, right, left_out = state.truncated(rank)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        assert left_out == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-5)
        assert error(left.double() @ right.double(), exact(state)) == pytest.approx(left_out, rel=1e-5)
        torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-4, atol=1e-6)


def test_without_a_rank_the_truncation_is_exact() -> None:
    experts = adapters((40, 50), 5)
    state = fold(get_rule("average"), [*experts, (-experts[0][0], experts[0][1])])
    assert state.rank == 15
    left, right, left_out = state.truncated(None)
    assert left.shape[1] == 12  # the first expert is gone again, its directions are still held
    assert left_out <= TOLERANCE
    assert error(left.double() @ right.double(), exact(state)) < 1e-6
    assert state.truncated(99)[0].shape[1] == 15


# Refusals, and when to stop


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_factors_that_are_not_finite_are_refused_by_name(side: int, bad: float) -> None:
    experts = adapters((8, 9), 3)
    experts[1][side][1, 1] = bad
    with pytest.raises(ValueError, match=f"layer.q, the adapter of stage 8: 1 values of its {('left', 'right')[side]}"):
        fold_factors(get_rule("opcm"), None, experts, Weight("layer.q", True, 7))


def test_factors_that_do_not_fit_are_refused() -> None:
    rule, state = get_rule("opcm"), fold(get_rule("opcm"), adapters((8, 9), 1))
    for wrong in (adapters((9, 8), 1)[0], (torch.ones(8, 2), torch.ones(3, 9))):
        with pytest.raises(ValueError, match=r"w, the adapter of stage 2: factors .* do not give \(8, 9\)"):
            fold(rule, [wrong], state, first=2)
    with pytest.raises(ValueError, match="leaves its shape open"):
        fold(rule, [None])


def test_rules_that_need_the_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="Magmax is not basis_free: w cannot be kept"):
        fold(get_rule("magmax"), adapters((8, 9), 1))


def test_factors_pay_while_they_take_half_the_dense_bytes() -> None:
    for shape in [(4096, 4096), (4096, 11008), (1024, 256), (32000, 64)]:
        m, n = shape
        limit = max(rank for rank in range(min(shape) + 1) if pays(shape, rank))
        assert not any(pays(shape, rank) for rank in range(limit + 1, min(shape) + 1))
        state = Factored(torch.empty(m, limit), torch.empty(limit, limit, dtype=torch.float64), torch.empty(n, limit))
        assert state.nbytes <= 4 * m * n / 2 < state.nbytes + 4 * (m + n) + 8 * (2 * limit + 1)
    assert pays((4096, 4096), 256)
    assert not pays((64, 64), 32)
