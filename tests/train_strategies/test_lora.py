"""Settings of peft's LoRA: what could not be merged, or would be another function once it is folded in, is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.models import toy_llama
from transformers import AutoModelForCausalLM

from hf_contmerge.train_strategies import get_strategy
from hf_contmerge.train_strategies._weights import trained


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"keep": True, "init_lora_weights": "pissa_niter_4"},
            "init_lora_weights pissa_niter_4 starts from a changed b",
        ),
        ({"keep": True, "init_lora_weights": "olora"}, "init_lora_weights olora starts from a changed base"),
        ({"keep": True, "use_qalora": True}, "use_qalora makes an adapter that cannot be merged: it pools its inputs"),
        (
            {"alora_invocation_tokens": [5]},
            "alora_invocation_tokens makes an adapter that cannot be merged: it acts on",
        ),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication makes an adapter that cannot be merged: it makes"),
    ],
)
def test_adapters_that_could_not_be_merged_are_not_trained(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        get_strategy("lora", **fields)
    if "init_lora_weights" in fields:
        get_strategy("lora", **{**fields, "keep": False})


ONE_TABLE = "the token embedding and the head are one table here"
"""A LoRA of the embedding alone would be folded into the head too: another function than the one that was trained."""


@pytest.mark.parametrize(
    ("tied", "fields", "message"),
    [
        (True, {"target_modules": ["embed_tokens", "q_proj"]}, ONE_TABLE),
        (True, {"target_modules": ["lm_head"]}, ONE_TABLE),
        (True, {"modules_to_save": ["lm_head"]}, ONE_TABLE),
        (True, {"trainable_token_indices": [1, 2]}, ONE_TABLE),
        (True, {"trainable_token_indices": [1, 2], "ensure_weight_tying": True}, ONE_TABLE),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}, None),
        (False, {"target_modules": ["embed_tokens", "q_proj"]}, None),
        (False, {"trainable_token_indices": [1, 2]}, None),
        (False, {"trainable_token_indices": {"lm_head": [1, 2]}}, "trainable_token_indices cannot be of the head"),
        (
            False,
            {"lora_bias": True, "target_modules": ["q_proj"]},
            "lora_bias needs layers with a bias to fold it into",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tables_of_a_lora(tied: bool, fields: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    """Refused before any work; what is left is the function that was trained."""
    base = toy_llama(tmp_path / "base", seed=0, tied=tied)
    strategy, model = get_strategy("lora", **fields), AutoModelForCausalLM.from_pretrained(base)
    if message:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(model.config)
        for opening in (empty, model):
            with pytest.raises(ValueError, match=message):
                strategy.open(opening, None)
        return
    opened = strategy.open(model, None).eval()
    with torch.no_grad():
        for _, weight in trained(opened):
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
        ids = torch.arange(4, 20).unsqueeze(0)
        learnt = opened(input_ids=ids).logits
        strategy.close(opened).save_pretrained(tmp_path / "expert")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "expert")(input_ids=ids).logits
    torch.testing.assert_close(found, learnt, rtol=1e-4, atol=1e-4)
    files = [load_file(folder / "model.safetensors").keys() for folder in (base, tmp_path / "expert")]
    assert files[0] == files[1]
