"""Every rule against its method in float64, on drawn weights, experts and parameters; and on another processor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import ROOT
from toys.oracles import ORACLES

from hf_contmerge.merge_rules import MergeRule, get_rule, own_fields, rule_class, rule_names
from hf_contmerge.testing.extremes import CLOSE, HARD, TURNING, tolerance
from hf_contmerge.testing.folding import change, draw
from hf_contmerge.testing.rules import variants

HARDER = {"noise": lambda vectors: vectors, **HARD}
RANGES = {
    "alpha": st.floats(0, 1.5),
    "beta": st.floats(0, 1),
    "density": st.floats(1e-6, 1),
    "keep": st.floats(0, 1),
    "lambda": st.floats(-2, 2),
    "p": st.floats(0, 0.99),
    "rank": st.integers(0, 12),
    "seed": st.integers(-(2**63), 2**63),
    "sparsity": st.floats(1e-6, 1),
    "take": st.floats(-2, 2),
    "variant": st.sampled_from(["block", "fusionbench", "paper"]),
}
"""Parameter -> values, both ends included. Others keep their defaults."""


def _drawn(name: str) -> list[str]:
    """Return the parameters to draw; without statistics, curvature's oracle is the plain mean."""
    return [word for word in get_rule(name).parameters() if word in RANGES and name != "curvature"]


@st.composite
def rules(draw: st.DrawFn, name: str) -> MergeRule:
    return get_rule(name, **{word: draw(RANGES[word]) for word in _drawn(name)})


shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


def is_open(rule: MergeRule, what: str, vectors: list[Tensor], is_matrix: bool) -> bool:
    """Say if the method leaves the result open: equal magnitudes to trim, turning singular vectors."""
    if is_matrix and rule.degree > 1:  # the oracle divides by what may be 0
        return what != "noise"
    if is_matrix and rule.unit == "matrix":
        return what in TURNING and (what, type(rule).__name__) != ("equal singular values", "IsoC")
    sizes = [d.abs()[d != 0] for d in vectors]
    return type(rule).__name__ in ("Ties", "Stitch") and any(len(s.unique()) < len(s) for s in sizes)


@pytest.mark.parametrize("name", rule_names())
def test_any_weight_is_merged_as_in_float64(name: str) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(rules(name), shapes, st.booleans(), st.integers(1, 5), st.sampled_from(sorted(HARDER)), st.integers(0, 9))
    def check(rule: MergeRule, shape: tuple[int, ...], linear: bool, count: int, what: str, seed: int) -> None:
        is_matrix = linear and len(shape) > 1
        vectors = HARDER[what](draw(shape, count, seed=seed))
        assume(not is_open(rule, what, vectors, is_matrix))
        exact = [d.double() for d in vectors]
        fields = {f.name: getattr(rule, f.name) for f in own_fields(type(rule))}
        wanted = ORACLES[name].of(exact, is_matrix=is_matrix, **fields)
        found = change(rule, exact if rule.ill_posed else vectors, is_matrix=is_matrix)  # as states are kept
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance(wanted, vectors, rule))

    check()


RULES = [rule for name in rule_names() for rule in variants(rule_class(name), {})]
OTHER = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
"""A processor without AVX, to PyTorch."""


def merged_by_all(vectors: list[Tensor]) -> list[Tensor]:
    """Merge by each rule, in the dtypes of states."""
    return [change(rule, [d.double() if rule.ill_posed else d for d in vectors]) for rule in RULES]


def test_another_processor_merges_alike(tmp_path: Path) -> None:
    vectors, file = draw((96, 160), 4), tmp_path / "tensors.pt"
    script = (
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('extremes', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"torch.save(module.merged_by_all(torch.load({str(file)!r})), {str(file)!r})\n"
    )
    torch.save(vectors, file)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, **OTHER, "PYTHONPATH": paths})
    theirs, ours = torch.load(file), merged_by_all(vectors)
    apart = {str(r): float((a - b).norm() / b.norm()) for r, a, b in zip(RULES, theirs, ours, strict=True)}
    print(apart)
    assert any(apart.values()), "the other processor computes the same bits: nothing was tested"
    assert {r: d for r, d in apart.items() if d > CLOSE} == {}
