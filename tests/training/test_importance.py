"""Fisher information and Adam's second moments of experts: by hand, and in the rules that read them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from toys.models import perturbed, toy_llama, toy_mixture, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.in_mergekit.plugin import MergekitRecipeError
from hf_contmerge.merging.in_mergekit.recipe import read_mergekit_recipe
from hf_contmerge.merging.in_mergekit.replay import carry_out, mergekit_yaml
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.statistics import Statistics
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.statistics import check_asked

ROWS = [{"text": f"the quick brown fox {i} sings songs of law" + " and medicine" * (i % 3)} for i in range(6)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("importance")
    toy_llama(home / "base", seed=0)
    data = write_jsonl(home / "texts.jsonl", ROWS)
    for i in (1, 2):
        expert = perturbed(home / "base", home / f"expert{i}", seed=i, size=0.05)
        for kind in ("inputs", "fisher"):
            words = ["statistics", str(expert), "--data", str(data), "--base", str(home / "base"), "--cpu"]
            assert main([*words, "--kind", kind]) == 0
    perturbed(home / "base", home / "bare", seed=3, size=0.05)
    return home


def test_fisher_against_a_sum_by_hand(home: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "expert1")
    tokenizer, tokens = AutoTokenizer.from_pretrained(home / "base"), 0
    sums = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for row in ROWS:
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        model.zero_grad()
        log_probs.gather(1, ids[0, 1:, None]).sum().backward()
        tokens += ids.shape[1] - 1
        for name, weight in model.named_parameters():
            sums[name] += weight.grad**2
    found = Statistics(home / "expert1")
    assert found.kinds == ("fisher", "inputs")
    for name in Weights(home / "base").names:
        fisher = found.of(name, ["fisher"], CPU)["fisher"]
        torch.testing.assert_close(fisher, sums[name] / tokens, rtol=1e-3, atol=1e-8)


def test_fisher_of_a_mixture_is_that_of_its_likelihood_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For every stored weight, experts that are stacked in memory too, though the config adds the router's loss."""
    base = toy_mixture(tmp_path / "base", seed=0)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**settings, "output_router_logits": True, "router_aux_loss_coef": 1.0})
    )
    expert = perturbed(base, tmp_path / "expert", seed=1, size=0.05)
    data = write_jsonl(tmp_path / "texts.jsonl", ROWS)
    assert main(["statistics", str(expert), "--data", str(data), "--base", str(base), "--cpu", "--kind", "fisher"]) == 0
    assert "get no statistics" not in caplog.text
    model, tokenizer = AutoModelForCausalLM.from_pretrained(expert), AutoTokenizer.from_pretrained(base)
    sums, tokens = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}, 0
    for row in ROWS:
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        model.zero_grad()
        model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().backward()
        tokens += ids.shape[1] - 1
        for name, weight in model.named_parameters():
            sums[name] += weight.grad**2
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(sums[name] / tokens)
    model.save_pretrained(tmp_path / "wanted")  # which takes the stacks apart
    wanted, found = load_file(tmp_path / "wanted" / "model.safetensors"), Statistics(expert)
    assert set(wanted) == set(Weights(base).floating())
    for name, tensor in wanted.items():
        torch.testing.assert_close(found.of(name, ["fisher"], CPU)["fisher"], tensor, rtol=1e-3, atol=1e-8)


def test_fisher_needs_a_token_to_predict(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zeros for all weights would say that none matters, and a merge by them is the base."""
    expert = perturbed(home / "base", tmp_path / "expert", seed=1, size=0.05)
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": "a"}])
    words = ["statistics", str(expert), "--data", str(data), "--base", str(home / "base"), "--cpu", "--kind", "fisher"]
    assert main(words) == 2
    assert "None of the 1 examples has two tokens within max_length (2048)" in capsys.readouterr().err
    assert not (expert / "statistics").exists()


RULES: list[tuple[str, dict[str, Any]]] = [
    ("covariance", {}), ("covariance", {"space": "inputs"}), ("covariance", {"form": "diagonal", "space": "inputs"}),
    ("curvature", {}), ("curvature", {"power": 1.0, "density": 0.5}), ("input_space", {"rank": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), RULES, ids=str)
def test_mergekit_and_a_growing_state_give_the_same_bytes(
    name: str, parameters: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    base, experts = home / "base", [home / "expert1", home / "expert2"]
    grown = MergeState.create(tmp_path / "s", base=base, rule=name, **parameters).add(experts[0]).add(experts[1])
    out = grown.export(tmp_path / "out")
    text = mergekit_yaml(name, get_rule(name, **parameters), base=base, experts=experts, dtype=torch.float32)
    (tmp_path / "recipe.yml").write_text(text)
    carry_out(read_mergekit_recipe(tmp_path / "recipe.yml"), tmp_path / "once")
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), options)
    assert weights_sha256(tmp_path / "once") == weights_sha256(tmp_path / "theirs") == weights_sha256(out)


@pytest.mark.parametrize(
    ("name", "parameters", "cure"),
    [("covariance", {"space": "inputs"}, "contmerge statistics .*bare --data FILE`"), ("input_space", {}, "FILE`"),
     ("curvature", {}, "--data FILE --kind fisher`"), ("curvature", {"importance": "adam"}, r"`statistics: \[adam\]`")],
)  # fmt: skip
def test_missing_statistics_are_refused_with_the_command_that_makes_them(
    name: str, parameters: dict[str, Any], cure: str, home: Path, tmp_path: Path
) -> None:
    state = MergeState.create(tmp_path / "s", base=home / "base", rule=name, **parameters)
    with pytest.raises(ModelError, match=f"bare lacks the statistics .*{cure}"):
        state.add(home / "bare")
    recipe = {"merge_method": name, "base_model": str(home / "base"), "parameters": parameters}
    config = MergeConfiguration.model_validate({**recipe, "models": [{"model": str(home / "bare")}]})
    with pytest.raises(MergekitRecipeError, match=cure):
        run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True, copy_tokenizer=False))
    MergeState.create(tmp_path / "plain", base=home / "base", rule="covariance").add(home / "bare")


@pytest.mark.parametrize("kind", ["llama", "mixture"])
def test_training_writes_adams_moments(kind: str, home: Path, tmp_path: Path) -> None:
    start = home / "base" if kind == "llama" else toy_mixture(tmp_path / "mixture", seed=0)
    data = load_stage_data(Dataset(path=str(home / "texts.jsonl"), heldout=0), seed=0)
    fields = {"max_steps": 2, "per_device_train_batch_size": 1, "max_length": 32, "statistics": ["adam"]}
    train, out = Train.model_validate(fields), tmp_path / "expert"
    out.mkdir()
    job = TrainJob(start=start, base=start, data=data, train=train, seed=0)
    train_expert(job, out, checkpoints=tmp_path / "checkpoints")
    found, base = Statistics(out), Weights(start)
    assert found.kinds == ("adam",)
    for name in base.floating():
        v = found.of(name, ["adam"], CPU)["adam"]
        assert tuple(v.shape) == base.shape(name)
        assert (v >= 0).all()
        assert v.any()
    MergeState.create(tmp_path / "s", base=start, rule="curvature", importance="adam").add(out)


@pytest.mark.parametrize("strategy", ["lora", "osf"])
def test_adams_moments_of_other_tensors_are_refused_early(strategy: str) -> None:
    train = Train.model_validate({"strategy": strategy, "statistics": ["adam"]})
    with pytest.raises(RecipeError, match=f"`adam` needs an optimizer of whole weights, and the strategy {strategy}"):
        check_asked({}, train)
    with pytest.raises(RecipeError, match="needs the statistics 'fisher' of each expert"):
        check_asked({"merge entry c": get_rule("curvature")}, train)
