"""The recipes of recipes/, at toy scale: their models and datasets are replaced, all other fields are theirs."""

import random
import string
from pathlib import Path
from typing import Any

from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe
from toys import ROOT
from toys.models import TEXT, perturbed, toy_llama, write_jsonl

RECIPES = ROOT / "recipes"
ROWS, HELDOUT = 24, 3
PAIRS = {"trl-lib/ultrafeedback_binarized"}
"""Datasets that have pairs of answers."""


def toy_recipe(name: str, home: Path, *overrides: str, stages: int | None = None) -> Recipe:
    """Return a recipe with toys for its models and datasets, of which `home` gets the files, or its first stages."""
    recipe = load_recipe(RECIPES / f"{name}.yml", overrides)
    values = recipe.model_dump()
    if not (home / "base").exists():
        toy_llama(home / "base", seed=0)
        perturbed(home / "base", home / "instruct", seed=1, size=0.003)
    models = {recipe.base_model: "base"}
    values["base_model"] = str(home / "base")
    values["evaluate"] |= {"general_tasks": [_choice(home)], "batch_size": 8}
    values["stages"] = values["stages"][:stages]
    values["train"]["warmup_steps"] = 0  # a toy stage is a step or two, and the first of a warmup moves nothing
    for i, stage in enumerate(values["stages"]):
        for field in ("expert", "minus"):
            if stage[field]:
                stage[field] = str(home / models.get(stage[field], "instruct"))
        stage["tasks"] = ()  # lm-eval's own need the network
        if stage["dataset"]:
            dataset = recipe.stages[i].dataset
            assert dataset
            path = write_jsonl(home / f"{name}-{stage['name']}.jsonl", rows_for(dataset, seed=i))
            stage["dataset"] |= {"path": str(path), "heldout": HELDOUT}
    return parse_recipe(values)


def rows_for(dataset: Dataset, *, seed: int) -> list[dict[str, Any]]:
    """Return rows in the columns that a dataset entry asks for, long enough for it."""
    draw, words = random.Random(seed), TEXT.split()

    def say() -> str:
        text = " ".join(draw.choices(words, k=12))
        while len(text) < (dataset.min_chars or 0):
            text += " " + " ".join(draw.choices(words, k=12))
        return text

    def talk() -> list[dict[str, str]]:
        return [{"role": "user", "content": "what lays eggs"}, {"role": "assistant", "content": say()}]

    if dataset.path in PAIRS:
        return [{"chosen": talk(), "rejected": talk()} for _ in range(ROWS)]
    if dataset.messages:
        return [{dataset.messages: talk()} for _ in range(ROWS)]
    fields = [field for _, field, _, _ in string.Formatter().parse(dataset.text or "") if field]
    columns = fields or [dataset.text or "text"]
    return [{c: draw.randrange(4) if "label" in c else say() for c in columns} for _ in range(ROWS)]


def _choice(home: Path) -> dict[str, Any]:
    rows = [{"query": "the quick", "choices": ["brown", "fox", "red"], "gold": i % 3} for i in range(6)]
    path = write_jsonl(home / "choice.jsonl", rows)
    return {"name": "choice", "kind": "multiple_choice", "dataset": str(path)}
