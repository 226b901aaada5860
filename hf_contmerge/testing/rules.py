"""Checks of merge rules. Needs torch only.

from hf_contmerge.testing import check_rule

check_rule("gain")                                  # a rule of an installed package or of a plugin file
check_rule(Gain, oracle, alpha=0.5)                 # a class, with other parameters

def oracle(task_vectors, *, alpha):                 # the method over all of them at once, in float64
    return alpha * torch.stack(list(task_vectors)).mean(0)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from hf_contmerge.merge_rules import (
    MergeRule,
    Norms,
    StartFrom,
    State,
    named_rule,
    own_fields,
    parameter_types,
    rule_of,
)  # fmt: skip
from hf_contmerge.testing import extremes
from hf_contmerge.testing._docs import docstring
from hf_contmerge.testing.folding import (
    Case,
    Check,
    draw,
    flat,
    fold,
    merge,
    on_each_weight,
    on_parts,
    require,
    require_equal,
    weight,
    zeros,
)  # fmt: skip

Oracle = Callable[..., Tensor]
"""Takes the task vectors of a matrix, in float64, and the rule's fields by name; returns merged - base."""

_CORES = (((40, 30), (12, 9)), ((30, 40), (9, 12)), ((90, 30), (9, 12)), ((30, 90), (7, 7)))


def check_rule(rule: str | type[MergeRule], /, oracle: Oracle | None = None, **parameters: Any) -> None:
    """Check a merge rule; raise AssertionError for a broken promise.

    The message names the promise, the weight and the difference.

    It must say where it was published, be frozen, and refuse parameters that it does not have. `update` and `read_out`
    must repeat themselves, leave their inputs alone, return float32 of the right shape, take views, empty weights and
    zeros, and add nothing for experts that learnt nothing. What its marks promise must hold: `unit`, `slots`,
    `basis_free`, `linear`, `selects`, `tunable`, `of_newest`,
    `whole_model_scale`. With an oracle, it must equal the method as published.

    Results must be finite for weights of zeros, of rank 1, of equal singular values and at the ends of 16-bit floats,
    and for parameters at the ends of their ranges. Unless it is `ill_posed`, float32 must agree with float64, and
    several threads with one, to 1e-5 of the largest value (1e-4 for a `degree` above 1).

    Args:
        rule: its word in recipes, or its class.
        oracle: the method over all task vectors at once.
        parameters: as in recipes; the rule's defaults otherwise. All values of a Literal are checked in turn.

    Raises:
        AssertionError: a check fails.
        RecipeError: an unknown word.
    """
    cls = named_rule(rule) if isinstance(rule, str) else rule
    for variant in variants(cls, parameters):
        for check in CHECKS:
            check(variant)
    if oracle:
        equals_its_oracle(rule_of(cls, cls.__name__, parameters), oracle)


def variants(cls: type[MergeRule], parameters: Mapping[str, Any]) -> Iterator[MergeRule]:
    """Yield a rule with each value of its Literals; `parameters` are fixed."""
    kinds = {word: kind for word, (kind, _) in parameter_types(cls).items() if word not in parameters}
    choices = {word: get_args(kind) for word, kind in kinds.items() if get_origin(kind) is Literal}
    for picked in itertools.product(*choices.values()):
        yield rule_of(cls, cls.__name__, {**parameters, **dict(zip(choices, picked, strict=True))})


# The contract


def says_what_it_is(rule: MergeRule) -> None:
    """Check a rule's reference, start and docstring."""
    cls = type(rule)
    reference, start, starts = getattr(cls, "reference", ""), getattr(cls, "start_from", None), get_args(StartFrom)
    require(reference.startswith("https://"), rule, f"`reference` must be a URL; it is {reference!r}")
    require(start in starts, rule, f"`start_from` must be one of {starts}; it is {start!r}")
    require(bool(docstring(cls)), rule, "the class has no docstring")


def is_made_again_by_its_parameters(rule: MergeRule) -> None:
    """Check a rule's parameters as recipes spell them."""
    for word, (kind, _) in parameter_types(type(rule)).items():
        known = kind in (bool, int, float, str) or get_origin(kind) is Literal
        require(known, rule, f"{word} must be annotated as bool, int, float, str or a Literal; it is {kind}")
    again = rule_of(type(rule), type(rule).__name__, rule.parameters())
    require(again == rule, rule, f"its own parameters {rule.parameters()} make another rule, {again}")
    require(hash(again) == hash(rule), rule, "two equal rules must have one hash")


def is_frozen(rule: MergeRule) -> None:
    """Check for frozen fields."""
    for name in (*(f.name for f in dataclasses.fields(rule)), "running"):
        try:
            setattr(rule, name, 0.5)
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError(f"{rule}: `{name}` can be set; decorate the class with @dataclass(frozen=True)")


def refuses_what_it_does_not_have(rule: MergeRule) -> None:
    """Check the errors for unknown parameters and wrong types."""
    cls, name = type(rule), type(rule).__name__
    require(_refused(cls, {"lamda": 0.7}, TypeError, f"{name} has no parameter 'lamda'"), rule, "`lamda` is accepted")
    for word, (kind, _) in parameter_types(cls).items():
        wrong = [None, "no such thing", *([math.nan, math.inf, True] if kind is float else [])]
        for value in wrong[:1] if kind is str else wrong:
            refused = _refused(cls, {word: value}, ValueError, f"{name}'s {word} must be ")
            require(refused, rule, f"{word}={value!r} is accepted, or refused without a word")


def _refused(cls: type[MergeRule], parameters: Mapping[str, Any], kind: type[Exception], start: str) -> bool:
    try:
        rule_of(cls, cls.__name__, parameters)
    except kind as error:
        return str(error).startswith(start)
    return False


@on_each_weight
def leaves_its_inputs_alone(case: Case) -> None:
    """Check for writes into the arguments of `update` and `read_out`."""
    first, task_vector = draw(case.shape, 2)
    running = on_parts(torch.clone, case.fold([first]))
    before = on_parts(torch.clone, running), task_vector.clone()
    case.rule.update(running, task_vector, case.weight(2))
    case.rule.read_out(running, case.weight(2))
    require_equal(running, before[0], case, "`running` is changed in place")
    require_equal(task_vector, before[1], case, "`task_vector` is changed in place")


def _gapped(x: Tensor) -> Tensor:
    """Return a view of every other element of a larger tensor."""
    return torch.full((*x.shape, 2), 9.0)[..., 0].copy_(x)


@on_each_weight
def takes_views_with_gaps(case: Case) -> None:
    """Check tensors with strides."""
    first, task_vector = draw(case.shape, 2)
    running, second = case.fold([first]), case.weight(2)
    found = case.rule.update(on_parts(_gapped, running), _gapped(task_vector), second)
    require_equal(found, case.rule.update(running, task_vector, second), case, "views are folded otherwise", atol=1e-5)
    read = case.rule.read_out(on_parts(_gapped, running), second)
    require_equal(read, case.rule.read_out(running, second), case, "views are read otherwise", atol=1e-5)


@on_each_weight
def repeats_itself_in_float32(case: Case) -> None:
    """Check shapes and dtypes; equal inputs must give equal bits."""
    task_vectors, second = draw(case.shape, 2), case.weight(2)
    state, again = (case.fold(task_vectors) for _ in range(2))
    _require_like(state, zeros(case.rule, case.shape, is_matrix=case.is_matrix), case, "`update`")
    require_equal(state, again, case, "`update` does not repeat itself")
    read, once_more = (case.rule.read_out(state, second) for _ in range(2))
    _require_like(read, torch.zeros(case.shape), case, "`read_out`")
    require_equal(read, once_more, case, "`read_out` does not repeat itself")


def _require_like(found: State, wanted: State, who: object, what: str) -> None:
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping) or list(found) != list(wanted):
            raise AssertionError(f"{who}: {what} must return the parts {', '.join(wanted)}, in this order")
        for name, part in wanted.items():
            _require_like(found[name], part, who, f"{what}, part {name},")
        return
    if not isinstance(found, Tensor):
        raise AssertionError(f"{who}: {what} must return a tensor; got {type(found).__name__}")
    got, asked = ((t.dtype, tuple(t.shape)) for t in (found, wanted))
    require(got == asked, who, f"{what} must return {asked[0]} of shape {asked[1]}; got {got[0]} of shape {got[1]}")


def keeps_empty_weights(rule: MergeRule) -> None:
    """Check weights without elements."""
    for shape in ((0,), (0, 4), (4, 0), (2, 0, 4)):
        empty = torch.zeros(shape)
        merged = merge(rule, empty, [empty, empty], is_matrix=len(shape) > 1)
        _require_like(merged, empty, rule, f"merging weights of shape {shape}")


@on_each_weight
def stays_finite_on_zeros(case: Case) -> None:
    """Check task vectors, and norms of whole models, of zero."""
    zero, (task_vector,) = torch.zeros(case.shape), draw(case.shape, 1)
    for earlier, new in itertools.product((zero, task_vector), repeat=2):
        state = case.fold([earlier, new])
        read = case.rule.read_out(state, case.weight(2))
        finite = bool(flat(state).isfinite().all() and read.isfinite().all())
        require(finite, case, "a task vector of zeros makes values that are not finite")
    for norms in [(0.0,), (0.0, 0.0), (1.0, 0.0, 2.0)]:
        scale = case.rule.scale(Norms(norms, running=0.0))
        require(math.isfinite(scale), case, f"the scale is {scale} for norms {norms} and a state of norm 0")


@on_each_weight
def leaves_the_base_if_nothing_was_learnt(case: Case) -> None:
    """Check experts equal to the base: its bits must stay."""
    (base,) = draw(case.shape, 1)
    merged = merge(case.rule, base, [base, base], is_matrix=case.is_matrix)
    require_equal(merged, base, case, "experts that are the base change it")


def scales_by_ratios_of_norms(rule: MergeRule) -> None:
    """Check the scale: of ratios of norms for `whole_model_scale`, else constant."""
    norms = Norms((1.0, 2.0, 4.5), running=3.0)
    tenfold = Norms(tuple(10 * n for n in norms.experts), running=30.0)
    scale, same = rule.scale(norms), rule.scale(tenfold)
    require(math.isclose(same, scale, rel_tol=1e-12), rule, f"all norms tenfold make the scale {same}, not {scale}")
    reads = rule.scale(dataclasses.replace(norms, running=6.0)) != scale
    said = f"`whole_model_scale` is {rule.whole_model_scale}"
    require(reads == rule.whole_model_scale, rule, f"{said}, but the scale {'reads' if reads else 'ignores'} norms")


def equals_its_oracle(rule: MergeRule, oracle: Oracle) -> None:
    """Check a rule against its method over all task vectors at once."""
    fields = {f.name: getattr(rule, f.name) for f in own_fields(type(rule))}
    for shape, experts in itertools.product(((8, 13), (13, 8)), (1, 2, 5)):
        base, *models = draw(shape, experts + 1)
        wanted = base.double() + oracle([(model - base).double() for model in models], **fields)
        what = f"{experts} experts, a matrix of shape {shape}: not what the oracle returns"
        require_equal(merge(rule, base, models).double(), wanted, rule, what, atol=1e-5)


@on_each_weight
def returns_a_single_expert(case: Case) -> None:
    """Check a merge of one expert: few rules return it unchanged."""
    base, expert = draw(case.shape, 2)
    merged = merge(case.rule, base, [expert], is_matrix=case.is_matrix)
    require_equal(merged, base + (expert - base), case, "a single expert is not returned as it is")


# The marks


def has_marks_that_fit(rule: MergeRule) -> None:
    """Check the marks against each other."""
    units = ("element", "matrix", "tensor")
    require(rule.unit in units, rule, f"`unit` must be one of {units}; it is {rule.unit!r}")
    require(rule.slots >= 1, rule, f"`slots` must be 1 or more; it is {rule.slots}")
    one = not (rule.basis_free or rule.selects) or rule.slots == 1
    require(one, rule, f"with {rule.slots} `slots` it can be neither `basis_free` nor `selects`")
    named = type(rule).parts is not MergeRule.parts
    whole = named or rule.needs
    require(not (rule.basis_free and whole), rule, "with named parts or statistics it cannot be `basis_free`")
    require(not rule.basis_free or rule.unit != "tensor", rule, "a `basis_free` rule has a smaller `unit` than tensor")


@on_each_weight
def tunes_the_scale_alone(case: Case) -> None:
    """Check `tunable`: another value multiplies the scale and changes nothing else."""
    rule, vectors, norms, second = case.rule, draw(case.shape, 2), Norms((1.0, 2.0), 3.0), case.weight(2)
    state = case.fold(vectors)
    for field in rule.tunable:
        other = dataclasses.replace(rule, **{field: 3 * getattr(rule, field)})
        changed = fold(other, vectors, is_matrix=case.is_matrix)
        require_equal(changed, state, case, f"`update` reads {field}, which is `tunable`")
        read = other.read_out(state, second)
        require_equal(read, rule.read_out(state, second), case, f"`read_out` reads {field}, which is `tunable`")
        scales = other.scale(norms), 3 * rule.scale(norms)
        what = f"{field} is `tunable`, but three times of it make the scale {scales[0]}, not {scales[1]}"
        require(math.isclose(*scales, rel_tol=1e-6), case, what)


@on_each_weight
def sums_the_experts_if_linear(case: Case) -> None:
    """Check `linear`: the merge of a sum is the sum of merges."""
    (a, b), second = (draw(case.shape, 2, seed=seed) for seed in (1, 2)), case.weight(2)
    if case.rule.linear:
        both, *apart = (case.fold(stream) for stream in ([x + y for x, y in zip(a, b, strict=True)], a, b))
        read, one, other = (case.rule.read_out(state, second) for state in (both, *apart))
        require_equal(read, one + other, case, "`linear`, but sums of experts are merged otherwise", atol=1e-5)


@on_each_weight
def reads_of_newest_from_its_stage_on(case: Case) -> None:
    """Check `of_newest`: earlier stages do not depend on these fields."""
    for field, stage in case.rule.of_newest.items():
        other = dataclasses.replace(case.rule, **{field: getattr(case.rule, field) / 3})
        if vectors := draw(case.shape, stage - 1):
            states = [fold(rule, vectors, is_matrix=case.is_matrix) for rule in (other, case.rule)]
            require_equal(states[0], states[1], case, f"{field} is `of_newest` from stage {stage}, but read before")


def folds_cores_like_matrices(rule: MergeRule) -> None:
    """Check `basis_free`: merging P C Q' equals P, merged C, Q'."""
    for shape, core in _CORES if rule.basis_free else ():
        p, q = (torch.linalg.qr(draw((m, r), 1, seed=m)[0].double()).Q for m, r in zip(shape, core, strict=True))
        cores = [c.double() for c in draw(core, 3)]
        small, large = fold(rule, cores), fold(rule, [(p @ c @ q.T).float() for c in cores])
        what = f"`basis_free`, but cores of shape {core} are not folded like their matrices of shape {shape}"
        require_equal(large.double(), p @ small @ q.T, rule, what, atol=1e-5)
        require_equal(rule.read_out(small, weight(True, 3)), small, rule, "`basis_free`, but `read_out` changes cores")


def takes_growing_cores(rule: MergeRule) -> None:
    """Check `basis_free`: cores get rows and columns between stages."""
    sizes = (4, 8, 12)
    running: Any = torch.zeros(0, 0, dtype=torch.float64)
    cores = [torch.nn.functional.pad(draw((k, k), 1)[0].double(), (0, 12 - k, 0, 12 - k)) for k in sizes]
    for stage, (k, core) in enumerate(zip(sizes, cores, strict=True) if rule.basis_free else (), 1):
        grown = torch.nn.functional.pad(running, (0, k - len(running), 0, k - len(running)))
        running = rule.update(grown, core[:k, :k], weight(True, stage))
    if rule.basis_free:
        require_equal(running, fold(rule, cores), rule, "cores that grow are folded otherwise", atol=1e-10)


@on_each_weight
def selects_one_experts_values(case: Case) -> None:
    """Check `selects`: each element of the state is one expert's, or 0."""
    experts = draw(case.shape, 4)
    for stage in range(1, 5) if case.rule.selects else ():
        state = case.fold(experts[:stage])
        state = state if isinstance(state, torch.Tensor) else next(iter(state.values()))  # the first part selects
        owned = torch.stack([state == d for d in [*experts[:stage], torch.zeros(case.shape)]]).any(0)
        strangers = int((~owned).sum())
        require(not strangers, case, f"`selects`, but {strangers} elements after stage {stage} are no expert's")


def folds_pieces_alone(rule: MergeRule) -> None:
    """Check `unit`: weights folded in pieces; matrices too, by element."""
    whole_parts = type(rule).parts is not MergeRule.parts  # how they are cut is the engine's affair
    for shape in ((7,), (5, 7)) if rule.unit != "tensor" and not whole_parts else ():
        is_matrix = rule.unit == "element"
        whole = draw(shape, 3)
        flat = [d.reshape(-1) for d in whole]
        parts = [fold(rule, [d[cut] for d in flat], is_matrix=is_matrix) for cut in (slice(3), slice(3, None))]
        state, what = (
            fold(rule, whole, is_matrix=is_matrix),
            f"`unit` is {rule.unit!r}, but pieces of shape {shape} are",
        )
        require_equal(torch.cat(parts, dim=-1).reshape(state.shape), state, rule, f"{what} folded otherwise")
        last = weight(is_matrix, 3)
        read = torch.cat([rule.read_out(part, last) for part in parts]).reshape(shape)
        require_equal(read, rule.read_out(state, last), rule, f"{what} read otherwise")


CHECKS: tuple[Check, ...] = (
    says_what_it_is,
    is_made_again_by_its_parameters,
    is_frozen,
    refuses_what_it_does_not_have,
    has_marks_that_fit,
    leaves_its_inputs_alone,
    repeats_itself_in_float32,
    takes_views_with_gaps,
    keeps_empty_weights,
    stays_finite_on_zeros,
    leaves_the_base_if_nothing_was_learnt,
    scales_by_ratios_of_norms,
    tunes_the_scale_alone,
    sums_the_experts_if_linear,
    reads_of_newest_from_its_stage_on,
    folds_cores_like_matrices,
    takes_growing_cores,
    selects_one_experts_values,
    folds_pieces_alone,
    *extremes.CHECKS,
)
"""What any rule must pass, in the order in which `check_rule` asks."""
