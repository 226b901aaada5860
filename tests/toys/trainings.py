"""Experts trained by strategies in no registry, and the same training in plain torch."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.train_strategies import Combined, TrainStrategy
from hf_contmerge.train_strategies.full import Full
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from toys.models import write_jsonl

Row = dict[str, Any]
Parts = dict[str, TrainStrategy]
RATE, STEPS, ACCUMULATED = 0.05, 4, 2
LIGHT = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": ACCUMULATED, "max_steps": STEPS, "max_length": 32,
    "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1,
    "save_strategy": "no", "gradient_checkpointing": False,
}  # fmt: skip


@dataclass
class Batches(TrainStrategy):
    """Keeps the micro-batches of each step."""

    seen: list[Row] = field(default_factory=list)

    taken: list[list[Row]] = field(default_factory=list)

    def loss(self, model: nn.Module, inputs: Any) -> None:
        self.seen.append({name: value for name, value in inputs.items() if isinstance(value, Tensor)})

    def adjust_weights(self, model: nn.Module) -> None:
        self.taken.append(self.seen[-ACCUMULATED:])  # before these are the ones of a look ahead
        self.seen.clear()


def texts(path: Path) -> StageData:
    """Return examples of several lengths, of which only the completions count."""
    draw, words = random.Random(0), ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    rows = [
        {"prompt": " ".join(draw.choices(words, k=3)), "completion": " ".join(draw.choices(words, k=2 + i % 9))}
        for i in range(60)
    ]
    return load_stage_data(Dataset(path=str(write_jsonl(path, rows)), heldout=2), seed=0)


def pairs(path: Path) -> StageData:
    rows = [{"prompt": f"say {i} ", "chosen": f"fox {i}", "rejected": f"dog {i} {i}"} for i in range(40)]
    return load_stage_data(Dataset(path=str(write_jsonl(path, rows)), heldout=2), seed=0)


@dataclass(frozen=True)
class Training:
    """Trains experts in folders of `home`, each by strategies that are in no registry."""

    home: Path
    base: Path
    data: StageData

    def __call__(self, name: str, parts: Parts, *, data: StageData | None = None, stage: int = 1, **fields: Any) -> Row:
        combined = Combined(parts if any(part.carrier for part in parts.values()) else {"full": Full(), **parts})
        (self.home / name).mkdir(exist_ok=True)
        return train_expert(
            TrainJob(
                start=self.base,
                base=self.base,
                data=data or self.data,
                train=Train(**{**LIGHT, **fields}),
                seed=0,
                stage=stage,
                make=lambda _: combined,
            ),
            self.home / name,
            checkpoints=self.home / f"{name}-checkpoints",
        )

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.home / name / "model.safetensors")

    def bytes(self, name: str) -> bytes:
        return (self.home / name / "model.safetensors").read_bytes()


def tokens_of(model: Any, batch: Row) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log_probs, entropy, is_top1 and counts of a micro-batch from its logits."""
    logits = model(**{n: t for n, t in batch.items() if n != "labels"}, use_cache=False).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    counts = labels != -100
    log_probs = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return log_probs, -(logits.exp() * logits).sum(-1), logits.argmax(-1) == labels, counts


def step_loss(model: Any, batches: list[Row], weigh: Callable[..., Any] = lambda *_: 1.0) -> Tensor:
    """Return a step's loss: weight * nll over the number of tokens that count."""
    total, number = torch.tensor(0.0), 0
    for batch in batches:
        log_probs, entropy, is_top1, counts = tokens_of(model, batch)
        with torch.no_grad():
            weights = weigh(log_probs, entropy, is_top1)
        total = total - (weights * log_probs)[counts].sum()
        number += int(counts.sum())
    return total / number


def assert_near(found: dict[str, Tensor], model: nn.Module, start: dict[str, Tensor]) -> None:
    """The change of each weight is that of the model's, but for rounding."""
    for name, weight in model.named_parameters():
        moved = torch.dist(weight, start[name])
        assert torch.dist(found[name], weight.detach()) <= 1e-4 * moved + 1e-6, name
