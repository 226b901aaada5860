"""Weights of experts and factors by layer: in states, exports, lineages, adapters and mergekit recipes."""

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import PerInputValues, TensorGroup
from mergekit.options import MergeOptions
from toys.loras import lora
from toys.models import perturbed, toy_llama

from hf_contmerge.commands.main import main
from hf_contmerge.errors import RecipeError
from hf_contmerge.loop.proof import find_model, prove
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.adapter import export_adapter
from hf_contmerge.merging.in_mergekit.plugin import MergekitRecipeError, RuleMethod
from hf_contmerge.merging.in_mergekit.recipe import read_mergekit_recipe
from hf_contmerge.merging.in_mergekit.replay import carry_out, mergekit_yaml
from hf_contmerge.merging.merge import FoldedExpert
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.config import outer_depth
from hf_contmerge.models.weights import Weights, weights_sha256

OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("coefficients")
    base = toy_llama(home / "base", seed=0, layers=3)
    return [base, *(perturbed(base, home / f"expert{i}", seed=i, size=0.05) for i in (1, 2, 3))]


def changes(model: Path, base: Path) -> dict[str, torch.Tensor]:
    one, other = Weights(model), Weights(base)
    return {name: one.tensor(name).double() - other.tensor(name).double() for name in other.names}


def state(models: list[Path], folder: Path, rule: str, weights: list[float], **parameters: float) -> MergeState:
    base, *experts = models
    return MergeState.create(folder, base=base, rule=rule, **parameters).add(*experts, weights=weights)


def test_weights_scale_the_experts_and_survive_drop_export_and_proof(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    grown = state(models, tmp_path / "grown", "task_arithmetic", [1.0, 0.5, -2.0], **{"lambda": 1.0})
    found = changes(grown.export(tmp_path / "out"), base)
    alone = [changes(expert, base) for expert in experts]
    for name, change in found.items():
        wanted = alone[0][name] + 0.5 * alone[1][name] - 2 * alone[2][name]
        torch.testing.assert_close(change, wanted, rtol=0, atol=1e-6)
    assert [e.weight for e in grown.log().experts] == [1.0, 0.5, -2.0]
    assert "the same weights" in list(prove(find_model(str(tmp_path / "out")), {}))[-1]
    one_by_one = MergeState.create(tmp_path / "again", base=base, rule="task_arithmetic", **{"lambda": 1.0})
    one_by_one.add(experts[0]).add(experts[2], weights=[-2.0])
    dropped = grown.drop("expert2")
    assert weights_sha256(dropped.require_running()) == weights_sha256(one_by_one.require_running())


def test_a_state_without_weights_is_recorded_as_before(models: list[Path], tmp_path: Path) -> None:
    state(models, tmp_path / "plain", "average", [])
    text = (tmp_path / "plain/state.json").read_text()
    assert 'weight"' not in text
    assert "layer" not in text.split('"parameters"')[1].split("}")[0]


def test_weights_of_a_rule_that_is_not_linear_are_refused(models: list[Path], tmp_path: Path) -> None:
    base, first, *_ = models
    empty = MergeState.create(tmp_path / "s", base=base, rule="opcm")
    with pytest.raises(RecipeError, match=r"opcm cannot give experts weights \(0.5\): it is not linear .* average, "):
        empty.add(first, weights=[0.5])
    for weights in ([0.5, 0.5], [float("nan")]):
        with pytest.raises(RecipeError, match=r"one weight per expert|must be a finite number"):
            MergeState.create(tmp_path / "a", base=base, rule="average").add(first, weights=weights)
    assert main(["merge", "add", str(tmp_path / "s"), str(first), "--weight", "2"]) == 2
    assert not empty.log().experts


def test_layers_scale_the_change_by_depth(models: list[Path], tmp_path: Path) -> None:
    base = models[0]
    layers = {"first_layer": 0.2, "last_layer": 1.0}
    found = changes(state(models, tmp_path / "s", "magmax", [], **layers).export(tmp_path / "out"), base)
    plain = changes(state(models, tmp_path / "p", "magmax", []).export(tmp_path / "plain"), base)
    for name, change in found.items():
        depth = Weights(base).depths.get(name)
        factor = {0.0: 0.2, 0.5: 0.6, 1.0: 1.0}[outer_depth(name) if depth is None else depth]
        torch.testing.assert_close(change, factor * plain[name], rtol=0, atol=1e-6)
    assert "the same weights" in list(prove(find_model(str(tmp_path / "out")), {}))[-1]


@pytest.mark.parametrize(
    ("name", "depth"),
    [("model.embed_tokens.weight", 0), ("transformer.wte.weight", 0), ("shared.weight", 0), ("lm_head.weight", 1),
     ("model.norm.weight", 1), ("gpt_neox.embed_in.weight", 0), ("embed_out.weight", 1), ("ln_f.bias", 1)],
)  # fmt: skip
def test_weights_outside_the_layers_have_a_side(name: str, depth: float) -> None:
    assert outer_depth(name) == depth


def test_an_adapter_carries_weights_and_layers(tmp_path: Path, models: list[Path]) -> None:
    base = models[0]
    adapters = [lora(base, tmp_path / f"lora{i}", seed=i, r=1, target_modules=["q_proj"]) for i in (1, 2)]
    grown = MergeState.create(tmp_path / "s", base=base, rule="average", first_layer=0.25)
    grown.add(*adapters, weights=[3.0, 0.5])
    export_adapter(grown, tmp_path / "adapter")
    again = MergeState.create(tmp_path / "one", base=base, rule="average").add(tmp_path / "adapter")
    one, other = (changes(s.export(tmp_path / f"out{i}"), base) for i, s in enumerate((grown, again)))
    for name, change in one.items():
        torch.testing.assert_close(other[name], change, rtol=0, atol=1e-6)


CASES = [
    ("average", {}, [1.0, 0.5, 2.0], {}),
    ("magmax", {"first_layer": 0.3}, [1.0] * 3, {}),
    ("opcm", {"first_layer": 0.3, "last_layer": 0.9}, [1.0] * 3, {}),
    ("blend", {"last_layer": 0.5}, [1.0, 0.5, 2.0], {"keep": 0.5, "take": 0.75}),
]


@pytest.mark.parametrize(("rule", "parameters", "weights", "chosen"), CASES, ids=lambda x: str(x))
def test_a_recipe_for_mergekit_gives_the_same_bytes(
    rule: str, parameters: dict[str, float], weights: list[float], chosen: dict[str, float],
    models: list[Path], tmp_path: Path,
) -> None:  # fmt: skip
    base, *experts = models
    folded = [FoldedExpert("", e, weight=w) for e, w in zip(experts, weights, strict=True)]
    folded[1:2] = [FoldedExpert("", experts[1], weight=weights[1], chosen=chosen)]
    text = mergekit_yaml(rule, get_rule(rule, **parameters), base=base, experts=folded, dtype=torch.float32)
    (tmp_path / "recipe.yml").write_text(text)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), OPTIONS)
    ours = carry_out(read_mergekit_recipe(tmp_path / "recipe.yml"), tmp_path / "ours")
    assert weights_sha256(tmp_path / "ours") == weights_sha256(tmp_path / "theirs")
    assert [e.weight for e in ours.experts] == weights
    if chosen:
        step = MergeState.create(tmp_path / "s", base=base, rule=rule, **parameters)
        assert step.rule() == get_rule(rule, **parameters)


@pytest.mark.parametrize(
    ("method", "top", "of_one", "said"),
    [("magmax", {}, {"weight": 0.5}, "Unknown parameter 'weight'|is a parameter of one model"),
     ("average", {}, {"weight": "much"}, "weight must be"),
     ("blend", {}, {"keep": "all"}, "keep must be"),
     ("average", {"first_layer": "deep"}, {}, "first_layer must be")],
)  # fmt: skip
def test_bad_coefficients_are_refused_by_both_engines(
    method: str, top: dict[str, object], of_one: dict[str, object], said: str, models: list[Path], tmp_path: Path
) -> None:
    listed = [{"model": str(e)} for e in models[1:]]
    listed[0]["parameters"] = of_one  # pyright: ignore[reportArgumentType]
    recipe = {"merge_method": method, "base_model": str(models[0]), "models": listed, "parameters": top}
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=said):
        read_mergekit_recipe(tmp_path / "bad.yml")
    with pytest.raises(MergekitRecipeError, match=said):
        run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "out"), OPTIONS)


def test_layers_with_mergekits_own_method_are_refused_there_alone(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    rule = get_rule("task_arithmetic", first_layer=0.5)
    text = mergekit_yaml("task_arithmetic", rule, base=base, experts=experts, dtype=torch.float32)
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(MergekitRecipeError, match="mergekit's own and has no parameter first_layer"):
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), OPTIONS)
    carry_out(read_mergekit_recipe(tmp_path / "recipe.yml"), tmp_path / "ours")


def test_mergekits_own_task_arithmetic_takes_the_weights_of_a_run(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    folded = [FoldedExpert("", e, weight=w) for e, w in zip(experts, (1.0, 0.5, 2.0), strict=True)]
    text = mergekit_yaml("task_arithmetic", get_rule("task_arithmetic"), base=base, experts=folded, dtype=torch.float32)
    (tmp_path / "recipe.yml").write_text(text)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), OPTIONS)
    carry_out(read_mergekit_recipe(tmp_path / "recipe.yml"), tmp_path / "ours")
    one, other = changes(tmp_path / "theirs", base), changes(tmp_path / "ours", base)
    for name, change in one.items():
        torch.testing.assert_close(change, other[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_expert_of_weight_0_changes_nothing(kind: str, models: list[Path], tmp_path: Path) -> None:
    base, first, *_ = models
    expert = first if kind == "model" else lora(base, tmp_path / "lora", seed=1, r=1, target_modules=["q_proj"])
    state = MergeState.create(tmp_path / "s", base=base, rule="task_arithmetic").add(expert, weights=[0.0])
    assert weights_sha256(state.export(tmp_path / "out")) == weights_sha256(base)


def test_tensors_of_an_unknown_layer_have_no_factor_by_layer() -> None:
    group = TensorGroup.from_tensors([torch.zeros(2), torch.ones(2)], base_index=0, name="model.layers.1.norm.weight")
    method = registry.get("average")
    assert isinstance(method, RuleMethod)
    weight = PerInputValues([(1, 1.0)])
    assert method.merge_group(group, scale="tensor", weight=weight).tolist() == [1.0, 1.0]
    with pytest.raises(MergekitRecipeError, match=r"the depth of model\.layers\.1\.norm\.weight is not known"):
        method.merge_group(group, scale="tensor", weight=weight, first_layer=0.5)
