"""The points of a training's loss curve, equal after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from hf_contmerge.runtime.files import sync_files
from hf_contmerge.runtime.progress import StepProgress
from hf_contmerge.runtime.stopping import asked_to_stop
from hf_contmerge.training._checkpoints import keep_checkpoint, seal_checkpoint

Point = Mapping[str, float]
OnLog = Callable[[int, Point], None]
"""Called on the main process with the number of steps taken in this stage, and what was logged at that step."""

_OF_THE_PROCESS = ("num_tokens", "train_loss")  # counted since it started, which a resumed run did later
_OF_THE_MACHINE = ("runtime", "per_second", "step_time")


def curve(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a trainer's log without values of one process or machine."""
    points = ({k: v for k, v in entry.items() if not _differs(k)} for entry in log)
    return [point for point in points if any("loss" in key for key in point)]


def _differs(key: str) -> bool:
    return key in _OF_THE_PROCESS or (key.endswith(_OF_THE_MACHINE) and not key.startswith("loss_"))  # of a source


class KeepEarlier(TrainerCallback):
    """Keeps checkpoints of some steps for a guard, evenly over the training."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count

    def _is_kept(self, state: TrainerState) -> bool:
        parts = range(1, self._count + 1)
        steps = {round(state.max_steps * part / (self._count + 1)) for part in parts}
        return 0 < state.global_step < state.max_steps and state.global_step in steps

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._is_kept(state):
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero and self._is_kept(state):
            keep_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._folder)


class TrainingLog(TrainerCallback):
    """Passes points on, with equal logs for resumed runs.

    A mean over the steps since the last log cannot be taken up in the middle, so a step with a checkpoint is logged
    too; and the last one, so that there is always a loss to record.

    When asked to stop, training ends with a checkpoint, unless `save_strategy` is `no`.
    """

    def __init__(self, on_log: OnLog, *, last_checkpoint: bool) -> None:
        """`last_checkpoint`: write one after the last step."""
        self._on_log, self._last_checkpoint = on_log, last_checkpoint
        self._progress: StepProgress | None = None

    def on_train_begin(self, _args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._progress = StepProgress(state.max_steps, state.global_step, state.num_input_tokens_seen)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if asked_to_stop():
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO
        if last and not self._last_checkpoint:
            control.should_save = False
        if control.should_save or last:
            control.should_log = True
        if self._progress:
            self._progress.step(state.global_step)

    def on_save(self, args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # the other ranks' random states
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            sync_files(Path(args.output_dir))

    def on_epoch_end(self, _args: Any, _state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save:
            control.should_log = True

    def on_log(
        self, _args: Any, state: TrainerState, _control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not self._progress or not logs or "loss" not in logs:
            return
        self._progress.tell(state.global_step, float(logs["loss"]), state.num_input_tokens_seen)
        numbers = {k: float(v) for k, v in logs.items() if isinstance(v, int | float) and k not in _OF_THE_PROCESS}
        self._on_log(state.global_step, numbers)

    def on_train_end(self, _args: Any, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._progress:
            self._progress.close()
            self._progress = None
