"""Adapters against the real peft: what base + task vector is, and what is refused, with which words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from toys.models import toy_llama
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
)

from hf_contmerge.errors import ModelError
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.lora.reader import Adapter, check_base
from hf_contmerge.models.lora.writer import write_adapter
from hf_contmerge.models.weights import Weights

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = torch.tensor([[5, 6, 7, 8, 40]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    gpt2: dict[str, Any] = {"vocab_size": 96, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    moe: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "pad_token_id": 0,
    }
    square: dict[str, Any] = moe | {"intermediate_size": 32}
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(**gpt2)),
        "gpt2-untied": GPT2LMHeadModel(GPT2Config(**gpt2, tie_word_embeddings=False)),
        "gpt-oss": GptOssForCausalLM(GptOssConfig(**moe, head_dim=8)),
        "gpt-oss-square": GptOssForCausalLM(GptOssConfig(**square, head_dim=8)),
        "jetmoe": JetMoeForCausalLM(JetMoeConfig(**moe)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    toy_llama(folder / "untied", seed=0, tied=False)
    toy_llama(folder / "tied", seed=0, tied=True)
    toy_llama(folder / "bf16", seed=0, tied=False, dtype=torch.bfloat16)
    return {path.name: path for path in folder.iterdir()}


def trained(base: Path, out: Path, *, save: dict[str, Any] | None = None, load: Any = None, **settings: Any) -> Path:
    """Save an adapter whose trainable tensors all moved away from their start; return its folder."""
    load = load or {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=load.get("dtype", torch.float32))
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    wrapped: Any = get_peft_model(model, config, autocast_adapter_dtype=load.get("autocast", True))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    wrapped.save_pretrained(out, **(save or {}))
    return out


def loaded(base: Path, adapter: Path) -> Any:
    """Return peft's model of a saved adapter, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return PeftModel.from_pretrained(model, adapter, torch_device="cpu")


def is_embedding(adapter: Adapter, name: str) -> bool:
    inner = adapter._changes[name][0].change.low_rank
    return inner is not None and inner.embedding


def is_conv1d(adapter: Adapter, name: str) -> bool:
    inner = adapter._changes[name][0].change.low_rank
    return inner is not None and inner.transposed and not inner.embedding


def assert_as_peft_merges(base: Path, folder: Path) -> Adapter:
    weights, merged = Weights(base), loaded(base, folder).merge_and_unload().state_dict()
    adapter = Adapter(folder, weights)
    for name in weights.names:
        stored = weights.tensor(name)
        before = stored.clone()
        change = adapter.task_vector(name, stored)
        assert change.dtype == torch.float32
        assert change.shape == stored.shape
        assert torch.equal(stored, before), "the base's own tensor must stay as it is"
        torch.testing.assert_close(change.double(), merged[name] - stored.double(), atol=1e-6, rtol=0)
        if name not in adapter.names:
            assert not change.any()
        else:
            assert_factors(adapter, name, change)
    assert any(adapter.task_vector(n, weights.tensor(n)).any() for n in adapter.names)
    return adapter


def assert_factors(adapter: Adapter, name: str, change: torch.Tensor) -> None:
    pair, rank = adapter.factors(name), adapter.rank(name)
    assert (pair is None) == (rank is None)
    if pair is not None:
        assert pair[0].dtype == pair[1].dtype == torch.float32
        assert (pair[0].shape, pair[1].shape) == ((change.shape[0], rank), (rank, change.shape[1]))
        torch.testing.assert_close(pair[0] @ pair[1], change)


SAVE_TABLES = {"save_embedding_layers": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("untied", {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "untied",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.0\..*q_proj": 7, "v_proj": 2},
            "alpha_pattern": {"1.self_attn.v_proj": 9, "proj": 5},
        },
    ),
    "first-pattern": ("untied", {"target_modules": ["q_proj"], "rank_pattern": {r".*\.1\..*": 5, "q_proj": 3}}),
    "rslora": ("untied", {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 9}}),
    "all-linear": ("untied", {"target_modules": "all-linear"}),
    "layers_to_transform": ("untied", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "dora": ("untied", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora-table": ("untied", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "dora-bf16": ("bf16", {"target_modules": ["q_proj"], "use_dora": True}),
    "table": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "table-alone": ("untied", {"target_modules": ["embed_tokens"], "save": {"save_embedding_layers": False}}),
    "head": ("untied", {"target_modules": ["q_proj", "lm_head"]}),
    "modules_to_save": (
        "untied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "modules_to_save-copies": (
        "untied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "save": SAVE_TABLES},
    ),
    "saved-tables": ("untied", {"target_modules": ["q_proj"], "save": SAVE_TABLES}),
    "saved-tables-bf16": ("bf16", {"target_modules": ["q_proj"], "save": SAVE_TABLES}),
    "saved-tables-tied": ("tied", {"target_modules": ["q_proj"], "save": SAVE_TABLES}),
    "table-tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "modules_to_save-tied": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens": ("untied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1]}),
    "tokens-saved-tables": (
        "untied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1], "save": SAVE_TABLES},
    ),
    "tokens-tied": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1]}),
    "tokens-tied-saved": (
        "tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1], "save": SAVE_TABLES},
    ),
    "tokens-head": (
        "untied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2, 3]}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "conv1d-square-and-linear": ("gpt2-untied", {"target_modules": ["attn.c_proj", "lm_head"]}),
    "conv1d-tables": ("gpt2-untied", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "bias-all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias-lora_only": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "lora_bias": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "lora_bias-and-bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all"}),
    "parameters": (
        "untied",
        {
            "target_modules": [],
            "target_parameters": ["q_proj.weight", "up_proj.weight"],
            "rank_pattern": {"q_proj.weight": 3},
        },
    ),
    "parameters-stacks-in-out": (
        "gpt-oss",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "parameters-one-stack": ("gpt-oss", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "parameters-square-stack": (
        "gpt-oss-square",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "use_rslora": True},
    ),
    "parameters-one-square-stack": (
        "gpt-oss-square",
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "parameters-stacks-out-in": (
        "jetmoe",
        {"target_modules": [], "target_parameters": ["mlp.input_linear.weight", "mlp.output_linear.weight"]},
    ),
    "bf16-storage": ("bf16", {"target_modules": ["q_proj"], "load": {"dtype": torch.bfloat16, "autocast": False}}),
    "fp16-storage": ("untied", {"target_modules": ["q_proj"], "load": {"dtype": torch.float16, "autocast": False}}),
    "orthogonal": ("untied", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "gaussian": ("untied", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", CASES)
def test_base_and_task_vector_are_what_peft_merges(case, bases, tmp_path):
    base, settings = CASES[case]
    adapter = assert_as_peft_merges(bases[base], trained(bases[base], tmp_path / "a", **settings))
    assert is_adapter(adapter.folder)
    assert adapter.base_model == str(bases[base])


def test_stored_precision_is_kept_until_it_is_widened(bases, tmp_path):
    folder = trained(bases["bf16"], tmp_path / "a", **CASES["bf16-storage"][1])
    assert {t.dtype for t in load_file(folder / FILE).values()} == {torch.bfloat16}


def test_saved_tables_that_were_not_trained_are_no_change(bases, tmp_path):
    for case in ("saved-tables", "saved-tables-tied", "saved-tables-bf16"):
        base, settings = CASES[case]
        adapter = Adapter(trained(bases[base], tmp_path / case, **settings), Weights(bases[base]))
        assert [n.split(".")[-2] for n in adapter.names] == ["q_proj", "q_proj"]


def test_a_saved_table_under_lora_leaves_the_change_low_rank(bases, tmp_path):
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert f"base_model.model.{'model.embed_tokens'}.base_layer.weight" in load_file(folder / FILE)
    adapter = Adapter(folder, Weights(bases["untied"]))
    assert {adapter.rank(name) for name in adapter.names} == {4}
    assert [n for n in adapter.names if is_embedding(adapter, n)] == ["model.embed_tokens.weight"]


def test_a_table_that_was_trained_under_lora_counts_too(bases, tmp_path):
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    tensors = load_file(folder / FILE)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[key] = tensors[key] + 0.5
    save_file(tensors, folder / FILE)
    adapter = assert_as_peft_merges(bases["untied"], folder)
    assert adapter.rank("model.embed_tokens.weight") is None


def test_tied_lora_counts_once_though_peft_merges_it_twice(bases, tmp_path):
    folder = trained(bases["tied"], tmp_path / "a", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    weights = Weights(bases["tied"])
    adapter = Adapter(folder, weights)
    assert adapter.rank("model.embed_tokens.weight") == 4
    merged = AutoModelForCausalLM.from_pretrained(bases["tied"], dtype=torch.float64)
    with torch.no_grad():
        for name in adapter.names:
            merged.get_parameter(name).add_(adapter.task_vector(name, weights.tensor(name)))
        torch.testing.assert_close(
            merged(TOKENS).logits, loaded(bases["tied"], folder)(TOKENS).logits, rtol=1e-5, atol=1e-5
        )


def test_lora_on_a_tied_table_is_said_to_act_on_the_output_too(bases, tmp_path, caplog):
    Adapter(trained(bases["tied"], tmp_path / "a", target_modules=["embed_tokens"]), Weights(bases["tied"]))
    assert "also the output head" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [1, 2]}},
    ],
    ids=["lora-head", "save-head", "save-table", "save-both", "tokens"],
)
def test_changing_one_of_two_tied_tables_is_refused(settings, bases, tmp_path):
    folder = trained(bases["tied"], tmp_path / "a", **settings)
    with pytest.raises(
        ModelError, match=r"two tied tables differently .*model\.embed_tokens\.weight, tie_word_embeddings"
    ):
        Adapter(folder, Weights(bases["tied"]))


def test_zeros_and_key_errors_where_the_adapter_does_not_reach(bases, tmp_path):
    weights = Weights(bases["untied"])
    adapter = Adapter(trained(bases["untied"], tmp_path / "a", target_modules=["q_proj"]), weights)
    assert not adapter.task_vector("model.norm.weight", weights.tensor("model.norm.weight")).any()
    for method in (adapter.factors, adapter.rank):
        with pytest.raises(KeyError):
            method("model.norm.weight")


@pytest.mark.parametrize(
    ("prefix_in", "prefix_out"),
    [("model.", ""), ("model.", "language_model.model."), ("model.", "model.language_model."), ("", "thinker.")],
)
def test_names_that_differ_by_what_stands_in_front(prefix_in, prefix_out, bases, tmp_path):
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["q_proj", "lm_head"])
    renamed = tmp_path / "base"
    renamed.mkdir()
    (renamed / "config.json").write_text((bases["untied"] / "config.json").read_text())
    tensors = load_file(bases["untied"] / "model.safetensors")
    new = {prefix_out + n.removeprefix(prefix_in) if n.startswith(prefix_in) else n: t for n, t in tensors.items()}
    save_file(new, renamed / "model.safetensors")
    adapter, usual = Adapter(folder, Weights(renamed)), Adapter(folder, Weights(bases["untied"]))
    assert len(adapter.names) == len(usual.names) == 3
    name = f"{prefix_out}layers.0.self_attn.q_proj.weight"
    name = name if prefix_in else f"{prefix_out}model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(adapter.factors(name), usual.factors("model.layers.0.self_attn.q_proj.weight"))


def test_a_name_with_two_meanings_or_none_is_refused(bases, tmp_path):
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["q_proj"])
    tensors = load_file(bases["untied"] / "model.safetensors")
    inner = {n.removeprefix("model."): t for n, t in tensors.items()}
    for prefixes, found in (
        (("language_model.", "text_model."), "language_model.* and text_model"),
        (("vision_tower.",), r"has no weight model\.layers\.0\.self_attn\.q_proj\.weight"),
    ):
        base = tmp_path / found[:6].strip()
        base.mkdir()
        save_file({p + n: t.clone() for p in prefixes for n, t in inner.items()}, base / "model.safetensors")
        with pytest.raises(ModelError, match=found):
            Adapter(folder, Weights(base))


def edited(folder: Path, **settings: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True, "qalora_group_size": 4}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights pissa_niter_2"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_change_of_these_weights_is_refused(settings, message, bases, tmp_path):
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["q_proj"], **settings)
    with pytest.raises(ModelError, match=message):
        Adapter(folder, Weights(bases["untied"]))


def test_a_converted_pissa_adapter_is_a_plain_lora(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases["untied"])
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    wrapped.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "start")
    adapter = assert_as_peft_merges(bases["untied"], tmp_path / "a")
    assert {adapter.rank(name) for name in adapter.names} == {8}


def test_other_peft_types_and_unknown_settings_are_refused(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases["untied"])
    get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(ModelError, match="peft_type IA3"):
        Adapter(tmp_path / "ia3", Weights(bases["untied"]))
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(ModelError, match="use_tomorrow"):
        Adapter(edited(folder, use_tomorrow=True), Weights(bases["untied"]))
    Adapter(edited(folder, use_tomorrow=False), Weights(bases["untied"]))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {f"{Q}.lora_C.weight": torch.ones(2, 2)}, "lora_C.weight.*not supported"),
        (lambda t: t | {"model.x.weight": torch.ones(2)}, r"model\.x\.weight.*begin"),
        (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector.*contradicts"),
        (lambda t: t | {"base_model.model.model.norm.weight": torch.ones(9)}, r"shape \(9,\).*\(32,\)"),
        (lambda t: t | {"base_model.model.model.layers.7.x.weight": torch.ones(9)}, r"no weight model\.layers\.7\.x"),
        (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, "lacks lora_B.weight of model"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 33)}, r"shape \(32, 33\).*shape \(32, 32\)"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(5, 32)}, r"rank 5 \(A\) and 4 \(B\).*says 4"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 32, 1, 1)}, "expected a matrix"),
        (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}, "int8"),
        (lambda t: t | {f"{Q}.base_layer.lora_A.weight": torch.ones(4, 32)}, "wraps .*q_proj 2 times"),
        (lambda t: {"base_model.model.model.norm.weight": torch.ones(32)}, "no LoRA tensors"),
        (lambda t: {}, "no LoRA tensors"),
    ],
)
def test_every_tensor_is_understood_or_named(change, message, bases, tmp_path):
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["q_proj"])
    save_file(change(load_file(folder / FILE)), folder / FILE)
    with pytest.raises(ModelError, match=message):
        Adapter(folder, Weights(bases["untied"]))


def test_another_size_of_base_is_named_with_both_shapes(bases, tmp_path):
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["q_proj"])
    wide = toy_llama(tmp_path / "wide", seed=0, hidden=48, tied=False)
    with pytest.raises(ModelError, match=r"shape \(32, 32\).*shape \(48, 48\)"):
        Adapter(folder, Weights(wide))


def test_damaged_folders_are_one_clear_error_each(bases, tmp_path):
    weights = Weights(bases["untied"])
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["q_proj"])
    whole, text = (folder / FILE).read_bytes(), (folder / CONFIG).read_text()
    (folder / FILE).write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="truncated"):
        Adapter(folder, weights)
    (folder / FILE).unlink()
    with pytest.raises(ModelError, match=f"but no {FILE}"):
        Adapter(folder, weights)
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickle.*save_pretrained"):
        Adapter(folder, weights)
    (folder / FILE).write_bytes(whole)
    for broken, message in ((text[:-20], "Cannot read"), ("[1]", "peft_type list"), ("{}", "peft_type None")):
        (folder / CONFIG).write_text(broken)
        with pytest.raises(ModelError, match=message):
            Adapter(folder, weights)
    (folder / CONFIG).write_text(text)
    with pytest.raises(ModelError, match="invalid pattern"):
        Adapter(edited(folder, rank_pattern={"(": 3}), weights)


@pytest.mark.parametrize(
    ("said", "names", "same"),
    [
        ("owner/model", ["Owner/Model"], True),
        ("owner/model@main", ["owner/model"], True),
        ("owner/model/", ["owner/model"], True),
        ("/c/models--Owner--My-Model/snapshots/abc/", ["owner/my-model"], True),
        ("owner/my-model", ["/c/hub/models--owner--my-model/snapshots/def"], True),
        ("/a/base/", ["/a/base"], True),
        ("/a/x/../base", ["/a/base"], True),
        ("models/base", ["/a/models/base"], True),
        ("./base", ["{cwd}/base"], True),
        ("quickstart:smollm2", ["quickstart:smollm2"], True),
        ("owner/model", ["/a/b", "owner/model"], True),
        ("", ["owner/model"], True),
        ("owner/model", ["owner/model-instruct"], False),
        ("owner/model", ["other/model"], False),
        ("/a/base", ["/b/base"], False),
        ("base", ["/b/base"], False),
        ("owner/model", [], False),
    ],
)
def test_an_adapter_of_another_base_is_refused_unless_forced(said, names, same, bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = trained(bases["untied"], tmp_path / "a", target_modules=["q_proj"])
    adapter = Adapter(edited(folder, base_model_name_or_path=said), Weights(bases["untied"]))
    names = [name.format(cwd=tmp_path) for name in names]
    check_base(adapter, names, force=True)
    if same:
        check_base(adapter, names)
        return
    with pytest.raises(ModelError, match="--force") as caught:
        check_base(adapter, names)
    assert all(name in str(caught.value) for name in (said, *names))


def test_a_written_adapter_is_loaded_by_peft_and_gives_base_plus_product(bases, tmp_path):
    weights, noise = Weights(bases["untied"]), torch.Generator().manual_seed(3)
    ranks = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.down_proj": 5, "model.embed_tokens": 3}
    ranks |= {"lm_head": 2, "model.layers.1.self_attn.q_proj": 0}
    changes = {}
    for module, rank in ranks.items():
        m, n = weights.shape(f"{module}.weight")
        pair = torch.randn(m, rank, generator=noise), torch.randn(rank, n, generator=noise)
        changes[f"{module}.weight"] = pair
    norm = torch.randn(32, generator=noise).bfloat16()
    write_adapter(
        tmp_path / "a",
        iter(changes.items()),
        base_model=str(bases["untied"]),
        whole={"model.norm.weight": norm},
        embeddings=["model.embed_tokens.weight"],
    )
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG, FILE]
    merged = loaded(bases["untied"], tmp_path / "a").merge_and_unload().state_dict()
    for name in weights.names:
        want = weights.tensor(name).double()
        if name in changes:
            want = want + changes[name][0].double() @ changes[name][1].double()
        want = norm.double() if name == "model.norm.weight" else want
        torch.testing.assert_close(merged[name], want, atol=1e-6, rtol=0)
    adapter = assert_as_peft_merges(bases["untied"], tmp_path / "a")
    assert {n: adapter.rank(n) for n in adapter.names if adapter.rank(n)} == {
        n: pair[0].shape[1] for n, pair in changes.items() if pair[0].shape[1]
    }


def test_adapters_read_and_written_again_stay_the_same(bases, tmp_path):
    for base, settings in (
        ("gpt2-untied", {"target_modules": ["wte", "c_attn", "c_proj", "lm_head"], "bias": "all", "use_rslora": True}),
        ("untied", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "norm"]}),
    ):
        weights = Weights(bases[base])
        first = Adapter(trained(bases[base], tmp_path / base / "a", **settings), weights)
        low = [n for n in first.names if first.rank(n)]
        rest = {n: weights.tensor(n) + first.task_vector(n, weights.tensor(n)) for n in first.names if n not in low}
        write_adapter(
            tmp_path / base / "b",
            {n: pair for n in low if (pair := first.factors(n))},
            base_model=str(bases[base]),
            whole=rest | {n: weights.tensor(n) for n in partners(rest, low, weights)},
            embeddings=[n for n in low if is_embedding(first, n)],
            conv1d=[n for n in low if is_conv1d(first, n)],
        )
        second = assert_as_peft_merges(bases[base], tmp_path / base / "b")
        assert second.names == first.names
        for name in first.names:
            stored = weights.tensor(name)
            torch.testing.assert_close(
                first.task_vector(name, stored), second.task_vector(name, stored), atol=1e-6, rtol=0
            )


def partners(rest: dict[str, torch.Tensor], low: list[str], weights: Weights) -> list[str]:
    """Return the other tensors of the modules whose tensors are given whole: peft saves modules."""
    modules = {n.rpartition(".")[0] for n in rest} - {n.rpartition(".")[0] for n in low}
    return [n for n in weights.names if n.rpartition(".")[0] in modules and n not in rest]


def test_what_a_lora_cannot_hold_is_refused_by_the_writer(tmp_path):
    pair = torch.ones(4, 1), torch.ones(1, 4)
    for factors, whole, message in (
        ({}, {}, "No low-rank change"),
        ({"a.weight": (torch.ones(4, 0), torch.ones(0, 4))}, {}, "No low-rank change"),
        ({"experts.down_proj": pair}, {}, "not a module's weight"),
        ({"a.weight": pair}, {"a.weight": torch.ones(4, 4)}, "both"),
    ):
        with pytest.raises(ModelError, match=message):
            write_adapter(tmp_path / "a", factors, base_model="b", whole=whole)
