"""Tiny real models and files, made in well under a second each."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.testing.toys import TEXT as TEXT
from hf_contmerge.testing.toys import toy_llama as toy_llama
from hf_contmerge.testing.toys import toy_tokenizer as toy_tokenizer


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
