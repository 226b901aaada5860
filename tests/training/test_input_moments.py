"""Second moments of all linear maps' inputs: against a forward pass by hand, by the command, on two ranks."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys.loras import loaded, lora
from toys.models import perturbed, toy_llama, toy_tokenizer, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_contmerge import merge_rules
from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError
from hf_contmerge.models.statistics import Statistics
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import StatisticsSettings
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.training.statistics import collect_inputs

BIN = Path(sys.executable).parent
CPU = torch.device("cpu")
IDS = [torch.tensor([[5, 9, 30, 31, 7], [8, 8, 40, 22, 6]]), torch.tensor([[60, 61, 62]])]
MAPS = {
    f"model.layers.{layer}.{name}_proj.weight"
    for layer in range(2)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}


def by_hand(model: Any, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return X'X / n of each linear map of a Llama, in float64, from a forward pass of our own."""
    sums: dict[str, Tensor] = {}
    for ids in batches:
        for name, x in inputs_by_hand(model.double(), ids):
            rows = x.reshape(-1, x.shape[-1])
            sums[name] = sums.get(name, 0) + rows.T @ rows
    tokens = sum(ids.numel() for ids in batches)
    return {name: total / tokens for name, total in sums.items()}


def inputs_by_hand(model: Any, ids: Tensor):
    config, body = model.config, model.model
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size, (rows, length) = config.hidden_size // heads, ids.shape
    h = body.embed_tokens(ids)
    turn = body.rotary_emb(h, torch.arange(length)[None])
    for number, layer in enumerate(body.layers):
        attention, mlp, at = layer.self_attn, layer.mlp, f"model.layers.{number}"
        x = layer.input_layernorm(h)
        yield from ((f"{at}.self_attn.{word}_proj.weight", x) for word in "qkv")
        q, k, v = (
            (x @ proj.weight.T).view(rows, length, -1, size).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *turn)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (q @ k.mT / size**0.5).masked_fill(later, float("-inf")).softmax(-1)
        x = (weights @ v).transpose(1, 2).reshape(rows, length, -1)
        yield f"{at}.self_attn.o_proj.weight", x
        h = h + x @ attention.o_proj.weight.T
        x = layer.post_attention_layernorm(h)
        yield from ((f"{at}.mlp.{word}_proj.weight", x) for word in ("gate", "up"))
        x = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        yield f"{at}.mlp.down_proj.weight", x
        h = h + x @ mlp.down_proj.weight.T


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def read(expert: Path) -> dict[str, Tensor]:
    """Return all `inputs` of an expert, as rules get them."""
    statistics = Statistics(expert)
    found = {name: statistics.of(name, ("inputs",), CPU) for name in MAPS}
    return {name: kinds["inputs"] for name, kinds in found.items() if kinds}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, moment in wanted.items():
        assert found[name].dtype == torch.float32
        scale = float(moment.detach().abs().max())
        torch.testing.assert_close(found[name].double(), moment.detach(), rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["the quick fox", "a court may refuse the claim", "the nurse gives two tablets", "sort a list of two"]
    rows = [{"text": f"{texts[i % 4]} {'again ' * (i % 3)}"} for i in range(10)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "law.jsonl", rows)


def tokens_of(data: Path, longest: int = 2048) -> list[Tensor]:
    """Return each document of a file by itself."""
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    return [torch.tensor([toy_tokenizer()(text)["input_ids"][:longest]]) for text in texts]


# The collector


def test_moments_are_those_of_a_forward_pass_by_hand(base_folder: Path) -> None:
    model = load(base_folder)
    found = collect_inputs(model, IDS, Weights(base_folder))
    assert found.tokens == 13
    assert found.moments.keys() == MAPS, "neither the tables, nor the head, nor norms"
    assert_equal(found.moments, by_hand(model, IDS))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wide_maps_keep_the_diagonal(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_rules, "INPUTS_LIMIT", 32)
    model = load(base_folder)
    moments = collect_inputs(model, IDS, Weights(base_folder)).moments
    assert {name for name, moment in moments.items() if moment.ndim == 1} == {n for n in MAPS if "down_proj" in n}
    wanted = by_hand(model, IDS)
    assert_equal(moments, {n: m.diagonal() if "down_proj" in n else m for n, m in wanted.items()})


def test_experts_of_a_mixture_that_are_one_stack_in_memory_get_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MixtralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        moments = collect_inputs(model, IDS, Weights(tmp_path)).moments
    assert set(moments) == {f"model.layers.0.self_attn.{word}_proj.weight" for word in "qkvo"}
    assert "more weights of" in caplog.text
    assert "get no statistics: in memory they belong to no torch.nn.Linear" in caplog.text


def test_a_map_that_is_used_without_its_module_gets_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mamba multiplies by the weight of dt_proj; a moment of 0 would say that no input matters there."""
    model = MambaForCausalLM(MambaConfig(vocab_size=384, hidden_size=32, state_size=4, num_hidden_layers=1))
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        moments = collect_inputs(model, IDS, Weights(tmp_path)).moments
    assert set(moments) == {f"backbone.layers.0.mixer.{word}_proj.weight" for word in ("in", "x", "out")}
    assert all(moment.any() for moment in moments.values())
    assert "dt_proj.weight and 0 more weights" in caplog.text
    assert "get no statistics: in memory they are used without a call of their torch.nn.Linear" in caplog.text


def test_a_model_without_linear_modules_is_refused(tmp_path: Path) -> None:
    """GPT-2's maps are stored the other way round, as Conv1D."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no linear map whose inputs can be watched.*Use a merge rule that needs"):
        collect_inputs(model, IDS, Weights(tmp_path))


def test_examples_end_with_the_table_of_positions(tmp_path: Path) -> None:
    """The tokenizer knows of none; a longer text had no position, and ended in an IndexError."""
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": f"{i} the quick brown fox " * 9} for i in range(4)])
    assert main(["statistics", str(tmp_path / "base"), "--data", str(path), "--kind", "fisher"]) == 0
    about = json.loads((tmp_path / "base/statistics/statistics.json").read_text())["kinds"]["fisher"]
    assert about["tokens"] == 4 * 15  # the first one is not predicted


# The command


@pytest.mark.parametrize("words", [[], ["--batch-size", "1"], ["--max-length", "4"]])
def test_the_command_writes_them_next_to_the_weights(
    words: list[str], base_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = perturbed(base_folder, tmp_path / "law", seed=3, size=0.05)
    before = {p.name for p in expert.iterdir()}
    assert main(["statistics", str(expert), "--data", str(data), *words]) == 0
    documents = tokens_of(data, longest=4 if "--max-length" in words else 2048)
    assert_equal(read(expert), by_hand(load(expert), documents))
    tokens = sum(ids.numel() for ids in documents)
    assert capsys.readouterr().out == f"{expert}/statistics: 14 linear maps, {tokens} tokens\n"
    assert {p.name for p in expert.iterdir()} == before | {"statistics"}
    record = json.loads((expert / "statistics/statistics.json").read_text())
    about = record["kinds"]["inputs"]
    assert (about["examples"], about["tokens"]) == (10, tokens)
    assert len(about["data_sha256"]) == len(record["expert_sha256"]) == 64
    stored = load_file(expert / "statistics/inputs.safetensors")
    assert {n.rsplit(".", 2)[-2] for n in stored} == {"q_proj", "o_proj", "gate_proj", "down_proj"}, "once each"


def test_some_examples_and_another_place(base_folder: Path, data: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "e/statistics")]
    assert main(["statistics", str(base_folder), "--data", str(data), "--examples", "3", *out]) == 0
    assert not (base_folder / "statistics").exists()
    record = json.loads((tmp_path / "e/statistics/statistics.json").read_text())
    assert record["kinds"]["inputs"]["examples"] == 3
    assert read(tmp_path / "e").keys() == MAPS


def test_an_adapter_is_measured_as_the_model_that_it_makes(base_folder: Path, data: Path, tmp_path: Path) -> None:
    """Under the base's names; the base is the one that the adapter names."""
    adapter = lora(base_folder, tmp_path / "adapter", seed=1, size=0.3)
    assert main(["statistics", str(adapter), "--data", str(data)]) == 0
    merged = loaded(base_folder, adapter).merge_and_unload()
    found = read(adapter)
    assert_equal(found, by_hand(merged, tokens_of(data)))
    assert main(["statistics", str(base_folder), "--data", str(data), "--out", str(tmp_path / "b/statistics")]) == 0
    name = "model.layers.1.mlp.down_proj.weight"
    assert float((read(tmp_path / "b")[name] - found[name]).norm()) > 0.01 * float(found[name].norm())


def test_conversations_are_read_in_the_chat_template(base_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what is two and two"}, {"role": "assistant", "content": "it is four"}]
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}])
    words = ["statistics", str(base_folder), "--data", str(chat), "--out", str(tmp_path / "e/statistics")]
    assert main(words) == 0
    ids = toy_tokenizer().apply_chat_template(turns, tokenize=True, return_dict=False, return_tensors="pt")
    assert_equal(read(tmp_path / "e"), by_hand(load(base_folder), [ids]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["owner/model", "--data", "law.jsonl"],
            "owner/model is not a local folder, so its statistics need a destination. Give --out",
        ),
        (["BASE", "--data", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["BASE", "--data", "DATA", "--examples", "0"], "--examples 0: expected 1 or more."),
        (["BASE", "--data", "DATA", "--batch-size", "-1"], "--batch-size -1: expected 1 or more."),
        (["BASE", "--data", "DATA", "--base", "OTHER"], "Both must have the same architecture"),
    ],
)
def test_what_the_command_refuses(
    words: list[str], said: str, base_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = toy_llama(tmp_path / "other", seed=1, layers=3) if "OTHER" in words else None
    places = {"BASE": str(base_folder), "DATA": str(data), "OTHER": str(other)}
    assert main(["statistics", *(places.get(word, word) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert not (base_folder / "statistics").exists()


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(base_folder: Path, data: Path, tmp_path: Path) -> None:
    """The sums of all examples; rounding differs, for they are added in another order."""
    alone, both = (perturbed(base_folder, tmp_path / name, seed=3, size=0.05) for name in ("alone", "both"))
    assert main(["statistics", str(alone), "--data", str(data)]) == 0
    words = ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "contmerge"]
    words += ["statistics", str(both), "--data", str(data), "--cpu"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14 linear maps") == 1
    assert_equal(read(both), {name: moment.double() for name, moment in read(alone).items()})
    records = [json.loads((e / "statistics/statistics.json").read_text()) for e in (alone, both)]
    of_the_bytes = {"files": {}, "sha256": ""}
    assert {**records[0], **of_the_bytes} == {**records[1], **of_the_bytes}


# The recipe's word


def test_how_recipes_ask_for_them() -> None:
    assert Train().statistics is None
    asked = Train.model_validate({"statistics": ["inputs"], "max_steps": 3})
    assert asked.statistics == StatisticsSettings()
    assert asked.sft_fields == {"max_steps": 3}
    few = Train.model_validate({"statistics": {"examples": 5}}).statistics
    assert few == StatisticsSettings(examples=5)
    for wrong in (["fishers"], [], {"examples": 0}):
        with pytest.raises(ValueError, match="statistics"):
            Train.model_validate({"statistics": wrong})
