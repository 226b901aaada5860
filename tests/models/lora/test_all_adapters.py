"""Adapters of many architectures, as peft writes them, against merge_and_unload and save_pretrained, weight by weight.

A case ends in one of two ways: base + task vector is the merged model's file, to 1e-5; or ModelError before any work.
What peft itself cannot train, save or merge is no case.
"""

import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from peft import IA3Config, LoraConfig, PeftType, get_peft_model
from peft.tuners.lora import config as lora_config
from safetensors.torch import load_file, save_file
from toys import ROOT
from toys.loras import loaded, lora, whole
from transformers.pytorch_utils import Conv1D

from hf_contmerge.errors import ModelError
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.lora import settings
from hf_contmerge.models.lora.reader import Adapter, check_base
from hf_contmerge.models.memory import in_memory
from hf_contmerge.models.weights import Weights

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXACT = 1e-5

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2}
QWEN = SIZES | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = SIZES | {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
SEQ2SEQ: dict[str, Any] = {"vocab_size": 64, "d_model": 16}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=2, n_head=2)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**EXPERTS)),
    "phimoe": lambda: hf.PhimoeForCausalLM(hf.PhimoeConfig(**EXPERTS)),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=20)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN, head_dim=8)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**QWEN)),
    "deepseek-v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**EXPERTS, head_dim=8)),
    "granite-moe": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**EXPERTS)),
    "jetmoe": lambda: hf.JetMoeForCausalLM(hf.JetMoeConfig(**EXPERTS)),
    "hrm": lambda: hf.HrmTextForCausalLM(
        hf.HrmTextConfig(**{word: value for word, value in SIZES.items() if word != "num_hidden_layers"})
    ),
    "olmo-hybrid": lambda: hf.OlmoHybridForCausalLM(hf.OlmoHybridConfig(**SIZES)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4,
            word_embed_proj_dim=16, max_position_embeddings=32,
        )
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ, d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            **SEQ2SEQ, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
        )
    ),
    "bert": lambda: hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    ),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16), text_config=hf.LlamaConfig(**SIZES),
            image_token_index=5,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=SIZES | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4)
    ),
    "qwen2-vl": lambda: hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config=SIZES | MROPE,
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        )
    ),
    "qwen3-vl-moe": lambda: hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(
            text_config=QWEN | MROPE | {"head_dim": 8},
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
            },
        )
    ),
}  # fmt: skip


class Names(NamedTuple):
    """Names of a model's modules, without their paths."""

    linear: list[str]
    table: str
    head: str
    norm: str


def names_of(model: Any) -> Names:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    linear = {n for n, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
    last = {n.rpartition(".")[2]: m for n, m in model.named_modules() if m is table or m is head}
    return Names(
        sorted(linear),
        next(n for n, m in last.items() if m is table),
        next(n for n, m in last.items() if m is head),
        next(n for n, m in modules.items() if "norm" in type(m).__name__.lower()),
    )


SETTINGS: dict[str, Callable[[Names], dict[str, Any]]] = {
    "all-linear": lambda n: {"target_modules": "all-linear"},
    "list": lambda n: {"target_modules": n.linear},
    "regex": lambda n: {"target_modules": rf".*({n.linear[0]})"},
    "patterns": lambda n: {
        "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {n.linear[0]: 3},
        "alpha_pattern": {n.linear[-1]: 7},
    },
    "exclude": lambda n: {"target_modules": "all-linear", "exclude_modules": [n.linear[0]]},
    "layers": lambda n: {"target_modules": n.linear, "layers_to_transform": [0]},
    "dora": lambda n: {"target_modules": n.linear, "use_dora": True},
    "fan_in_fan_out": lambda n: {"target_modules": n.linear, "fan_in_fan_out": True},
    "bias-all": lambda n: {"target_modules": n.linear, "bias": "all"},
    "bias-lora_only": lambda n: {"target_modules": n.linear, "bias": "lora_only"},
    "lora_bias": lambda n: {"target_modules": n.linear[:2], "lora_bias": True},
    "save-head": lambda n: {"target_modules": n.linear[:1], "modules_to_save": [n.head]},
    "save-table": lambda n: {"target_modules": n.linear[:1], "modules_to_save": [n.table]},
    "save-tied": lambda n: {
        "target_modules": n.linear[:1], "modules_to_save": [n.table], "ensure_weight_tying": True,
    },
    "save-norm": lambda n: {"target_modules": n.linear[:1], "modules_to_save": [n.norm]},
    "save-experts": lambda n: {"target_modules": n.linear[:1], "modules_to_save": ["experts"]},
    "head": lambda n: {"target_modules": [*n.linear[:1], n.head]},
    "table": lambda n: {"target_modules": [*n.linear[:1], n.table]},
    "tokens": lambda n: {"target_modules": n.linear[:1], "trainable_token_indices": [3, 5]},
    "tokens-named": lambda n: {"target_modules": n.linear[:1], "trainable_token_indices": {n.table: [3, 5]}},
    "parameters": lambda n: {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
    "parameters-one": lambda n: {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "parameters-patterns": lambda n: {
        "target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"], "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 3, ".*gate_up_proj": 5}, "alpha_pattern": {"gate_up_proj": 9},
    },
    "parameters-of-linear": lambda n: {"target_modules": [], "target_parameters": [f"{n.linear[0]}.weight"]},
    "gaussian": lambda n: {"target_modules": n.linear, "init_lora_weights": "gaussian"},
    "orthogonal": lambda n: {"target_modules": n.linear, "init_lora_weights": "orthogonal"},
    "pissa": lambda n: {"target_modules": n.linear, "init_lora_weights": "pissa"},
    "olora": lambda n: {"target_modules": n.linear, "init_lora_weights": "olora"},
    "replication": lambda n: {"target_modules": n.linear, "layer_replication": [[0, 1], [0, 2]]},
    "qalora": lambda n: {"target_modules": n.linear, "use_qalora": True, "qalora_group_size": 4},
    "alora": lambda n: {"target_modules": n.linear, "alora_invocation_tokens": [1]},
    "kasa": lambda n: {"target_modules": n.linear, "kasa_config": lora_config.KasaConfig()},
    "velora": lambda n: {"target_modules": n.linear, "velora_config": lora_config.VeloraConfig()},
    "bdlora": lambda n: {
        "target_modules": n.linear,
        "use_bdlora": lora_config.BdLoraConfig(
            target_modules_bd_a=n.linear[:1], target_modules_bd_b=[], nblocks=2, match_strict=False
        ),
    },
}  # fmt: skip

# A setting that peft saves for every model and that we must refuse, and the word in the message.
REFUSED = {
    "pissa": "init_lora_weights pissa", "olora": "init_lora_weights olora", "replication": "layer_replication",
    "qalora": "use_qalora", "alora": "alora_invocation_tokens", "kasa": "kasa_config", "bdlora": "use_bdlora",
    "velora": "velora_config",
}  # fmt: skip
# What cannot be one change of the stored table: only one of two tied tables is changed.
TIED = "changes two tied tables differently"
CONVOLUTIONS = "LoRA on convolutions"
NO_BIAS = "lora_bias needs a bias"  # peft trains it and cannot merge it

SAMPLE = [
    ("llama", "list"), ("gpt2", "all-linear"), ("gpt-neox", "save-head"), ("gpt-neox", "head"),
    ("mixtral", "all-linear"), ("mixtral", "parameters"), ("mixtral", "save-experts"), ("qwen2-moe", "patterns"),
    ("qwen3-moe", "parameters-patterns"), ("gpt-oss", "parameters-one"), ("olmo-hybrid", "dora"), ("t5", "all-linear"),
    ("llava", "table"), ("llava", "save-head"), ("qwen3-vl-moe", "parameters"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("architectures")

    def base(name: str) -> Path:
        if not (home / name).is_dir():
            torch.manual_seed(0)
            ARCHITECTURES[name]().save_pretrained(home / name)
        return home / name

    return base


def trained(base: Path, out: Path, setting: str) -> Path | None:
    """Save an adapter; None where peft cannot."""
    try:
        return lora(
            base, out, seed=1, size=0.1, task_type=None, **SETTINGS[setting](names_of(whole(base, torch.float32)))
        )
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError):
        return None


def merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor] | None:
    """Return the tensors that peft's merge and transformers' save write; None where peft cannot merge."""
    try:
        loaded(base, adapter).merge_and_unload().save_pretrained(out)
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError):
        return None
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(base: Path, adapter: Adapter, right: dict[str, torch.Tensor]) -> None:
    weights = Weights(base)
    assert adapter.names
    assert set(adapter.names) <= set(right)
    for name in weights.names:
        stored = weights.tensor(name)
        change = adapter.task_vector(name, stored)
        torch.testing.assert_close(stored.double() + change.double(), right[name].double(), atol=EXACT, rtol=0)
        if name in adapter.names and (pair := adapter.factors(name)):
            torch.testing.assert_close(pair[0] @ pair[1], change, atol=EXACT, rtol=0)
            assert pair[0].shape[1] == adapter.rank(name)


def outcome(base: Path, setting: str, home: Path) -> str:
    """Return "equal", the reason of a refusal, or "" where peft cannot do it."""
    folder = trained(base, home / "adapter", setting)
    if folder is None:
        return ""
    try:
        adapter = Adapter(folder, Weights(base))
    except ModelError as error:
        return str(error)
    right = merged(base, folder, home / "merged")
    if right is None:
        return ""
    assert_equal(base, adapter, right)
    return "equal"


def assert_expected(result: str, setting: str) -> None:
    if setting in REFUSED:
        assert result == "" or REFUSED[setting] in result
    elif result not in ("", "equal"):
        assert any(reason in result for reason in (TIED, CONVOLUTIONS, NO_BIAS)), result


@pytest.mark.parametrize(("architecture", "setting"), SAMPLE)
def test_a_sample_is_what_peft_merges(architecture: str, setting: str, bases, tmp_path: Path) -> None:
    assert outcome(bases(architecture), setting, tmp_path) == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_setting_is_what_peft_merges_or_is_refused(architecture: str, bases, tmp_path: Path) -> None:
    results = {setting: outcome(bases(architecture), setting, tmp_path / setting) for setting in SETTINGS}
    for setting, result in results.items():
        assert_expected(result, setting)
    equal = {setting for setting, result in results.items() if result == "equal"}
    assert equal
    if architecture != "mamba":  # peft adapts few of its modules
        assert {"all-linear", "save-norm"} <= equal
        assert len(equal) >= 8
    if architecture in ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss", "qwen3-vl-moe"):
        assert {"parameters", "parameters-one", "parameters-patterns"} <= equal
    if architecture in ("mixtral", "qwen3-vl-moe"):
        assert "save-experts" in equal


def test_one_of_several_tied_tables_is_refused(bases, tmp_path: Path) -> None:
    for architecture, setting in (("t5", "save-table"), ("t5", "table"), ("llama-tied", "head")):
        assert TIED in outcome(bases(architecture), setting, tmp_path / architecture / setting)


# Settings


def test_every_field_of_peft_is_known() -> None:
    tables = (settings.READ, settings.TRAINING, settings.REFUSED)
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    known = [word for table in tables for word in table]
    assert sorted(known) == sorted(set(known))
    assert fields <= set(known), f"peft has {fields - set(known)}: put them into a table of models/lora/settings.py"


def test_every_start_of_peft_is_known(tmp_path: Path) -> None:
    hints = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    words = [word for hint in typing.get_args(hints) for word in typing.get_args(hint)]
    assert {"pissa", "eva", "loftq"} <= set(words)
    for word in (*words, "lora_ga", "pissa_niter_4", True, False):
        refused = refusal(tmp_path, init_lora_weights=word)
        assert "which is unknown" not in refused
        assert bool(refused) == str(word).startswith(("pissa", "olora", "corda", "lora_ga", "loftq"))
    assert "tomorrow, which is unknown" in refusal(tmp_path, init_lora_weights="tomorrow")


def refusal(folder: Path, **words: Any) -> str:
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **words}))
    try:
        settings.read_settings(folder)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("word", settings.REFUSED)
def test_refused_settings_are_named(word: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, **{word: None}) == ""
    assert f"sets {word}: the adapter {settings.REFUSED[word]}" in refusal(tmp_path, **{word: {"of": "any value"}})


def test_other_types_are_refused_by_name(bases, tmp_path: Path) -> None:
    get_peft_model(whole(bases("llama"), torch.float32), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"peft_type IA3; only LORA is supported\. Merge"):
        Adapter(tmp_path, Weights(bases("llama")))
    for kind in PeftType:
        if kind != PeftType.LORA:
            assert f"peft_type {kind.value}; only LORA" in refusal(tmp_path, peft_type=kind.value)


def test_the_page_lists_the_settings() -> None:
    page = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    for outcome, table in (("read", settings.READ), ("no effect", settings.TRAINING), ("refused", settings.REFUSED)):
        for word, why in table.items():
            assert f"| `{word}` | {outcome} | {why} |\n" in page


# Older names


def test_experts_adapted_one_by_one_by_an_older_version(bases, tmp_path: Path) -> None:
    base = bases("mixtral")
    folder = as_saved_by_version_4(base, tmp_path / "old")
    right = merged(base, folder, tmp_path / "merged")
    assert right
    adapter = Adapter(folder, Weights(base))
    assert_equal(base, adapter, right)
    assert {adapter.rank(name) for name in adapter.names} == {2}
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    with pytest.raises(ModelError, match=r"w1\.lora_A\.weight, an expert adapted alone .* use_rslora"):
        Adapter(folder, Weights(base))


def as_saved_by_version_4(base: Path, folder: Path) -> Path:
    """Write an adapter of a mixture's experts as peft did when they were separate linear maps."""
    weights, noise = Weights(base), torch.Generator().manual_seed(2)
    tensors = {}
    for name in (n for n in weights.names if ".experts." in n or "gate" in n):
        (out, inner), key = weights.shape(name), f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(2, inner, generator=noise)
        tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out, 2, generator=noise)
    folder.mkdir()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    words = {"r": 2, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3", "gate"], "task_type": "CAUSAL_LM"}
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base), **words}))
    return folder


def test_names_in_memory(bases) -> None:
    mixtral = in_memory(Weights(bases("mixtral")))
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert mixtral.is_stacked(name)
    with pytest.raises(ModelError, match="another form in memory"):
        mixtral.name(name)
    assert mixtral.name("model.layers.0.block_sparse_moe.gate.weight") == "model.layers.0.mlp.gate.weight"
    assert in_memory(Weights(bases("gpt-neox"))).name("embed_out.weight") == "lm_head.weight"
    assert in_memory(Weights(bases("gpt2"))).ties["lm_head.weight"] == ("transformer.wte.weight", "lm_head.weight")


# Which adapter, which base


def test_a_folder_of_several_adapters_names_them(bases, tmp_path: Path, caplog) -> None:
    base = bases("llama")
    model: Any = get_peft_model(whole(base, torch.float32), LoraConfig(target_modules=["q_proj"]), adapter_name="law")
    model.add_adapter("med", LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(str(tmp_path / "both"))
    with pytest.raises(ModelError, match=rf"2 adapters in subfolders: law, med\. Give .* {tmp_path}/both/law"):
        resolve_model(str(tmp_path / "both"), adapters=True)
    assert resolve_model(str(tmp_path / "both" / "med"), adapters=True) == tmp_path / "both" / "med"
    model.add_adapter("default", LoraConfig(target_modules=["k_proj"]))
    model.save_pretrained(str(tmp_path / "three"))
    assert resolve_model(str(tmp_path / "three"), adapters=True) == tmp_path / "three"
    assert "not those below: law, med" in caplog.text


def test_an_adapter_is_no_base(bases, tmp_path: Path) -> None:
    folder = trained(bases("llama"), tmp_path / "inner", "list")
    assert folder
    with pytest.raises(ModelError, match=r"inner is an adapter, but a whole model is needed\. Merge"):
        resolve_model(str(folder))


def test_adapters_of_adapters_are_refused(bases, tmp_path: Path) -> None:
    base = bases("llama")
    inner = trained(base, tmp_path / "inner", "list")
    assert inner
    nested: Any = get_peft_model(loaded(base, inner, torch.float32), LoraConfig(target_modules=["q_proj"]))
    nested.save_pretrained(str(tmp_path / "nested"))
    with pytest.raises(ModelError, match="on top of another adapter"):
        Adapter(tmp_path / "nested", Weights(base))
    outer = Adapter(based_on(trained(base, tmp_path / "outer", "list"), str(inner)), Weights(base))
    with pytest.raises(ModelError, match=r"inner, not on owner/base: its base is another adapter\. Merge"):
        check_base(outer, ["owner/base"])


def based_on(folder: Path | None, base: str, revision: str | None = None) -> Path:
    assert folder
    config = json.loads((folder / CONFIG).read_text())
    words = {"base_model_name_or_path": base, "revision": revision}
    (folder / CONFIG).write_text(json.dumps(config | words))
    return folder


@pytest.mark.parametrize(
    ("said", "revision", "names", "same"),
    [
        ("owner/base", None, ["owner/base@step3"], True),
        ("owner/base", "main", ["owner/base"], True),
        ("owner/base", "step3", ["owner/base@step3"], True),
        ("owner/base", "step3", ["owner/base"], False),
        ("owner/base", "step3", ["owner/base@step4", "/cache/models--owner--base/snapshots/abc"], False),
        ("owner/base", "abc", ["owner/base", "/cache/models--owner--base/snapshots/abc"], True),
        ("owner/base", "step3", ["/cache/models--owner--base"], True),
    ],
)
def test_another_revision_is_refused(said, revision, names, same, bases, tmp_path: Path) -> None:
    folder = based_on(trained(bases("llama"), tmp_path / "a", "list"), said, revision)
    adapter = Adapter(folder, Weights(bases("llama")))
    check_base(adapter, names, force=True)
    if same:
        check_base(adapter, names)
        return
    with pytest.raises(ModelError, match=f"trained on owner/base@{revision}, .* another revision.* --force"):
        check_base(adapter, names)
