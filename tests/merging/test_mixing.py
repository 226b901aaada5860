"""Merges in memory: other weights of a linear rule without its experts, in a loaded model."""

from pathlib import Path

import pytest
import torch
from toys.loras import lora
from toys.models import perturbed, toy_llama, toy_mixture
from transformers import AutoModelForCausalLM

from hf_contmerge.errors import RecipeError
from hf_contmerge.merge_rules import get_rule, rule_class, rule_names
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge
from hf_contmerge.merging.mixing import MergedWeights, separated
from hf_contmerge.models.filling import whole_tensors
from hf_contmerge.models.loading import load_model
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew

WEIGHTS = (0.25, 0.0, -1.5)
LINEAR = [name for name in rule_names() if rule_class(name).linear and not rule_class(name).needs]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("mixing")
    base = toy_llama(home / "base", seed=0)
    whole = [perturbed(base, home / f"e{i}", seed=i, size=0.05) for i in (1, 2)]
    return [base, *whole, lora(base, home / "lora", seed=3, target_modules=["q_proj", "down_proj"])]


def folded(experts: list[Path], weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> list[FoldedExpert]:
    return [FoldedExpert(f"s{i}", e, weight=w) for i, (e, w) in enumerate(zip(experts, weights, strict=True))]


SOME = ("average", "dare")
CASES = [
    pytest.param(name, adapters, marks=() if name in SOME and not adapters else pytest.mark.slow)
    for name in LINEAR
    for adapters in (False, True)
]


@pytest.mark.parametrize(("name", "adapters"), CASES)
def test_other_weights_are_what_the_rule_folds_with_them(
    name: str, adapters: bool, models: list[Path], tmp_path: Path
) -> None:
    base, *experts = models
    if adapters:
        experts = [lora(base, tmp_path / f"l{i}", seed=i, target_modules=["q_proj", "up_proj"]) for i in range(3)]
    merge = RunningMerge(base, name, get_rule(name, first_layer=0.5))
    (tmp_path / "parts").mkdir()
    mixed = separated(merge, folded(experts), tmp_path / "parts", Crew())
    truth = MergedWeights.of(merge.fold(folded(experts, WEIGHTS), tmp_path / "running"))
    for weight in Weights(base).floating():
        found = mixed.model.at(WEIGHTS).tensor(weight)
        torch.testing.assert_close(found, truth.tensor(weight), rtol=1e-5, atol=1e-6)


def test_the_rules_own_coefficients_are_known(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    mixed = separated(RunningMerge(base, "average", get_rule("average")), folded(experts), tmp_path, Crew())
    assert mixed.shares == pytest.approx((1 / 3,) * 3)


@pytest.mark.parametrize(
    ("rule", "fields", "shares"),
    [
        ("dare", {}, (0.4,) * 3),  # a tenth of the elements, each ten times as large, times 0.4
        ("blend", {"keep": 0.5, "take": 0.5}, (0.125, 0.25, 0.5)),
        ("blend", {"keep": 0.0, "take": 0.5}, (0.0, 0.0, 0.5)),
    ],
)
def test_coefficients_are_mean_factors(
    rule: str, fields: dict[str, float], shares: tuple[float, ...], models: list[Path], tmp_path: Path
) -> None:
    base, *experts = models
    mixed = separated(RunningMerge(base, rule, get_rule(rule, **fields)), folded(experts), tmp_path, Crew())
    assert mixed.shares == pytest.approx(shares, rel=0.15 if rule == "dare" else 1e-4)


def test_a_rule_that_is_not_linear_is_refused(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    with pytest.raises(RecipeError, match="magmax cannot give experts weights"):
        separated(RunningMerge(base, "magmax", get_rule("magmax")), folded(experts), tmp_path, Crew())


@pytest.mark.parametrize("kind", ["tied", "untied", "mixture", "bfloat16"])
def test_a_filled_model_is_the_loaded_one(kind: str, tmp_path: Path) -> None:
    if kind == "mixture":  # stored one by one, held as stacks
        base = toy_mixture(tmp_path / "base", seed=0)
    else:
        base = toy_llama(tmp_path / "base", seed=0, tied=kind != "untied")
    other, dtype = perturbed(base, tmp_path / "other", seed=1, size=0.05), torch.float32
    if kind == "bfloat16":  # float32 files, rounded at loading as a merge in 16 bits
        dtype = torch.bfloat16
    model, wanted = (load_model(folder, base, dtype=dtype) for folder in (base, other))
    stored = Weights(other)
    for each in whole_tensors(model, Weights(base)):
        each.fill(lambda name: stored.tensor(name).float(), set(stored.floating()))
    for (name, tensor), there in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(tensor, there), name
    assert not torch.equal(
        next(model.parameters()), next(AutoModelForCausalLM.from_pretrained(base, dtype=dtype).parameters())
    )
