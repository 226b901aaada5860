"""Tiny models of many architectures, as transformers builds them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers

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


class Tiny(NamedTuple):
    """How to build an architecture: class, configuration, kind."""

    name: str
    """The class in transformers."""
    kind: str
    config: dict[str, Any]
    settings: str = ""
    """Its configuration class, if it is not called like the model."""


DENSE, GROUPED, MIXTURE, HYBRID, PAIR, VISION, CONV1D, MASKED = (
    "dense", "grouped heads", "mixture", "hybrid", "encoder-decoder", "vision-language", "Conv1D", "masked",
)  # fmt: skip

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
    Tiny("GPT2LMHeadModel", CONV1D, {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "GPT2Config"),
    Tiny("GPTBigCodeForCausalLM", DENSE, {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    Tiny("GPTNeoForCausalLM", DENSE, {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 8}),
    Tiny("MixtralForCausalLM", MIXTURE, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny("Qwen2MoeForCausalLM", MIXTURE, {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    Tiny("Qwen3MoeForCausalLM", MIXTURE, {**_EXPERTS, "head_dim": 8}),
    Tiny("OlmoeForCausalLM", MIXTURE, _EXPERTS),
    Tiny("DeepseekV2ForCausalLM", MIXTURE, {**_TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1}),
    Tiny("DeepseekV3ForCausalLM", MIXTURE, {**_TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1}),
    Tiny("GptOssForCausalLM", MIXTURE, {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny("GraniteMoeForCausalLM", MIXTURE, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny("PhimoeForCausalLM", MIXTURE, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny("Llama4ForCausalLM", MIXTURE, {**_GROUPED, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}, "Llama4TextConfig"),
    Tiny("Glm4MoeForCausalLM", MIXTURE, {**_GROUPED, "head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    Tiny("MambaForCausalLM", HYBRID, {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4}),
    Tiny("Mamba2ForCausalLM", HYBRID, {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    Tiny("Lfm2ForCausalLM", HYBRID, {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    Tiny("JambaForCausalLM", HYBRID, {**_GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    Tiny("FalconH1ForCausalLM", HYBRID, {**_GROUPED, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}),
    Tiny("Qwen3NextForCausalLM", HYBRID, {**_EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}),
    Tiny("T5ForConditionalGeneration", PAIR, {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
    Tiny("BartForConditionalGeneration", PAIR, {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}),
    Tiny("WhisperForConditionalGeneration", PAIR, {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}),
    Tiny("BertForMaskedLM", MASKED, _TEXT),
    Tiny("RobertaForMaskedLM", MASKED, {**_TEXT, "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0}),
    Tiny("LlavaForConditionalGeneration", VISION, {"text_config": {"model_type": "llama", **_GROUPED}, "vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": 90, "image_token_id": 90, "vision_feature_layer": -1}),
    Tiny("Gemma3ForConditionalGeneration", VISION, {"text_config": {**_GROUPED, "head_dim": 8}, "vision_config": _VISION, "mm_tokens_per_image": 1, "image_token_index": 90}),
    Tiny("Qwen2VLForConditionalGeneration", VISION, {"text_config": {**_GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}, "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8}, "image_token_id": 90, "tie_word_embeddings": False}),
    Tiny("Qwen3VLForConditionalGeneration", VISION, {"text_config": {**_GROUPED, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True}}, "vision_config": {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 8, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, "image_token_id": 90, "tie_word_embeddings": False}),
    Tiny("Mistral3ForConditionalGeneration", VISION, {"text_config": {"model_type": "mistral", **_GROUPED, "head_dim": 8}, "vision_config": {"model_type": "pixtral", **_VISION}, "image_token_index": 90}),
)  # fmt: skip


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
    if "input_features" in model.forward.__code__.co_varnames:
        bins, frames = model.config.num_mel_bins, 2 * model.config.max_source_positions
        del inputs["input_ids"]
        inputs["input_features"] = torch.randn(2, bins, frames, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(**inputs).logits.double()
