"""One suite for all merge rules: it finds a new file in merge_rules/ by itself, and asks only for an oracle.

The checks are those of hf_contmerge.testing.check_rule, which is for rules in packages of others.

The oracles are in toys/oracles.py: the methods over all task vectors at once, in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from toys.oracles import ORACLES, Oracle, ema, opcm

from hf_contmerge.errors import RecipeError
from hf_contmerge.merge_rules import MergeRule, Norms, Weight, get_rule, parameter_types, rule_class, rule_names
from hf_contmerge.merge_rules.ema import Ema
from hf_contmerge.testing import check_rule
from hf_contmerge.testing.folding import Check
from hf_contmerge.testing.rules import CHECKS, equals_its_oracle, returns_a_single_expert, variants


def oracle(name: str) -> Oracle:
    if name not in ORACLES:
        pytest.fail(
            f"merge_rules/{name}.py has no oracle. Write one and append it to ORACLES in tests/toys/oracles.py."
        )
    return ORACLES[name]


every_rule = pytest.mark.parametrize("name", rule_names())
RULES = [rule for name in rule_names() for rule in variants(rule_class(name), {})] + [get_rule("null_space", rank=3)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, rule: MergeRule) -> None:
    check(rule)


@every_rule
def test_equals_the_method_as_its_paper_writes_it(name: str) -> None:
    equals_its_oracle(get_rule(name), oracle(name).merged_minus_base)


@every_rule
def test_one_expert_comes_out_whole(name: str) -> None:
    whole = oracle(name).whole
    if whole is None:
        pytest.skip(f"{name} has no parameters under which one expert is returned")
    returns_a_single_expert(get_rule(name, **whole))


@every_rule
def test_a_rule_is_named_like_its_file(name: str) -> None:
    assert rule_class(name).__name__.lower() == name.replace("_", "")


@every_rule
def test_defaults_are_the_rules_own(name: str) -> None:
    rule = get_rule(name)
    assert {word: default for word, (_, default) in parameter_types(type(rule)).items()} == rule.parameters()


@every_rule
def test_an_unknown_parameter_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} has no parameter 'lamda'; it has: ") as error:
        get_rule(name, lamda=0.7)
    known = ", ".join(get_rule(name).parameters()) or "none"
    assert str(error.value).endswith(f"it has: {known}")


def test_an_unknown_rule_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="magmx"):
        get_rule("magmx")


# check_rule, for rules of others: what it accepts, and what it says of a rule that breaks a promise


def test_check_rule_takes_words_classes_parameters_and_oracles() -> None:
    check_rule("opcm", opcm, alpha=0.3, variant="fusionbench")
    check_rule(Ema, ema, beta=0.25)
    with pytest.raises(RecipeError, match=r"Unknown rule 'emma'\. Did you mean 'ema'"):
        check_rule("emma")
    with pytest.raises(AssertionError, match=r"Ema\(beta=0.5\): 2 experts, a matrix of shape \(8, 13\): not what the"):
        check_rule(Ema, lambda task_vectors, beta: task_vectors[-1] * beta)


@dataclass(frozen=True)
class Sum(Ema):
    """S <- S + D, and nothing wrong with it."""

    beta: float = 1.0

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + task_vector


BROKEN: dict[str, tuple[type[MergeRule], str]] = {}


def broken(said: str) -> Callable[[type[MergeRule]], type[MergeRule]]:
    """Return a decorator for rules that check_rule must refuse with these words."""

    def keep(cls: type[MergeRule]) -> type[MergeRule]:
        BROKEN[cls.__name__] = (cls, said)
        return cls

    return keep


@broken("`reference` must be a URL; it is 'a book'")
@dataclass(frozen=True)
class FromABook(Sum):
    """A rule."""

    reference = "a book"


@broken("the class has no docstring")
@dataclass(frozen=True)
class Silent(Sum):
    pass


@broken("tags must be annotated as bool, int, float, str or a Literal; it is tuple[str, ...]")
@dataclass(frozen=True)
class Tagged(Sum):
    """A rule."""

    tags: tuple[str, ...] = ()


@broken("weight of shape (): `running` is changed in place. Scalars are not equal!")
@dataclass(frozen=True)
class InPlace(Sum):
    """A rule."""

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running.add_(task_vector)


@broken("`update` must return torch.float32 of shape (); got torch.float64 of shape ()")
@dataclass(frozen=True)
class Doubled(Sum):
    """A rule."""

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running.double() + task_vector


@broken("weight of shape (): `update` does not repeat itself")
@dataclass(frozen=True)
class Drawn(Sum):
    """A rule."""

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + torch.rand(()) * task_vector


@broken("a task vector of zeros makes values that are not finite")
@dataclass(frozen=True)
class Normed(Sum):
    """A rule."""

    linear = False

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + task_vector / task_vector.norm()


@broken("experts that are the base change it")
@dataclass(frozen=True)
class Shifted(Sum):
    """A rule."""

    linear = False

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + task_vector + 1


@broken("`whole_model_scale` is False, but the scale reads norms")
@dataclass(frozen=True)
class Nosy(Sum):
    """A rule."""

    def scale(self, norms: Norms) -> float:
        return norms.experts[0] / norms.running if norms.running else 0.0


@broken("beta is `tunable`, but three times of it make the scale 1.0, not 3.0")
@dataclass(frozen=True)
class NotTuned(Sum):
    """A rule."""

    tunable = ("beta",)


@broken("`basis_free`, but cores of shape (12, 9) are not folded like their matrices of shape (40, 30)")
@dataclass(frozen=True)
class LargestOnly(Sum):
    """A rule."""

    linear = False

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return torch.where(task_vector.abs() > running.abs(), task_vector, running)


@broken("weight of shape (): values that are not finite from bfloat16's large values")
@dataclass(frozen=True)
class Squared(Sum):
    """A rule that divides by a square in float32."""

    unit = "tensor"
    basis_free = False

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        square = task_vector.square().sum()
        return running + (task_vector * square / square if task_vector.any() else task_vector)


@broken("weight of shape (7,): float32 is not float64 rounded, for float16's smallest values; is it `ill_posed`?")
@dataclass(frozen=True)
class Absorbed(Sum):
    """A rule that adds small numbers to a large one."""

    basis_free = False

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + ((1 + task_vector) - 1)


@broken("Inverse(beta=0.0): values that are not finite from weights of shape ()")
@dataclass(frozen=True)
class Inverse(Sum):
    """A rule without a check of its parameter."""

    def scale(self, norms: Norms) -> float:
        return 1 / self.beta if self.beta else math.inf


@broken("`linear`, but sums of experts are merged otherwise")
@dataclass(frozen=True)
class Largest(Sum):
    """A rule."""

    basis_free = False

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return torch.where(task_vector.abs() > running.abs(), task_vector, running)


@broken("beta is `of_newest` from stage 2, but read before")
@dataclass(frozen=True)
class Early(Sum):
    """A rule."""

    of_newest: ClassVar[dict[str, int]] = {"beta": 2}

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + self.beta * task_vector


@broken("`selects`, but 1 elements after stage 2 are no expert's")
@dataclass(frozen=True)
class Selecting(Sum):
    """A rule."""

    basis_free = False
    selects = True


@broken("`unit` is 'element', but pieces of shape (7,) are folded otherwise")
@dataclass(frozen=True)
class Centred(Sum):
    """A rule."""

    basis_free = False

    def update(self, running: Tensor, task_vector: Tensor, weight: Weight) -> Tensor:
        return running + task_vector - (task_vector.mean() if task_vector.numel() else 0)


@dataclass(frozen=True)
class RowMeans(Sum):
    """A sum, and the mean square of each row, which the sum is divided by."""

    linear = False
    unit = "tensor"
    basis_free = False

    def parts(self, weight: Weight) -> dict[str, tuple[int, ...]]:
        return {"sum": weight.shape, "squares": weight.shape[:1]}

    def update(self, running: dict[str, Tensor], task_vector: Tensor, weight: Weight) -> dict[str, Tensor]:
        squares = task_vector.square()
        squares = squares.flatten(1).sum(1) if squares.dim() > 1 else squares
        return {"sum": running["sum"] + task_vector, "squares": running["squares"] + squares}

    def read_out(self, running: dict[str, Tensor], weight: Weight) -> Tensor:
        total, squares = running["sum"], running["squares"]
        return total / (1 + squares).reshape((*squares.shape, *[1] * (total.dim() - squares.dim())))


@broken("`update` must return the parts sum, squares, in this order")
@dataclass(frozen=True)
class Turned(RowMeans):
    """Returns its parts in another order."""

    def update(self, running: dict[str, Tensor], task_vector: Tensor, weight: Weight) -> dict[str, Tensor]:
        return dict(reversed(super().update(running, task_vector, weight).items()))


def test_check_rule_takes_rules_with_parts() -> None:
    check_rule(RowMeans)


@pytest.mark.parametrize("name", BROKEN)
def test_check_rule_says_what_is_wrong(name: str) -> None:
    cls, said = BROKEN[name]
    check_rule(Sum)
    with pytest.raises(AssertionError) as error:
        check_rule(cls)
    assert said in str(error.value)
    assert str(error.value).startswith(name)
