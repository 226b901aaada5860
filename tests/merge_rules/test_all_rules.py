"""One suite for all merge rules: it finds a new file in merge_rules/ by itself, and asks only for an oracle.

To add a rule's oracle, append to ORACLES below: the method over all task vectors at once, in float64 and as literally
as its paper writes it, not as our code does.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from toys.folds import draw, fold, merge, weight, zeros

from hf_contmerge.merge_rules import MergeRule, Norms, get_rule, parameter_types, rule_class, rule_names


def average(task_vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(task_vectors)).mean(0)


def ema(task_vectors: Sequence[Tensor], *, beta: float) -> Tensor:
    t = len(task_vectors)
    return torch.stack([(1 - beta) * beta ** (t - i) * d for i, d in enumerate(task_vectors, 1)]).sum(0)


def iso_c(task_vectors: Sequence[Tensor], *, alpha: float) -> Tensor:
    u, s, vh = torch.linalg.svd(torch.stack(list(task_vectors)).sum(0), full_matrices=False)
    return alpha * s.mean() * u @ vh


def magmax(task_vectors: Sequence[Tensor], *, lambda_: float) -> Tensor:
    latest_first = torch.stack(list(task_vectors)).flip(0)  # argmax takes the first of equals
    return lambda_ * latest_first.gather(0, latest_first.abs().argmax(0, keepdim=True))[0]


def null_space(task_vectors: Sequence[Tensor], *, rank: int) -> Tensor:
    running = task_vectors[0]
    for d in task_vectors[1:]:
        lead = torch.linalg.svd(running, full_matrices=False).Vh[:rank]
        running = running + d @ (torch.eye(d.shape[1], dtype=d.dtype) - lead.T @ lead)
    return running


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


def task_arithmetic(task_vectors: Sequence[Tensor], *, lambda_: float) -> Tensor:
    return lambda_ * torch.stack(list(task_vectors)).sum(0)


def ties(task_vectors: Sequence[Tensor], *, density: float, lambda_: float) -> Tensor:
    trimmed = torch.stack(list(task_vectors))
    for d in trimmed:
        d[d.abs() < d.abs().quantile(1 - int(density * d.numel()) / d.numel(), interpolation="higher")] = 0
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    return lambda_ * (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


@dataclass(frozen=True)
class Oracle:
    """What a rule must equal, and the parameters under which a single expert comes out whole (None: there are none)."""

    merged_minus_base: Callable[..., Tensor]
    whole: dict[str, Any] | None


ORACLES = {
    "average": Oracle(average, {}),
    "ema": Oracle(ema, {"beta": 0.0}),
    "iso_c": Oracle(iso_c, None),
    "magmax": Oracle(magmax, {"lambda": 1.0}),
    "null_space": Oracle(null_space, {}),
    "opcm": Oracle(opcm, {}),
    "random_mix": Oracle(random_mix, {}),
    "slao": Oracle(slao, {}),
    "task_arithmetic": Oracle(task_arithmetic, {"lambda": 1.0}),
    "ties": Oracle(ties, {"density": 1.0}),
}

SHAPES = [((), False), ((7,), False), ((5, 7), False), ((5, 7), True), ((3, 7, 5), False), ((3, 7, 5), True)]
every_rule = pytest.mark.parametrize("name", rule_names())
every_shape = pytest.mark.parametrize(("shape", "is_matrix"), SHAPES, ids=str)


def oracle(name: str) -> Oracle:
    if name not in ORACLES:
        pytest.fail(f"merge_rules/{name}.py has no oracle. Write one and append it to ORACLES in tests/test_rules.py.")
    return ORACLES[name]


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
def test_tunable_parameters_enter_the_scale_alone(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    """So that `auto` and a guard can try other values of them on a state that is there."""
    rule, vectors, norms = get_rule(name), draw(shape, 2), Norms((1.0, 2.0), 3.0)
    state = fold(rule, vectors, is_matrix=is_matrix)
    for field in rule.tunable:
        other = dataclasses.replace(rule, **{field: 3 * getattr(rule, field)})
        assert torch.equal(fold(other, vectors, is_matrix=is_matrix), state)
        assert torch.equal(*(r.read_out(state, weight(is_matrix, 2)) for r in (rule, other)))
        assert other.scale(norms) == pytest.approx(3 * rule.scale(norms))


@every_rule
@every_shape
def test_inputs_are_left_alone(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    rule, (first, task_vector) = get_rule(name), draw(shape, 2)
    running = fold(rule, [first], is_matrix=is_matrix).clone()
    before = running.clone(), task_vector.clone()
    rule.update(running, task_vector, weight(is_matrix, 2))
    rule.read_out(running, weight(is_matrix, 2))
    assert torch.equal(running, before[0])
    assert torch.equal(task_vector, before[1])


def gapped(x: Tensor) -> Tensor:
    """Return a view of every other element of a larger tensor."""
    return torch.full((*x.shape, 2), 9.0)[..., 0].copy_(x)


@every_rule
@every_shape
def test_views_with_gaps_are_taken(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    rule, (first, task_vector) = get_rule(name), draw(shape, 2)
    running = fold(rule, [first], is_matrix=is_matrix)
    new = rule.update(gapped(running), gapped(task_vector), weight(is_matrix, 2))
    torch.testing.assert_close(new, rule.update(running, task_vector, weight(is_matrix, 2)))
    read = rule.read_out(gapped(running), weight(is_matrix, 2))
    torch.testing.assert_close(read, rule.read_out(running, weight(is_matrix, 2)))


@every_rule
@every_shape
def test_results_are_float32_of_the_right_shape_and_repeat_themselves(
    name: str, shape: tuple[int, ...], is_matrix: bool
) -> None:
    rule, task_vectors = get_rule(name), draw(shape, 2)
    first, again = (fold(rule, task_vectors, is_matrix=is_matrix) for _ in range(2))
    assert first.dtype == torch.float32
    assert first.shape == zeros(rule, shape).shape
    assert torch.equal(first, again)
    read, once_more = (rule.read_out(first, weight(is_matrix, 2)) for _ in range(2))
    assert read.dtype == torch.float32
    assert read.shape == shape
    assert torch.equal(read, once_more)


@every_rule
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 4)])
def test_a_weight_without_elements_stays_one(name: str, shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    assert merge(get_rule(name), empty, [empty, empty], is_matrix=len(shape) > 1).shape == shape


@every_rule
@every_shape
def test_zeros_stay_finite(name: str, shape: tuple[int, ...], is_matrix: bool) -> None:
    rule, zero, (task_vector,) = get_rule(name), torch.zeros(shape), draw(shape, 1)
    for earlier, new in itertools.product((zero, task_vector), repeat=2):
        state = fold(rule, [earlier, new], is_matrix=is_matrix)
        assert state.isfinite().all()
        assert rule.read_out(state, weight(is_matrix, 2)).isfinite().all()
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


# The marks


def rules_with(mark: str) -> list[MergeRule]:
    """Return the rules that bear a mark, with each word of a parameter that is one of a few."""
    rules = []
    for name in rule_names():
        choices = [(w, get_args(kind)) for w, (kind, _) in parameter_types(rule_class(name)).items() if get_args(kind)]
        rules += [get_rule(name, **{word: value}) for word, values in choices for value in values] or [get_rule(name)]
    return [rule for rule in rules if getattr(rule, mark)]


def orthonormal(m: int, n: int) -> Tensor:
    return torch.linalg.qr(draw((m, n), 1, seed=m)[0].double()).Q


every_basis_free_rule = pytest.mark.parametrize(
    "rule", [*rules_with("basis_free"), get_rule("null_space", rank=3)], ids=str
)
CORES = [((40, 30), (12, 9)), ((30, 40), (9, 12)), ((90, 30), (9, 12)), ((30, 90), (7, 7))]


@every_basis_free_rule
@pytest.mark.parametrize(("shape", "core"), CORES)
def test_a_basis_free_rule_does_to_cores_what_it_does_to_matrices(
    rule: MergeRule, shape: tuple[int, int], core: tuple[int, int]
) -> None:
    p, q = (orthonormal(m, r) for m, r in zip(shape, core, strict=True))
    cores = [c.double() for c in draw(core, 3)]
    small = fold(rule, cores)
    large = fold(rule, [(p @ c @ q.T).float() for c in cores])
    torch.testing.assert_close(large.double(), p @ small @ q.T, rtol=0, atol=1e-5)
    assert torch.equal(rule.read_out(small, weight(True, 3)), small)


@every_basis_free_rule
def test_a_basis_free_rule_takes_cores_that_grow(rule: MergeRule) -> None:
    cores = [torch.nn.functional.pad(c.double(), (0, 12 - k, 0, 12 - k)) for k in (4, 8, 12) for c in draw((k, k), 1)]
    running = torch.zeros(0, 0, dtype=torch.float64)
    for stage, (k, core) in enumerate(zip((4, 8, 12), cores, strict=True), 1):
        grown = torch.nn.functional.pad(running, (0, k - len(running), 0, k - len(running)))
        running = rule.update(grown, core[:k, :k], weight(True, stage))
    assert running.dtype == torch.float64
    torch.testing.assert_close(running, fold(rule, cores), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", rules_with("selects"), ids=str)
@every_shape
def test_a_rule_that_selects_holds_one_experts_value_in_each_element(
    rule: MergeRule, shape: tuple[int, ...], is_matrix: bool
) -> None:
    experts = draw(shape, 4)
    for stage in range(1, 5):
        state = fold(rule, experts[:stage], is_matrix=is_matrix)
        assert torch.stack([state == d for d in [*experts[:stage], torch.zeros(shape)]]).any(0).all()


@every_rule
def test_what_the_marks_promise_fits_together(name: str) -> None:
    cls = rule_class(name)
    assert cls.unit in ("element", "matrix", "tensor")
    assert cls.slots >= 1
    assert not (cls.basis_free or cls.selects) or cls.slots == 1
    assert not cls.basis_free or cls.unit != "tensor"


@pytest.mark.parametrize("name", [n for n in rule_names() if rule_class(n).unit != "tensor"])
@pytest.mark.parametrize("shape", [(7,), (5, 7)])
def test_pieces_of_a_weight_may_be_folded_alone(name: str, shape: tuple[int, ...]) -> None:
    rule, task_vectors = get_rule(name), [d.reshape(-1) for d in draw(shape, 3)]
    whole = [d.reshape(shape) for d in task_vectors]
    is_matrix = rule.unit == "element"
    parts = [fold(rule, [d[cut] for d in task_vectors], is_matrix=is_matrix) for cut in (slice(3), slice(3, None))]
    state, expected = torch.cat(parts, dim=-1), fold(rule, whole, is_matrix=is_matrix)
    assert torch.equal(state.reshape(expected.shape), expected)
    read = [rule.read_out(part, weight(is_matrix, 3)) for part in parts]
    assert torch.equal(torch.cat(read).reshape(shape), rule.read_out(expected, weight(is_matrix, 3)))
