"""A model that knows its text, and experts that have been moved away from it: merges that forget by a known amount."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toys.models import TEXT, perturbed, toy_llama, write_jsonl

Data = dict[str, Any]
QUIET = 1e-7  # of an expert that changes nothing that can be seen
LOUD = 0.06  # of one that forgets what it knew
DEAF = 0.5  # of one of which an eighth is loud


def learned(folder: Path) -> Path:
    """Write a small model that was trained on TEXT for a hundred steps; return its folder."""
    toy_llama(folder, seed=0, layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def moved(start: Path, out: Path, toward: Path, *, by: float) -> Path:
    """Write start + by * (toward - start)."""
    model, goal = (AutoModelForCausalLM.from_pretrained(f) for f in (start, toward))
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), goal.parameters(), strict=True):
            parameter.lerp_(other, by)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(start).save_pretrained(out)
    return out


def make_home(home: Path) -> Path:
    """Write what the recipes below name: a base, experts, texts."""
    base = learned(home / "base")
    perturbed(base, home / "quiet", seed=1, size=QUIET)
    perturbed(base, home / "quiet2", seed=2, size=QUIET)
    perturbed(base, home / "loud", seed=3, size=LOUD)
    perturbed(base, home / "deaf", seed=4, size=DEAF)
    lines, draw = TEXT.strip().splitlines(), random.Random(0)
    for name in ("known", "own", "other"):
        starts = [(draw.choice(lines), draw.randrange(40)) for _ in range(24)]
        write_jsonl(home / f"{name}.jsonl", [{"text": f"{line[at : at + 60]}"} for line, at in starts])
    return home


def task(home: Path, name: str) -> Data:
    return {"name": name, "kind": "perplexity", "dataset": str(home / f"{name}.jsonl")}


def recipe(home: Path, *experts: str, **fields: Any) -> Data:
    """Return a recipe of given experts; the first stage is measured on `own`, the second on `other`."""
    stages: list[Data] = [{"name": f"s{i}", "expert": str(home / e)} for i, e in enumerate(experts, 1)]
    for stage, name in zip(stages, ("own", "other"), strict=False):
        stage["tasks"] = [task(home, name)]
    return {
        "name": "guarded", "base_model": str(home / "base"), "stages": stages,
        "merge": [{"rule": "task_arithmetic", "parameters": {"lambda": 1.0}}],
        "evaluate": {"general_tasks": [task(home, "known")], "validation": 0.5, "dtype": "float32", "batch_size": 16},
        **fields,
    }  # fmt: skip
