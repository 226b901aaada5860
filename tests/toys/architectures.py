"""Tiny models of many architectures, as transformers builds them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_contmerge.errors import ModelError
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.contents import INDEX, SINGLE

_TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_TEXT,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
"""DeepSeek's mixtures with latent attention."""


class Tiny(NamedTuple):
    """How to build an architecture: class, configuration, kind."""

    name: str
    """The class in transformers."""
    kind: str
    config: dict[str, Any]
    settings: str = ""
    """Its configuration class, if it is not called like the model."""


DENSE, GROUPED, MIXTURE, HYBRID, PAIR, VISION, CONV1D, MASKED = (
    "dense",
    "grouped heads",
    "mixture",
    "hybrid",
    "encoder-decoder",
    "vision-language",
    "Conv1D",
    "masked",
)

ARCHITECTURES = (
    Tiny("LlamaForCausalLM", GROUPED, _GROUPED),
    Tiny("MistralForCausalLM", GROUPED, _GROUPED),
    Tiny("Qwen2ForCausalLM", GROUPED, _GROUPED),
    Tiny("Qwen3ForCausalLM", GROUPED, {**_GROUPED, "head_dim": 8}),
    Tiny("GemmaForCausalLM", GROUPED, {**_GROUPED, "head_dim": 8}),
    Tiny("Gemma2ForCausalLM", GROUPED, {**_GROUPED, "head_dim": 8}),
    Tiny("Gemma3ForCausalLM", GROUPED, {**_GROUPED, "head_dim": 8}, "Gemma3TextConfig"),
    Tiny("Phi3ForCausalLM", GROUPED, _GROUPED),
    Tiny("Olmo2ForCausalLM", GROUPED, _GROUPED),
    Tiny("CohereForCausalLM", GROUPED, _GROUPED),
    Tiny("StableLmForCausalLM", GROUPED, _GROUPED),
    Tiny("Starcoder2ForCausalLM", GROUPED, _GROUPED),
    Tiny("GraniteForCausalLM", GROUPED, _GROUPED),
    Tiny("Glm4ForCausalLM", GROUPED, {**_GROUPED, "head_dim": 8}),
    Tiny("SmolLM3ForCausalLM", GROUPED, _GROUPED),
    Tiny("Exaone4ForCausalLM", GROUPED, _GROUPED),
    Tiny("PhiForCausalLM", DENSE, _TEXT),
    Tiny("GPTNeoXForCausalLM", DENSE, _TEXT),
    Tiny("BloomForCausalLM", DENSE, {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Tiny("OPTForCausalLM", DENSE, {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    Tiny("FalconForCausalLM", DENSE, {**_TEXT, "new_decoder_architecture": False, "multi_query": True}),
    Tiny(
        "GPT2LMHeadModel",
        CONV1D,
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "GPT2Config",
    ),
    Tiny(
        "GPTBigCodeForCausalLM", DENSE, {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ),
    Tiny(
        "GPTNeoForCausalLM",
        DENSE,
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 8,
        },
    ),
    Tiny("MixtralForCausalLM", MIXTURE, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny("Qwen2MoeForCausalLM", MIXTURE, {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    Tiny("Qwen3MoeForCausalLM", MIXTURE, {**_EXPERTS, "head_dim": 8}),
    Tiny("OlmoeForCausalLM", MIXTURE, _EXPERTS),
    Tiny("DeepseekV2ForCausalLM", MIXTURE, {**_LATENT, "n_group": 1, "topk_group": 1}),
    Tiny("DeepseekV3ForCausalLM", MIXTURE, {**_LATENT, "n_group": 2, "topk_group": 1}),
    Tiny("GptOssForCausalLM", MIXTURE, {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny("GraniteMoeForCausalLM", MIXTURE, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny("PhimoeForCausalLM", MIXTURE, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny(
        "Llama4ForCausalLM",
        MIXTURE,
        {
            **_GROUPED,
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
        },
        "Llama4TextConfig",
    ),
    Tiny(
        "Glm4MoeForCausalLM",
        MIXTURE,
        {
            **_GROUPED,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Tiny(
        "MambaForCausalLM",
        HYBRID,
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4},
    ),
    Tiny(
        "Mamba2ForCausalLM",
        HYBRID,
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    Tiny(
        "Lfm2ForCausalLM",
        HYBRID,
        {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    Tiny(
        "JambaForCausalLM",
        HYBRID,
        {
            **_GROUPED,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    Tiny(
        "FalconH1ForCausalLM",
        HYBRID,
        {
            **_GROUPED,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    Tiny(
        "Qwen3NextForCausalLM",
        HYBRID,
        {
            **_EXPERTS,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    Tiny(
        "T5ForConditionalGeneration",
        PAIR,
        {
            "vocab_size": 96,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    Tiny(
        "BartForConditionalGeneration",
        PAIR,
        {
            "vocab_size": 96,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
    Tiny(
        "WhisperForConditionalGeneration",
        PAIR,
        {
            "vocab_size": 96,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
    Tiny("BertForMaskedLM", MASKED, _TEXT),
    Tiny("RobertaForMaskedLM", MASKED, {**_TEXT, "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0}),
    Tiny(
        "LlavaForConditionalGeneration",
        VISION,
        {
            "text_config": {"model_type": "llama", **_GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": 90,
            "image_token_id": 90,
            "vision_feature_layer": -1,
        },
    ),
    Tiny(
        "Gemma3ForConditionalGeneration",
        VISION,
        {
            "text_config": {**_GROUPED, "head_dim": 8},
            "vision_config": _VISION,
            "mm_tokens_per_image": 1,
            "image_token_index": 90,
        },
    ),
    Tiny(
        "Qwen2VLForConditionalGeneration",
        VISION,
        {
            "text_config": {
                **_GROUPED,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
            "image_token_id": 90,
            "tie_word_embeddings": False,
        },
    ),
    Tiny(
        "Qwen3VLForConditionalGeneration",
        VISION,
        {
            "text_config": {
                **_GROUPED,
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 8,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "image_token_id": 90,
            "tie_word_embeddings": False,
        },
    ),
    Tiny(
        "Mistral3ForConditionalGeneration",
        VISION,
        {
            "text_config": {"model_type": "mistral", **_GROUPED, "head_dim": 8},
            "vision_config": {"model_type": "pixtral", **_VISION},
            "image_token_index": 90,
        },
    ),
)


def build(tiny: Tiny, seed: int = 0, **config: Any) -> Any:
    """Return a random model of an architecture."""
    name = tiny.settings or tiny.name.partition("For")[0] + "Config"
    settings = getattr(transformers, name)(**{**tiny.config, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, tiny.name)(settings)
        with torch.no_grad():
            for parameter in model.parameters():  # zeros and ones hide what a mistake does
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """Return a model's outputs for fixed text; images and speech are left out."""
    tokens = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(5))
    inputs: dict[str, Any] = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :6]
    if model.main_input_name == "input_features":
        bins, frames = model.config.num_mel_bins, 2 * model.config.max_source_positions
        del inputs["input_ids"]
        inputs["input_features"] = torch.randn(2, bins, frames, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(**inputs).logits.double()


def load(tiny: Tiny, folder: Path) -> Any:
    """Load a folder as its users do; all weights must come from the files."""
    kind = getattr(transformers, tiny.name)
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    lacking = [n for n in info["missing_keys"] if not n.endswith("inv_freq")]
    assert not lacking, f"{folder} lacks {lacking}"
    return model.eval()


def moved(model: Any, seed: int) -> Any:
    """Return a copy of a model with noise on all weights: an expert."""
    expert, noise = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    return expert


# Layouts: how base and experts are stored. Each returns False where the architecture has no such layout.

Folders = Sequence[Path]
"""The base's folder, then the experts'."""


def _one_file(_tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """Base and experts in one file each, as `save_pretrained` writes them."""
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    return True


def _shards(_tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """The base in shards, with an index that forgets a tensor; experts in one file."""
    _one_file(_tiny, models, folders)
    (folders[0] / SINGLE).unlink()
    models[0].save_pretrained(folders[0], max_shard_size="40KB")
    index = json.loads((folders[0] / INDEX).read_text())
    files = list(index["weight_map"].values())
    forgotten = next((name for name, file in index["weight_map"].items() if files.count(file) > 1), None)
    index["weight_map"].pop(forgotten, None)
    (folders[0] / INDEX).write_text(json.dumps(index))
    return True


def _stale(_tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """One file, and beside it the shards and index of another save, a pickle and other formats."""
    _one_file(_tiny, models, folders)
    for model, folder in zip([*models[1:], models[0]], folders, strict=True):
        tensors = load_file(folder / SINGLE)
        model.save_pretrained(folder / "other", max_shard_size="40KB")
        for path in [p for p in (folder / "other").iterdir() if p.suffix == ".safetensors" or p.name == INDEX]:
            path.rename(folder / path.name)
        shutil.rmtree(folder / "other")
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        save_file({"junk": torch.ones(3)}, folder / "consolidated.safetensors")
        (folder / "pytorch_model.bin").write_bytes(b"junk")
    return True


def _bare(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """The base under the names of its inner model, as old files have them."""
    prefix = models[0].base_model_prefix
    _one_file(tiny, models, folders)
    tensors = load_file(folders[0] / SINGLE)
    names = [n for n in tensors if n.startswith(f"{prefix}.")]
    _rewrite(folders[0], {n.removeprefix(f"{prefix}."): t for n, t in tensors.items()})
    _, info = getattr(transformers, tiny.name).from_pretrained(folders[0], output_loading_info=True)
    return bool(names) and not info["missing_keys"]  # some do not find their weights without it


def _buffers(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """The base with the buffers of old releases, one of them infinite in half precision."""
    _one_file(tiny, models, folders)
    tensors = load_file(folders[0] / SINGLE)
    layer = next(n for n in sorted(tensors) if ".0." in n).partition(".0.")[0]
    old = {
        f"{layer}.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        f"{layer}.0.attn.bias": torch.ones(1, 1, 8, 8),
        f"{layer}.0.attn.masked_bias": torch.tensor(-1e9),
    }
    _rewrite(folders[0], {**tensors, **old})
    return True


def _stacks(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """All as transformers holds them in memory."""
    return _as_in_memory(models, folders, range(len(folders)))


def _stacks_of_expert(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """One expert as transformers holds it in memory; the base as on the Hub."""
    return _as_in_memory(models, folders, [1])


def _stacks_of_base(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """The base as transformers holds it in memory; experts as on the Hub."""
    return _as_in_memory(models, folders, [0])


def _as_in_memory(models: Sequence[Any], folders: Folders, which: Iterable[int]) -> bool:
    differ = False
    for number, (model, folder) in enumerate(zip(models, folders, strict=True)):
        model.save_pretrained(folder)
        if number in which:
            names = load_file(folder / SINGLE).keys()
            model.save_pretrained(folder, save_original_format=False)
            differ = differ or load_file(folder / SINGLE).keys() != names
    return differ


def _twice(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """Tied tables stored twice in the base and once in the experts."""
    return _with_heads(models, folders, [0], 0.0)


def _own_head(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """A tied flag, and a head stored that is not the table: in the first expert."""
    return _with_heads(models, folders, [1], 0.05)


def _own_heads(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """The same in base and experts."""
    return _with_heads(models, folders, range(len(folders)), 0.05)


def _own_head_of_base(tiny: Tiny, models: Sequence[Any], folders: Folders) -> bool:
    """The same in the base alone."""
    return _with_heads(models, folders, [0], 0.05)


def _with_heads(models: Sequence[Any], folders: Folders, which: Iterable[int], size: float) -> bool:
    ties = getattr(models[0], "all_tied_weights_keys", None) or {}
    pairs = [(head, table) for head, table in ties.items() if head.endswith("weight") and "embed_tokens" not in head]
    for number, (model, folder) in enumerate(zip(models, folders, strict=True)):
        model.save_pretrained(folder)
        tensors = load_file(folder / SINGLE)
        if not pairs or pairs[0][1] not in tensors:
            return False
        if number in which:
            head, table = pairs[0]
            noise = torch.randn(tensors[table].shape, generator=torch.Generator().manual_seed(number))
            _rewrite(folder, {**tensors, head: tensors[table] + size * noise})
    return True


def _rewrite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), folder / SINGLE, metadata={"format": "pt"})


LAYOUTS: dict[str, Callable[[Tiny, Sequence[Any], Folders], bool]] = {
    "one file": _one_file,
    "shards": _shards,
    "stale files": _stale,
    "without prefix": _bare,
    "old buffers": _buffers,
    "stacks": _stacks,
    "stacked expert": _stacks_of_expert,
    "stacked base": _stacks_of_base,
    "table twice": _twice,
    "own head": _own_head,
    "own heads": _own_heads,
    "base's own head": _own_head_of_base,
}


class Cell(NamedTuple):
    """The outcome of one architecture in one layout."""

    outcome: str
    """equal, refused, none (no such layout) or silent."""
    words: str = ""


def try_cell(tiny: Tiny, layout: str, folder: Path) -> Cell:
    """Merge a base and two experts; compare with the merge by hand of what transformers loads."""
    folders = [folder / name for name in ("base", "one", "two")]
    base = build(tiny)
    if not LAYOUTS[layout](tiny, [base, moved(base, 1), moved(base, 2)], folders):
        return Cell("none")
    loaded = [load(tiny, f) for f in folders]
    try:
        state = MergeState.create(folder / "state", base=folders[0], rule="average").add(*folders[1:])
    except ModelError as error:
        return Cell("refused", str(error))
    merged = load(tiny, state.export(folder / "merged"))
    wanted = by_hand(loaded)
    off = max(
        float((tensor.double() - wanted[name]).abs().max()) for name, tensor in merged.state_dict().items()
        if tensor.is_floating_point()
    )  # fmt: skip
    reference = copy.deepcopy(merged)
    reference.load_state_dict(wanted)
    same = torch.allclose(logits(merged), logits(reference), rtol=1e-4, atol=1e-5) and off < 1e-6
    moves = not torch.allclose(logits(merged), logits(loaded[0]), rtol=1e-2, atol=1e-3)
    return Cell("equal" if same and moves else "silent", f"weights are {off:.1e} off; moved: {moves}")


def by_hand(loaded: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the average of the experts, weight by weight in float64."""
    states = [model.state_dict() for model in loaded]
    return {
        name: sum(s[name].double() for s in states[1:]) / (len(states) - 1) if value.is_floating_point() else value
        for name, value in states[0].items()
    }  # pyright: ignore
