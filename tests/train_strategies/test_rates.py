"""Learning rates by weight: patterns, a slow backbone, LoRA+."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.models import toy_llama
from toys.trainings import Row, Training, texts
from transformers import AutoModelForCausalLM

from hf_contmerge.train_strategies import combine, get_strategy
from hf_contmerge.train_strategies.lora import Lora
from hf_contmerge.training.data import StageData


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    return texts(tmp_path_factory.mktemp("rated") / "x.jsonl")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_llama(tmp_path_factory.mktemp("untied") / "base", seed=0, tied=False)


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def opened_rates(folder: Path, parameters: Row, *others: str) -> dict[str, float]:
    """Return weight -> factor, of those that are trained."""
    strategies = combine([*others, "rates"], {"rates": parameters})
    opened = strategies.open(model_of(folder), None)
    found = strategies.rates(opened)
    return {name: found[weight] for name, weight in opened.named_parameters() if weight in found}


def test_first_pattern_decides(untied: Path) -> None:
    found = opened_rates(untied, {"factors": {r"layers\.0\.": 0.5, "layers": 0.1, "norm": 3.0}})
    assert found["model.layers.0.input_layernorm.weight"] == 0.5
    assert found["model.layers.1.input_layernorm.weight"] == 0.1
    assert found["model.norm.weight"] == 3.0
    assert found["lm_head.weight"] == 1.0


def test_slow_is_all_but_the_head(untied: Path) -> None:
    found = opened_rates(untied, {"slow": 0.01})
    assert {name for name, factor in found.items() if factor == 1.0} == {"lm_head.weight"}
    assert {*found.values()} == {0.01, 1.0}
    assert opened_rates(untied, {"slow": 0.01, "factors": {"embed": 0.5}})["model.embed_tokens.weight"] == 0.5


def test_lora_plus(untied: Path) -> None:
    found = opened_rates(untied, {"factors": {"lora_B": 16}}, "lora")
    assert {factor for name, factor in found.items() if "lora_B" in name} == {16.0}
    assert {factor for name, factor in found.items() if "lora_A" in name} == {1.0}


def test_factor_zero_freezes(untied: Path) -> None:
    found = opened_rates(untied, {"factors": {"embed|head": 0}})
    assert not any("embed" in name or "head" in name for name in found)


def test_one_step_moves_each_weight_by_its_factor(untied: Path, data: StageData, tmp_path: Path) -> None:
    """Of plain gradient descent, the factor times plain training's step; a frozen weight keeps its bytes."""
    train, factors = Training(tmp_path, untied, data), {"self_attn": 0.1, "embed": 0.0}
    train("plain", {}, max_steps=1)
    train("rated", {"rates": get_strategy("rates", factors=factors)}, max_steps=1)
    start, plain, rated = load_file(untied / "model.safetensors"), train.weights("plain"), train.weights("rated")
    for name, weight in start.items():
        factor = next((f for pattern, f in factors.items() if pattern in name), 1.0)
        torch.testing.assert_close(rated[name] - weight, factor * (plain[name] - weight), rtol=1e-2, atol=1e-7)
    assert torch.equal(rated["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "rates needs `factors` "),
        ({"factors": {}}, "rates needs `factors` "),
        ({"factors": {"(": 1.0}}, "'(' is an invalid pattern: missing )"),
        ({"factors": {"(a+)+b": 1.0}}, "'(a+)+b' could take exponential time to match."),
        ({"factors": {"a": -1.0}}, "rates's factors must be greater than or equal to 0"),
        ({"factors": {"a": "fast"}}, "rates's factors must be a valid number"),
        ({"slow": float("nan")}, "rates's slow must be a finite number"),
    ],
)
def test_parameters_that_cannot_be(parameters: Row, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        get_strategy("rates", **parameters)


def test_patterns_of_no_weight(untied: Path) -> None:
    with pytest.raises(ValueError, match=r"^rates' pattern 'lora_B' is in no trained weight's name; the names"):
        opened_rates(untied, {"factors": {"layers": 1, "lora_B": 16}})


def test_slow_needs_a_head_of_its_own(untied: Path, base_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"this model's head is its token embedding \(tie_word_embeddings\). Use "):
        opened_rates(base_folder, {"slow": 0.1})
    with pytest.raises(ValueError, match="and the head is not trained here"):
        opened_rates(untied, {"slow": 0.1}, "lora")
    rates = get_strategy("rates", slow=0.1)
    with_head = Lora(r=2, modules_to_save=["lm_head"]).open(model_of(untied), None)
    rates.open(with_head, None)
    assert [name for name, _ in with_head.named_parameters() if rates.rate(name) == 1.0 and "modules" in name]
