"""Tiny real models and files, made in well under a second each."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from hf_contmerge.testing.toys import BOS as BOS
from hf_contmerge.testing.toys import CHATML as CHATML
from hf_contmerge.testing.toys import EOS as EOS
from hf_contmerge.testing.toys import PAD as PAD
from hf_contmerge.testing.toys import SPECIAL as SPECIAL
from hf_contmerge.testing.toys import TEXT as TEXT
from hf_contmerge.testing.toys import toy_llama as toy_llama
from hf_contmerge.testing.toys import toy_tokenizer as toy_tokenizer


def toy_mixture(folder: Path, *, seed: int) -> Path:
    """Write a random Mixtral, whose files hold the experts one by one, with its tokenizer; return the folder."""
    tokenizer = toy_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def perturbed(folder_in: Path, folder_out: Path, *, seed: int, size: float) -> Path:
    """Write the model of `folder_in` plus Gaussian noise of standard deviation `size`: an expert to merge."""
    model = AutoModelForCausalLM.from_pretrained(folder_in, dtype="auto")
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # a tied table comes once
            change = size * torch.randn(parameter.shape, generator=noise)
            parameter.copy_(parameter.float() + change)
    model.save_pretrained(folder_out)
    AutoTokenizer.from_pretrained(folder_in).save_pretrained(folder_out)
    return Path(folder_out)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line; return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
