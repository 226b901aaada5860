"""Where in a model a weight lies, by its name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_contmerge.models.config import depths, is_matrix, learned_positions

STACKS = {
    "llama": "model.layers.{}.self_attn.q_proj.weight",
    "gpt2": "transformer.h.{}.attn.c_attn.weight",
    "neox": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
    "bert": "bert.encoder.layer.{}.output.dense.weight",
    "mpt": "transformer.blocks.{}.ffn.up_proj.weight",
    "vision and language": "model.language_model.layers.{}.mlp.up_proj.weight",
    "bare": "layers.{}.norm.weight",
    "mixture": "model.layers.{}.block_sparse_moe.experts.7.w1.weight",
    "mixture, bare": "h.{}.experts.11.up.weight",
}


@pytest.mark.parametrize("stack", STACKS)
def test_depth_goes_from_the_first_layer_to_the_last(stack: str) -> None:
    names = [STACKS[stack].format(number) for number in range(5)]
    assert depths(names) == dict(zip(names, [0.0, 0.25, 0.5, 0.75, 1.0], strict=True))


def test_a_single_layer_has_depth_0() -> None:
    assert depths(["model.layers.0.mlp.up_proj.weight"]) == {"model.layers.0.mlp.up_proj.weight": 0.0}


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "transformer.wte.weight",
        "model.multi_modal_projector.0.weight", "model.visual.merger.mlp.2.weight", "experts.3.up.weight",
        "player.3.weight", "model.layers.norm.weight",
    ],
)  # fmt: skip
def test_outside_the_layers_there_is_none(name: str) -> None:
    assert depths([name]) == {}


def test_stacks_count_by_themselves() -> None:
    found = depths(
        [
            *(f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(3)),
            *(f"decoder.block.{i}.layer.2.DenseReluDense.wo.weight" for i in range(5)),
            *(f"model.visual.blocks.{i}.attn.qkv.weight" for i in range(2)),
        ]
    )
    assert found["encoder.block.1.layer.0.SelfAttention.q.weight"] == 0.5
    assert found["encoder.block.2.layer.0.SelfAttention.q.weight"] == 1.0
    assert found["decoder.block.1.layer.2.DenseReluDense.wo.weight"] == 0.25
    assert found["model.visual.blocks.1.attn.qkv.weight"] == 1.0


@pytest.mark.parametrize(
    ("kind", "size", "stacks"),
    [
        ("gpt2", "n_layer", ["transformer.h"]),
        ("qwen2", "num_hidden_layers", ["model.layers"]),
        ("mixtral", "num_hidden_layers", ["model.layers"]),
        ("bloom", "n_layer", ["transformer.h"]),
        ("opt", "num_hidden_layers", ["model.decoder.layers"]),
        ("t5", "num_layers", ["encoder.block", "decoder.block"]),
    ],
)
def test_names_of_real_architectures(kind: str, size: str, stacks: list[str]) -> None:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    with torch.device("meta"):
        names = auto.from_config(AutoConfig.for_model(kind, **{size: 3})).state_dict()
    wanted = {
        name: number / 2 for name in names for stack in stacks for number in range(3) if f"{stack}.{number}." in name
    }
    assert len(wanted) > 20
    assert depths(names) == wanted


@pytest.mark.parametrize(
    ("kind", "most"),
    [("gpt2", 1024), ("openai-gpt", 512), ("gpt_neo", 2048), ("opt", 2048), ("biogpt", 1024), ("gpt_bigcode", 1024),
     ("llama", None), ("gptj", None), ("bloom", None), ("mamba", None), ("gemma3", None)],
)  # fmt: skip
def test_tables_of_positions_of_real_architectures(kind: str, most: int | None) -> None:
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert learned_positions(config.to_dict(), shapes) == most


@pytest.mark.parametrize(
    ("name", "shape", "matrix"),
    [
        ("model.layers.0.mlp.up_proj.weight", (48, 32), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 96), True),
        ("model.layers.0.mlp.experts.down_proj", (1, 48, 32), True),  # one local expert
        ("backbone.layers.0.mixer.conv1d.weight", (1536, 1, 4), False),  # Mamba, Jamba, FalconH1, Qwen3-Next
        ("model.layers.0.conv.conv.weight", (1024, 1, 3), False),  # LFM2
        ("model.layers.0.conv.in_proj.weight", (3072, 1024), True),  # and the linear maps around it
        ("model.encoder.conv1.weight", (384, 80, 3), False),  # Whisper
        ("encoder.layers.0.conv.pointwise_conv1.weight", (512, 256, 1), False),  # Conformer
        ("rwkv.blocks.0.attention.time_mix_key", (1, 1, 768), False),
        ("backbone.layers.0.mixer.A_log", (1536, 16), False),
        ("model.layers.0.experts.biases", (8, 1, 64), False),
        ("model.layers.0.experts.scales", (8, 64, 1), False),
        ("vision.patch_embed.proj.weight", (1024, 3, 14, 14), False),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (128, 5760), False),  # GPT-OSS
        ("model.layers.0.mamba.dt_proj_bias", (2, 3712), False),  # Zamba
        ("model.layers.0.mamba.D", (2, 3712), False),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), False),  # T5
    ],
)
def test_linear_maps_and_what_looks_like_them(name: str, shape: tuple[int, ...], matrix: bool) -> None:
    assert is_matrix(name, shape, None) == matrix
