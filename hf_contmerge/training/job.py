"""A training job, and a stage's training outside a run.

An expert's folder has a folder `contmerge` with the record (train.json) and the strategies' memory; it appears whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from hf_contmerge.errors import DataError, ModelError, RecipeError
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.folder import is_adapter, resolve_model
from hf_contmerge.models.layout import check_loads, check_same_layout, check_tokenizer
from hf_contmerge.models.lora.settings import read_settings
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Recipe, Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.train_strategies import Combined
from hf_contmerge.training._forms import fit_rows, rows_of
from hf_contmerge.training._rows import Rows
from hf_contmerge.training.data import StageData, load_stage_data, stage_data_of
from hf_contmerge.training.general import with_general
from hf_contmerge.training.limits import TrainerLimits, trainer_limits
from hf_contmerge.training.settings import check_positions, data_checks, make_strategies, training_checks

ModelName = str | os.PathLike[str]
"""A folder, a Hub id (owner/model, owner/model@revision), a .gguf file, or a TrainedExpert."""
Data = str | os.PathLike[str] | Mapping[str, Any] | datasets.Dataset
"""A file or Hub id, the fields of a recipe's `dataset`, or rows in memory."""

OWN = "contmerge"  # the folder in an expert's folder with what is not the model: the record, the strategies' memory


@dataclass(frozen=True)
class TrainedExpert:
    """The result of `finetune_stage`; stands for its folder as a model name."""

    folder: Path
    base: Path
    """The pretrained model, by whose name and shapes experts are merged."""
    loss: float | None
    """Of the last step that was logged."""
    steps: int
    examples: int
    tokens: int | None
    memory: Path | None
    """What its strategies keep for the stages to come (replay's examples, ...), if anything."""
    stage: int = 1
    """How many stages were trained one after the other, up to this one."""

    def __fspath__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class TrainJob:
    """An expert to train."""

    start: Path
    """The model to start from, or an adapter of the base."""
    base: Path
    """The pretrained model; its config and tokenizer go with the expert."""
    data: StageData
    train: Train
    """Strategy and SFTConfig fields."""
    seed: int = 0
    """Of the data order and dropout."""
    memory: Path | None = None
    """What the strategies kept of earlier stages."""
    remembers: bool = True
    """Keep what the strategies of later stages need."""
    trust_remote_code: bool = False
    stage: int = 1
    """The stage's number."""
    keep: int = 0
    """Checkpoints to keep for a guard, evenly over the stage."""
    others: tuple[StageData, ...] = ()
    """All stages; none of their held-out documents is in a replay that the start model writes."""
    written: StageData | None = None
    """Documents that the start model wrote (synthesis.py)."""
    make: Callable[[Train], Combined] = make_strategies
    """Makes the strategies; by default those of the registry."""

    def inputs(self) -> dict[str, Any]:
        """Return the inputs behind the expert, for its record."""
        start = expert_sha256(self.start)
        base = start if self.start == self.base else expert_sha256(self.base)
        return {"start_sha256": start, "base_sha256": base, **self.settings()}

    def settings(self) -> dict[str, Any]:
        """Return the inputs without the models."""
        general = self.data.general
        return {
            "examples_sha256": rows_sha256(self.data.train),
            **({"general_sha256": rows_sha256(general.train)} if general else {}),
            **({"heldout_sha256": held} if (held := self._excluded()) else {}),
            "remembers": self.memory is not None,
            "seed": self.seed,
            "train": self.train.model_dump(mode="json"),
        }

    def _excluded(self) -> list[str]:
        """Return the digests of held-out documents, barred from replay."""
        stages = (self.data, *self.others) if self.make(self.train).synthesis() else ()
        return sorted({rows_sha256(stage.heldout) for stage in stages})


def recipe_of(
    data: Data, strategy: str | Sequence[str], parameters: Mapping[str, Any], seed: int, training: Mapping[str, Any]
) -> Recipe:
    """Return the recipe of one stage, for the same error messages."""
    fields = dict(training)
    if fields.get("report_to") not in (None, "none", [], ["none"]):
        raise RecipeError(
            "finetune_stage.report_to: a function has no tracker run, which spans all stages. Log the record's `log` "
            "yourself, or use `contmerge run` with `report_to`."
        )
    code = fields.pop("trust_remote_code", False)
    names = strategy if isinstance(strategy, str) else list(strategy)
    spec = {"path": os.fspath(data)} if isinstance(data, str | os.PathLike) else data
    spec = {"path": "data"} if isinstance(spec, datasets.Dataset) else spec
    return parse_recipe(
        {
            "name": "stage", "base_model": "model", "seed": seed, "trust_remote_code": code, "merge": ["average"],
            "stages": [{"name": "stage", "dataset": {"heldout": 0, **spec}}],
            "train": {**fields, "strategy": names, "parameters": dict(parameters)},
        },
        where="finetune_stage",
    )  # fmt: skip


def look_up(recipe: Recipe, model: ModelName, data: Data, base: ModelName | None) -> TrainJob:
    """Find and check a stage's models and data. Raises as `finetune_stage`."""
    start = resolve_model(os.fspath(model), adapters=True)
    before = model if isinstance(model, TrainedExpert) else None
    known, memory, stage = (before.base, before.memory, before.stage + 1) if before else (None, None, 1)
    pretrained = resolve_model(os.fspath(base)) if base else known or base_of(start)
    check_tokenizer(pretrained)
    check_loads(pretrained, trusted=recipe.trust_remote_code)
    if not is_adapter(start) and start != pretrained:
        check_same_layout(pretrained, start)
    _check_kept_adapter(recipe.train, start, pretrained)
    for check in training_checks(recipe.train, pretrained):
        check()
    spec = recipe.stages[0].dataset
    assert spec
    limits = trainer_limits(recipe.train, pretrained, trust_remote_code=recipe.trust_remote_code)
    examples = _in_memory(data, spec, recipe.seed, limits) if isinstance(data, datasets.Dataset) else None
    examples = examples or load_stage_data(spec, seed=recipe.seed, limits=limits)
    examples = with_general(examples, recipe.train, (), seed=recipe.seed, limits=limits)
    for check in data_checks(recipe, {"stage": examples}):
        check()
    check_positions(recipe, {"stage": examples}, pretrained)
    return TrainJob(
        start,
        pretrained,
        examples,
        recipe.train,
        recipe.seed,
        memory,
        stage=stage,
        trust_remote_code=recipe.trust_remote_code,
    )


def base_of(start: Path) -> Path:
    """Return the base of a model: an adapter's own, or itself."""
    if not is_adapter(start):
        return start
    name = read_settings(start).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{start} is an adapter that does not say of which model. Name it with `base`.")
    return resolve_model(name)


def _check_kept_adapter(train: Train, start: Path, base: Path) -> None:
    if make_strategies(train).carrier.keeps_adapter() and not is_adapter(start) and start != base:
        raise RecipeError(
            f"parameters.keep: an adapter trained on {start} is none of the base {base}. Start from the base or from "
            "an adapter of it, or remove `keep`."
        )


def _in_memory(data: datasets.Dataset, spec: Dataset, seed: int, limits: TrainerLimits) -> StageData:
    """Return rows in memory as a stage's data, shuffled like a file's."""
    fit = fit_rows(Rows("data", data), spec, limits)
    if not len(fit.rows):
        raise DataError(f"data has no row to train on: of {len(data)}, all lack something.")
    return stage_data_of(fit, spec, seed=seed, limits=limits)


def rows_sha256(rows: datasets.Dataset) -> str:
    """Return the digest of examples in any order."""
    each = (hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest() for row in rows_of(rows))
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()
