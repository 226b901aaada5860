"""Continual merging as a callback for Trainer, SFTTrainer, DPOTrainer ...

    from hf_contmerge import ContinualMergeCallback

    callback = ContinualMergeCallback("state", base="owner/base", rule="magmax", export="merged", tasks=["arc_easy"])
    trainer = SFTTrainer(model, args=SFTConfig("runs/law", ...), train_dataset=law, callbacks=[callback])
    trainer.train()

When training ends, the model is added to the state as the expert `law`, and all stages so far are merged into
`merged/law`. The scores of the tasks, with learning and forgetting, go to STATE/stages/law/scores.json, to the
trainer's log history and to its trackers. The next stage's script uses `runs/code` and the same state. It starts from
the base, from the expert, or from merged/law.

TRL's MergeModelCallback mixes each checkpoint with one other model through mergekit. This callback keeps a running
state at constant cost per stage, supports every rule of this package, merges adapters directly, runs all checks before
the first step, and measures the result.
"""

from __future__ import annotations

import logging
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from hf_contmerge.errors import RecipeError, ResourceError, RunError, shell_word, size
from hf_contmerge.loop._history import StageScores, table
from hf_contmerge.loop._record import Recorder
from hf_contmerge.loop.functions import evaluate_of, open_state, tasks_of, write_tasks
from hf_contmerge.loop.plan.disk import model_bytes, running_bytes
from hf_contmerge.loop.stages import Measuring, measure_at
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.layout import check_layout
from hf_contmerge.models.loading import runs_own_code
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.files import remove
from hf_contmerge.runtime.ranks import find_ranks
from hf_contmerge.runtime.records import write_record
from hf_contmerge.runtime.refusals import free_bytes
from hf_contmerge.runtime.versions import check_versions
from hf_contmerge.training.job import ModelName
from hf_contmerge.training.saving import refuse_shared_weights, trained_dtype, write_adapter, write_expert
from hf_contmerge.training.settings import in_halves

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Stage:
    """A stage in training."""

    name: str
    state: MergeState
    crew: Crew
    tasks: Sequence[Task]
    evaluate: Evaluate
    trusted: bool
    """Whether the model runs code of its own, which its user has allowed."""

    @property
    def folder(self) -> Path:
        return self.state.folder / "stages" / self.name

    @property
    def scores(self) -> StageScores:
        return StageScores(self.state.folder)


class ContinualMergeCallback(TrainerCallback):
    """Merges a trainer's model into a state; measures both.

    Args:
        state: folder of the state; created if missing.
        base: the pretrained model. Required for the first stage.
        rule: magmax, opcm, average ... Required for the first stage.
        stage: name of the stage (default: the last part of the trainer's `output_dir`).
        export: parent folder for the merged models, one folder per stage name.
        tasks: tasks to measure, as in `score_stage`. Tasks of earlier stages are measured again.
        score: settings of `score_stage`: tasks_folder, trust_remote_code, limit, batch_size, max_length, dtype.
        parameters: parameters of the rule (`lambda` is written `lambda_`).

    Errors are raised when training begins: an unknown rule or task, a model with other names or shapes than the base,
    an adapter without a merge, an existing stage. Weights sharded by DeepSpeed or FSDP1 are refused; FSDP2, DDP and a
    single process are supported.
    """

    def __init__(
        self,
        state: ModelName,
        *,
        base: ModelName | None = None,
        rule: str | None = None,
        stage: str | None = None,
        export: ModelName | None = None,
        tasks: Sequence[str | Mapping[str, Any] | Task] = (),
        score: Mapping[str, Any] | None = None,
        **parameters: Any,
    ) -> None:
        self._folder, self._base, self._rule, self._name = Path(state), base, rule, stage
        self._export = Path(export) if export else None
        fields = dict(score or {})
        folder = fields.pop("tasks_folder", None)
        self._trusted = bool(fields.pop("trust_remote_code", False))
        self._evaluate = evaluate_of(fields, folder)
        self._tasks, self._parameters = tasks_of(tasks), parameters
        self._stage: _Stage | None = None

    def on_train_begin(
        self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Run all checks and measure the base."""
        crew = Crew(ranks=find_ranks())
        crew.ranks.all(refuse_shared_weights)
        check_versions(crew.ranks)
        with _states_restored():
            opened = open_state(
                self._folder, base=self._base, rule=self._rule, parameters=self._parameters, crew=crew
            )  # fmt: skip
            name = self._name or Path(str(args.output_dir)).name
            crew.ranks.first(self._check_free, name, opened)
            base = opened.base()
            plain = extract_model_from_parallel(model)
            _check_model(plain, opened, base, crew)
            _warn_of_halves(plain, name, crew)
            crew.ranks.first(self._check_disk, plain, opened, base)
            scores = StageScores(self._folder)
            tasks, how = crew.ranks.first(scores.settings, self._tasks, self._evaluate)
            self._stage = _Stage(name, opened, crew, tasks, how, runs_own_code(plain))
            self._measure(self._stage, base.folder, scores.base)
            crew.ranks.first(scores.keep_settings, tasks, how)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Save, merge and measure the expert; log scores."""
        assert self._stage
        stage, crew = self._stage, self._stage.crew
        plain = extract_model_from_parallel(model)
        processing = kwargs.get("processing_class")
        expert = write_expert(Place(stage.folder), plain, processing, stage.state.base().folder, crew.ranks)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        stage.state.add(expert, stages=[stage.name], crew=crew)
        merged = self._export / stage.name if self._export else stage.folder / ".merged"
        if self._export or stage.tasks:
            crew.ranks.first(lambda: remove(stage.folder / ".merged"))
            stage.state.export(merged, crew=crew)
        self._measure(stage, expert, stage.scores.expert(stage.name))
        self._measure(stage, merged, stage.scores.merged(stage.name))
        if crew.ranks.is_main:
            remove(stage.folder / ".merged")
            if stage.tasks:
                _log_scores(stage, args, state, control, plain)
        crew.ranks.barrier()

    def _check_free(self, name: str, opened: MergeState) -> None:
        """Raise an error for a bad or taken name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise RecipeError(f"{name!r} is not a valid stage name. Set `stage` to letters, digits, `.`, `_` and `-`.")
        if name in [e.stage for e in opened.log().experts]:
            raise RunError(
                f"{self._folder} already has a stage {name}. Choose another `stage` (or output_dir), or drop the old "
                f"one first: contmerge merge drop {shell_word(self._folder)} {name}"
            )
        out = self._export / name if self._export else None
        if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(
                f"The folder for the merged model, {out}, is not empty. Remove it, or choose another `export`."
            )

    def _check_disk(self, model: Any, opened: MergeState, base: Weights) -> None:
        """Raise ResourceError if the disk is too small."""
        expert = 0 if hasattr(model, "peft_config") else sum(p.numel() * p.element_size() for p in model.parameters())
        need = expert + running_bytes(base, opened.rule()) + model_bytes(base, None)
        free = free_bytes(self._folder)
        if need > free:
            raise ResourceError(
                f"When training ends, this stage writes {size(need)} to {self._folder}, but {size(free)} are free. "
                "Free some space, or put the state on another disk."
            )

    def _measure(self, stage: _Stage, model: Path, place: Place) -> None:
        """Measure a model's missing tasks. All ranks call this."""
        if not stage.tasks:
            return
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            trusted, ranks = self._trusted, stage.crew.ranks
            ranks.main_first(lambda: write_tasks(stage.tasks, folder, stage.evaluate, trust_remote_code=trusted))
            recorder = Recorder(self._folder, PartialState(), stage.crew, quiet=True)
            base = stage.state.base().folder
            how = Measuring(stage.evaluate, folder, base, recorder, trust_remote_code=trusted)
            measure_at(place, model, stage.tasks, how)


def _check_model(model: Any, state: MergeState, base: Weights, crew: Crew) -> None:
    """Raise ModelError for an unmergeable model or adapter."""
    if not hasattr(model, "peft_config"):
        crew.ranks.all(check_layout, model, base)
        return
    log = state.log()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_adapter(model, Path(scratch) / "adapter", crew.ranks)
        names = {log.base, log.base_folder}
        crew.ranks.first(lambda: open_expert(folder, base, base_names=names) and None)


def _warn_of_halves(model: Any, name: str, crew: Crew) -> None:
    """Warn of training weights of 16 bits."""
    dtype = trained_dtype(model)
    if dtype.itemsize == 2 and crew.ranks.is_main:
        LOG.warning(in_halves(f"stage {name}", str(dtype).removeprefix("torch.")))


def _log_scores(
    stage: _Stage, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any
) -> None:
    """Write scores.json; log the scores to history and trackers."""
    stages = [e.stage for e in stage.state.log().experts]
    summary = stage.scores.summary(stages, stage.evaluate.same_within)
    write_record(stage.folder / "scores.json", summary)
    for line in table(summary):
        LOG.info("%s: %s", stage.name, line)
    logs = {
        f"{stage.name}/{model_name}/{task}": score["value"]
        for model_name, scores in summary["scores"].items()
        for task, score in scores.items()
    }
    state.log_history.append({**logs, "step": state.global_step})
    for kind in get_reporting_integration_callbacks(args.report_to):
        tracker = kind()  # the trainer's own trackers are closed; a new one resumes their run
        if isinstance(tracker, TensorBoardCallback):
            tracker.logging_dir = tracker.logging_dir or _newest_events(Path(str(args.output_dir)))
        tracker.on_log(args, state, control, model=model, logs=dict(logs))
        if isinstance(tracker, TensorBoardCallback):
            tracker.on_train_end(args, state, control)


def _newest_events(folder: Path) -> str:
    """Return the folder of a training's TensorBoard events."""
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    return str(files[-1].parent if files else folder / "runs")


@contextmanager
def _states_restored() -> Iterator[None]:
    """Restore random states and accelerate's state."""
    plain, arrays, shared = random.getstate(), np.random.get_state(), dict(AcceleratorState._shared_state)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(plain)
    np.random.set_state(arrays)
    AcceleratorState._shared_state.update(shared)
