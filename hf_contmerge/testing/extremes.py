"""Checks of merge rules at extremes of weights, parameters, threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule, parameter_types, rule_of
from hf_contmerge.runtime.device import threads
from hf_contmerge.testing.folding import Case, Check, change, draw, on_each_weight, require, require_equal

Vectors = list[Tensor]

CLOSE = 1e-5
"""Allowed distance of two computations of one merge, relative to its largest value."""
_SUBNORMAL = 2.0**-145  # 16 units in the last place of float32's smallest values
_LARGE_MATRIX = (192, 320)  # where threads share a product


def _largest(vectors: Vectors, value: float) -> Vectors:
    """Scale task vectors to a largest magnitude."""
    return [d / d.abs().max() * value for d in vectors]


def _rank_one(vectors: Vectors) -> Vectors:
    return [d[..., :1] * d[..., :1, :] if d.ndim > 1 else d for d in vectors]


def _orthonormal(vectors: Vectors) -> Vectors:
    """Set all singular values to 1."""
    svds = [torch.linalg.svd(d, full_matrices=False) if d.ndim > 1 else None for d in vectors]
    return [svd.U @ svd.Vh if svd else d for svd, d in zip(svds, vectors, strict=True)]


def _all_magnitudes(vectors: Vectors) -> Vectors:
    return [(d * 2.0 ** torch.linspace(-126, 100, d.numel()).reshape(d.shape)).bfloat16().float() for d in vectors]


HARD: Mapping[str, Callable[[Vectors], Vectors]] = {
    "zeros": lambda v: [torch.zeros_like(d) for d in v],
    "zeros in the middle": lambda v: [v[0], torch.zeros_like(v[0]), *v[2:]],
    "zeros at first": lambda v: [torch.zeros_like(v[0]), *v[1:]],
    "identical experts": lambda v: [v[0] for _ in v],
    "experts that cancel": lambda v: [d if i % 2 else -d for i, d in enumerate([v[0]] * len(v))],
    "rank 1": _rank_one,
    "the same rank 1": lambda v: _rank_one([v[0]] * len(v)),
    "float16's largest values": lambda v: [d.half().float() for d in _largest(v, 65504.0)],
    "float16's smallest values": lambda v: [d.half().float() for d in _largest(v, 2.0**-16)],
    "bfloat16's large values": lambda v: [d.bfloat16().float() for d in _largest(v, 2.0**120)],
    "bfloat16's smallest values": lambda v: [d.bfloat16().float() for d in _largest(v, 2.0**-128)],
    "equal singular values": _orthonormal,
    "all magnitudes": _all_magnitudes,
}
"""Name -> what becomes of task vectors of noise."""
TURNING = ("equal singular values", "all magnitudes")
"""Matrices whose singular vectors, or numerical rank, the last digit decides."""


ENDS_OF_FLOATS = ("bfloat16's large values", "bfloat16's smallest values", "all magnitudes")
"""Values whose powers float32 cannot hold."""


def hard_for(rule: MergeRule) -> Mapping[str, Callable[[Vectors], Vectors]]:
    """Return the part of HARD for a rule, by its degree."""
    return {what: hard for what, hard in HARD.items() if rule.degree == 1 or what not in ENDS_OF_FLOATS}


@on_each_weight
def stays_finite_on_hard_weights(case: Case) -> None:
    """Check zeros, low rank, equal singular values, ends of 16-bit floats."""
    for what, hard in hard_for(case.rule).items():
        vectors = hard(draw(case.shape, 3))
        found, again = (change(case.rule, vectors, is_matrix=case.is_matrix) for _ in range(2))
        require(bool(found.isfinite().all()), case, f"values that are not finite from {what}")
        require_equal(found, again, case, f"another result when {what} are merged again")


@on_each_weight
def agrees_with_float64(case: Case) -> None:
    """Check float32 against float64, unless the rule says `ill_posed`."""
    for what, hard in hard_for(case.rule).items() if not case.rule.ill_posed else ():
        if case.is_matrix and what in TURNING:
            continue
        vectors = hard(draw(case.shape, 3))
        found = change(case.rule, vectors, is_matrix=case.is_matrix)
        wanted = change(case.rule, [d.double() for d in vectors], is_matrix=case.is_matrix)
        said = f"float32 is not float64 rounded, for {what}; is it `ill_posed`?"
        require_equal(found.double(), wanted, case, said, atol=tolerance(wanted, vectors, case.rule))


def tolerance(wanted: Tensor, vectors: Sequence[Tensor], rule: MergeRule) -> float:
    """Return the allowed distance, ten times as large for powers."""
    return (CLOSE if rule.degree == 1 else 10 * CLOSE) * max(
        float(t.abs().max()) for t in (wanted, *vectors)
    ) + _SUBNORMAL


_ENDS: Mapping[type, tuple[float, ...]] = {
    float: (0.0, 1.0, -1.0, 1e-30, 1 - 2.0**-53, 1 + 2.0**-52, 3.4e38, -3.4e38),
    int: (0, 1, -1, 2**31, 2**63, -(2**63) - 1),
}


def takes_the_ends_of_its_parameters(rule: MergeRule) -> None:
    """Check each parameter's ends: a ValueError, or finite values."""
    for ended, value in _at_ends(rule):
        for shape, is_matrix in itertools.product(((), (7,), (5, 7)), (False, True)):
            if is_matrix and len(shape) < 2:
                continue
            found = change(ended, draw(shape, 3), is_matrix=is_matrix)
            finite = bool(found.isfinite().all()) or (abs(value) > 2 and isinstance(value, float))
            require(finite, ended, f"values that are not finite from weights of shape {shape}")


def _at_ends(rule: MergeRule) -> Iterator[tuple[MergeRule, float]]:
    """Yield the rule with one parameter at an end, and its value."""
    cls = type(rule)
    for word, (kind, _) in parameter_types(cls).items():
        for value in _ENDS.get(kind, ()):
            try:
                ended = rule_of(cls, cls.__name__, {**rule.parameters(), word: value})
            except ValueError:
                continue
            yield ended, value


def computes_alike_with_any_threads(rule: MergeRule) -> None:
    """Check bits at equal threads, and the distance otherwise."""
    vectors, results = draw(_LARGE_MATRIX, 3), []
    for count in (1, 2):
        with threads(count):
            found, again = (change(rule, vectors) for _ in range(2))
        require_equal(found, again, rule, f"another result with the same number of threads, {count}")
        results.append(found)
    one, two = results
    if not rule.ill_posed:
        require_equal(
            two, one, rule, "two threads are further from one than rounding", atol=tolerance(one, vectors, rule)
        )


CHECKS: tuple[Check, ...] = (
    stays_finite_on_hard_weights,
    agrees_with_float64,
    takes_the_ends_of_its_parameters,
    computes_alike_with_any_threads,
)
