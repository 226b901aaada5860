"""One suite for all merge rules: it finds a new file in merge_rules/ by itself, and asks only for an oracle.

To add a rule's oracle, append to ORACLES below: the method over all task vectors at once, in float64 and as literally
as its paper writes it, not as our code does.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, Norms, get_rule, parameter_types, rule_class, rule_names


def average(task_vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(task_vectors)).mean(0)


def ema(task_vectors: Sequence[Tensor], *, beta: float) -> Tensor:
    t = len(task_vectors)
    return torch.stack([(1 - beta) * beta ** (t - i) * d for i, d in enumerate(task_vectors, 1)]).sum(0)


def magmax(task_vectors: Sequence[Tensor], *, lambda_: float) -> Tensor:
    latest_first = torch.stack(list(task_vectors)).flip(0)  # argmax takes the first of equals
    return lambda_ * latest_first.gather(0, latest_first.abs().argmax(0, keepdim=True))[0]


def opcm(task_vectors: Sequence[Tensor], *, alpha: float, variant: str) -> Tensor:
    """The method on a single matrix; its whole-model scale and its finer points are in test_opcm.py."""
    running = task_vectors[0]
    for d in task_vectors[1:]:
        u, s, vh = torch.linalg.svd(running)
        r = int((s.cumsum(0) / s.sum() <= alpha).sum())
        a = u.T @ d @ vh.T
        a[:r, :r] = 0
        a.fill_diagonal_(0)
        running = running + u @ a @ vh
    mean_norm = torch.stack([d.norm() for d in task_vectors]).mean()
    return running * mean_norm / running.norm()


def task_arithmetic(task_vectors: Sequence[Tensor], *, lambda_: float) -> Tensor:
    return lambda_ * torch.stack(list(task_vectors)).sum(0)


@dataclass(frozen=True)
class Oracle:
    """What a rule must equal, and the parameters under which a single expert comes out whole (None: there are none)."""

    merged_minus_base: Callable[..., Tensor]
    whole: dict[str, Any] | None


ORACLES = {
    "average": Oracle(average, {}),
    "ema": Oracle(ema, {"beta": 0.0}),
    "magmax": Oracle(magmax, {"lambda": 1.0}),
    "opcm": Oracle(opcm, {}),
    "task_arithmetic": Oracle(task_arithmetic, {"lambda": 1.0}),
}

SHAPES = [((), False), ((7,), False), ((5, 7), False), ((5, 7), True), ((3, 7, 5), False), ((3, 7, 5), True)]
every_rule = pytest.mark.parametrize("name", rule_names())
every_shape = pytest.mark.parametrize(("shape", "is_matrix"), SHAPES, ids=str)


def oracle(name: str) -> Oracle:
    if name not in ORACLES:
        pytest.fail(f"merge_rules/{name}.py has no oracle. Write one and append it to ORACLES in tests/test_rules.py.")
    return ORACLES[name]


def draw(shape: Sequence[int], count: int, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator) for _ in range(count)]


def merge(rule: MergeRule, base: Tensor, experts: Sequence[Tensor], *, is_matrix: bool = True) -> Tensor:
    """Fold experts into a model of one weight, as merge_stream does with many."""
    running, norms = torch.zeros_like(base), []
    for expert in experts:
        running = rule.update(running, expert - base, is_matrix=is_matrix)
        norms.append((expert - base).norm().item())
    return base + rule.scale(Norms(tuple(norms), running.norm().item())) * running


# The contract


@every_rule
def test_a_rule_is_named_like_its_file_and_says_where_it_comes_from(name: str) -> None:
    cls = rule_class(name)
    assert cls.__name__.lower() == name.replace("_", "")
    assert cls.reference.startswith("https://")
    assert cls.start_from in ("base", "previous", "merged")
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "the rule needs a docstring of its own"


@every_rule
def test_parameters_make_the_same_rule_again(name: str) -> None:
    rule = get_rule(name)
    assert get_rule(name, **rule.parameters()) == rule
    assert not any(word.endswith("_") for word in rule.parameters())
    assert {word: default for word, (_, default) in parameter_types(type(rule)).items()} == rule.parameters()


@every_rule
def test_a_rule_is_frozen(name: str) -> None:
    rule = get_rule(name)
    assert hash(rule) == hash(get_rule(name))
    for field in [*(f.name for f in dataclasses.fields(rule)), "running"]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, field, 0.5)


@every_rule
def test_an_unknown_parameter_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} has no parameter 'lamda'; it has: ") as error:
        get_rule(name, lamda=0.7)
    known = ", ".join(get_rule(name).parameters()) or "none"
    assert str(error.value).endswith(f"it has: {known}")


@every_rule
def test_a_parameter_of_the_wrong_type_is_refused_by_name(name: str) -> None:
    for word, (kind, _) in parameter_types(rule_class(name)).items():
        for wrong in [None, "no such thing", *([math.nan, math.inf, True] if kind is float else [])]:
            if kind is str and isinstance(wrong, str):
                continue
            with pytest.raises(ValueError, match=f"^{name}'s {word} must be "):
                get_rule(name, **{word: wrong})


def test_an_unknown_rule_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="magmx"):
        get_rule("magmx")


@every_rule
@every_shape
def test_update_leaves_its_inputs_alone(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    running, task_vector = draw(shape, 2)
    before = running.clone(), task_vector.clone()
    get_rule(name).update(running, task_vector, is_matrix=is_matrix)
    assert torch.equal(running, before[0])
    assert torch.equal(task_vector, before[1])


@every_rule
@every_shape
def test_update_takes_views_with_gaps(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    running, task_vector = draw(shape, 2)
    gaps = [torch.full((*shape, 2), 9.0) for _ in range(2)]
    views = [gap[..., 0].copy_(x) for gap, x in zip(gaps, (running, task_vector), strict=True)]
    rule = get_rule(name)
    new = rule.update(views[0], views[1], is_matrix=is_matrix)
    torch.testing.assert_close(new, rule.update(running, task_vector, is_matrix=is_matrix))
    assert torch.equal(views[0], running)
    assert torch.equal(views[1], task_vector)
    assert all((gap[..., 1] == 9).all() for gap in gaps)


@every_rule
@every_shape
def test_update_returns_float32_of_the_same_shape_and_repeats_itself(
    name: str, shape: tuple[int, ...], is_matrix: bool
) -> None:
    running, task_vector = draw(shape, 2)
    first, again = (get_rule(name).update(running, task_vector, is_matrix=is_matrix) for _ in range(2))
    assert first.dtype == torch.float32
    assert first.shape == shape
    assert torch.equal(first, again)


@every_rule
@every_shape
def test_zeros_stay_finite(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    rule, zeros = get_rule(name), torch.zeros(shape)
    (task_vector,) = draw(shape, 1)
    for running, new in itertools.product((zeros, task_vector), repeat=2):
        assert rule.update(running, new, is_matrix=is_matrix).isfinite().all()
    for norms in [(0.0,), (0.0, 0.0), (1.0, 0.0, 2.0)]:
        assert math.isfinite(rule.scale(Norms(norms, running=0.0)))


@every_rule
@every_shape
def test_experts_that_learnt_nothing_leave_the_base(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    (base,) = draw(shape, 1)
    assert torch.equal(merge(get_rule(name), base, [base, base], is_matrix=is_matrix), base)


@every_rule
@every_shape
def test_one_expert_comes_out_whole(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    whole = oracle(name).whole
    if whole is None:
        pytest.skip(f"{name} has no parameters under which one expert is returned")
    base, expert = draw(shape, 2)
    merged = merge(get_rule(name, **whole), base, [expert], is_matrix=is_matrix)
    assert torch.equal(merged, base + (expert - base))


@every_rule
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("shape", [(8, 13), (13, 8)])
def test_equals_the_method_as_its_paper_writes_it(name: str, experts: int, shape: tuple[int, int]) -> None:
    rule, (base, *models) = get_rule(name), draw(shape, experts + 1)
    fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    task_vectors = [(model - base).double() for model in models]
    expected = base.double() + oracle(name).merged_minus_base(task_vectors, **fields)
    torch.testing.assert_close(merge(rule, base, models).double(), expected, rtol=0, atol=1e-5)


@every_rule
def test_a_whole_model_scale_depends_on_the_ratio_of_norms_only(name: str) -> None:
    rule = get_rule(name)
    norms = Norms((1.0, 2.0, 4.5), running=3.0)
    tenfold = Norms(tuple(10 * n for n in norms.experts), running=30.0)
    assert rule.scale(tenfold) == pytest.approx(rule.scale(norms), rel=1e-12)
    doubled = dataclasses.replace(norms, running=6.0)
    assert (rule.scale(doubled) != rule.scale(norms)) == rule.whole_model_scale


# The methods


def fold_magmax(task_vectors: Sequence[Tensor]) -> Tensor:
    rule, running = get_rule("magmax"), torch.zeros_like(task_vectors[0])
    for task_vector in task_vectors:
        running = rule.update(running, task_vector, is_matrix=True)
    return running


def tying(count: int) -> list[Tensor]:
    """Return task vectors of a few whole numbers, so that equal magnitudes of either sign are everywhere."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(-2, 3, (40, 50), generator=generator).float() for _ in range(count)]


@pytest.mark.parametrize("task_vectors", [draw((40, 50), 5), tying(5)], ids=["gaussian", "with ties"])
def test_magmax_in_a_stream_equals_magmax_in_one_go(task_vectors: list[Tensor]) -> None:
    assert torch.equal(fold_magmax(task_vectors), magmax(task_vectors, lambda_=1.0))


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
    for fold in folds:
        assert torch.equal(fold.abs(), largest)
        assert torch.equal(fold[~has_tie], folds[0][~has_tie])
    assert any(not torch.equal(fold, folds[0]) for fold in folds)


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
