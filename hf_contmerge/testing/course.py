"""Two stages of training on a toy model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.fields import with_fields
from hf_contmerge.testing._watch import Watched
from hf_contmerge.testing.toys import toy_llama
from hf_contmerge.train_strategies import TrainStrategy, combined
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob

STEPS = 6
# A constant rate, or a step too many after resuming would hardly show in the weights.
_SETTINGS = {
    "per_device_train_batch_size": 4, "max_steps": STEPS, "max_length": 32, "learning_rate": 1e-2, "logging_steps": 1,
    "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": STEPS // 2, "save_total_limit": 2,
}  # fmt: skip
_WORDS = {
    1: "the quick brown fox jumps over a lazy dog",
    2: "court may refuse the claim of a party who gave no notice",
}


@dataclass
class Course:
    """A toy model, trained for two stages on first use.

    The folder gets `base`, and of each training its expert (`first`), `first-memory` and `first-checkpoints`.
    """

    home: Path
    classes: Mapping[str, type[TrainStrategy]]
    """By the words of recipes."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """As in recipes: of several strategies, by word."""

    def __str__(self) -> str:
        fields = (f"{name}={value!r}" for name, value in self.parameters.items())
        return " + ".join(self.classes) + (f" ({', '.join(fields)})" if self.parameters else "")

    @cached_property
    def base(self) -> Path:
        folder = self.home / "base"
        return folder if folder.exists() else toy_llama(folder, seed=0)

    @cached_property
    def first(self) -> dict[str, Any]:
        return self.learn(1, "first")

    @cached_property
    def second(self) -> dict[str, Any]:
        assert self.first
        return self.learn(2, "second")

    def parameters_of(self, word: str) -> Mapping[str, Any]:
        """Return the parameters of one strategy."""
        return Train(strategy=tuple(self.classes), parameters=dict(self.parameters)).parameters_of().get(word, {})

    def strategies(self) -> Watched:
        """Return the strategies of one stage."""
        made = {word: with_fields(cls, word, self.parameters_of(word)) for word, cls in self.classes.items()}
        return Watched(combined(made).parts, who=str(self))

    def learn(self, stage: int, name: str) -> dict[str, Any]:
        """Train a stage; delete its dataset. Returns the record."""
        path = write_texts(self.home / f"{name}.jsonl", stage)
        data = texts_of(path)
        record = self.train(stage, name, data)
        path.unlink()
        for file in data.train.cache_files:
            shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
        return record

    def train(self, stage: int, name: str, data: StageData, **fields: Any) -> dict[str, Any]:
        """Train a stage into the folder `name`. `fields`: of SFTConfig."""
        memory = self.home / "first-memory"
        job = TrainJob(
            start=self.home / "first" if stage > 1 else self.base,
            base=self.base,
            data=data,
            train=Train(**{"strategy": tuple(self.classes), **_SETTINGS, **fields}),
            memory=memory if stage > 1 and memory.exists() else None,
            stage=stage,
            make=lambda _: self.strategies(),
        )
        out = self.home / name
        out.mkdir(exist_ok=True)
        return train_expert(
            job, out, checkpoints=self.home / f"{name}-checkpoints", memory_out=self.home / f"{name}-memory"
        )


def write_texts(path: Path, stage: int) -> Path:
    """Write the examples of a stage."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_for(stage)), encoding="utf-8")
    return path


def texts_for(stage: int) -> list[str]:
    """Return the texts of a stage."""
    draw, words = random.Random(stage), _WORDS[stage].split()
    return [" ".join(draw.choices(words, k=20)) for _ in range(40)]


def texts_of(path: Path) -> StageData:
    """Return examples in a file as a stage's data."""
    return load_stage_data(Dataset(path=str(path), heldout=2), seed=0)
