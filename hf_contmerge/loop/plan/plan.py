"""The plan of a run: checks and costs."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_contmerge.errors import ContmergeError, size
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Recipe, Train

if TYPE_CHECKING:
    from hf_contmerge.loop.plan.estimates import Subject

_CURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gradient_checkpointing: true", {"gradient_checkpointing": True}),
    ("per_device_train_batch_size: 1", {"gradient_checkpointing": True, "per_device_train_batch_size": 1}),
    ("strategy: lora", {"strategy": ("lora",), "parameters": {}}),
    (
        "strategy: lora with per_device_train_batch_size: 1",
        {
            "strategy": ("lora",),
            "parameters": {},
            "gradient_checkpointing": True,
            "per_device_train_batch_size": 1,
        },
    ),
)
"""Settings for a smaller training, cheapest first."""


T = TypeVar("T")


@dataclass
class Findings:
    """Errors and notes, collected to report all at once."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ask(self, do: Callable[[], T]) -> T | None:
        """Call a function; collect a user error."""
        try:
            return do()
        except ContmergeError as error:
            if str(error) not in self.errors:
                self.errors.append(str(error))
            return None


def make_plan(run: Run, findings: Findings, *, processes: int | None = None) -> dict[str, Any]:
    """Check a run and estimate its phases.

    Returns:
        Machine, phases and totals, for JSON; empty if errors prevent estimates.
    """
    import psutil

    from hf_contmerge.loop.plan._machine import measure_speeds, this_machine
    from hf_contmerge.loop.plan.estimates import Estimates, costs
    from hf_contmerge.run.steps import run_steps

    with tempfile.TemporaryDirectory() as scratch:
        count = processes or _processes(run.recipe)
        subject = _checked(run, findings, Path(scratch), count)
        if subject is None:
            return {}
        _load_libraries()
        start = psutil.Process().memory_info().rss  # this process has loaded a run's libraries
        machine, speeds = this_machine(run.folder), measure_speeds(run.folder)
        estimates = Estimates(subject, machine, speeds, start=start, processes=count)
        found = findings.ask(lambda: list(costs(estimates, list(run_steps(run, subject.kinds)))))
        if found is None:
            return {}
        if run.recipe.tunes:
            findings.notes.append(
                "Attempts of a guard or an `auto` parameter are not included: each writes a merged model next to the "
                "merge and scores it on the validation slices."
            )
        _judge(found, machine, run, findings)
        _suggest(found, machine, estimates, subject, findings)
        return _as_json(found, machine, count, run)


def _checked(run: Run, findings: Findings, scratch: Path, processes: int) -> Subject | None:
    """Run all checks; return None after an error."""
    from hf_contmerge.loop.plan.checks import Circumstances, Prepared, checks
    from hf_contmerge.loop.plan.estimates import Subject
    from hf_contmerge.models.headers import needs_converting, resolve_headers

    found, tasks = Prepared(), scratch / "tasks"
    resolve = functools.partial(resolve_headers, scratch=scratch / "models")
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    how = Circumstances(tasks, processes, per_machine, plans=True, resolve=resolve)
    for check in checks(run, found, how):
        findings.ask(check)
    base = run.recipe.base_model
    if needs_converting(base):
        findings.notes.append(
            f"{base} is a GGUF file: the run first converts it to bfloat16, once, in the Hub's cache."
        )
    if findings.errors:
        return None
    return Subject(run, found.base, found.rules, found.kinds, found.given, found.data, tasks)


def _processes(recipe: Recipe) -> int:
    """Return the job's number of processes."""
    import torch

    from hf_contmerge.runtime.device import cpu_only

    one = recipe.evaluate.backend == "vllm" or recipe.evaluate.parallel == "layers"
    return int(os.environ.get("WORLD_SIZE", "0")) or (1 if one or cpu_only() else max(1, torch.cuda.device_count()))


def _load_libraries() -> None:
    """Import the libraries of training and scoring."""
    from trl.trainer.sft_trainer import SFTTrainer

    from hf_contmerge.scoring.tasks import load_libraries

    load_libraries()
    assert SFTTrainer


# Limits


def _judge(found: Sequence[Any], machine: Any, run: Run, findings: Findings) -> None:
    """Add errors for merging, scoring and disk."""
    from hf_contmerge.loop.plan.disk import peak_disk

    for phase, cure in (("merge", "fewer threads"), ("score", "a smaller evaluate.batch_size")):
        costs = [c for c in found if c.step.phase == phase]
        worst = max(costs, key=lambda c: c.memory, default=None)
        if worst and worst.memory > machine.memory:
            findings.errors.append(
                f"The {phase} phase needs about {size(worst.memory)} of memory ({_place(worst, run)}), but this "
                f"machine has {size(machine.memory)}. Use {cure}, a smaller model or a larger machine."
            )
    need = peak_disk(c.disk for c in found)[1]
    if need > machine.disk:
        findings.errors.append(
            f"This run still needs {size(need)} in {run.folder}, but {size(machine.disk)} are free. Free some space, "
            "choose another disk with --run, set train.save_strategy: 'no', or use fewer merge entries."
        )
    most = max((c.memory for c in found), default=0)
    if machine.available < most <= machine.memory:
        findings.notes.append(
            f"The run needs up to {size(most)} of memory, but only {size(machine.available)} are free now: close "
            "other programs first."
        )


def _suggest(found: Sequence[Any], machine: Any, estimates: Any, subject: Any, findings: Findings) -> None:
    """Add an error for training, with smaller settings."""
    limits = (machine.memory, min(machine.gpus, default=2**62))
    worst = max((c for c in found if c.step.phase == "train"), key=lambda c: (c.vram, c.memory), default=None)
    if worst is None or (worst.memory <= limits[0] and worst.vram <= limits[1]):
        return
    stage = subject.run.stage(worst.step.t)
    fits = None
    for words, changes in _CURES:
        smaller = Train.model_validate({**subject.recipe.train_of(stage).model_dump(), **changes})
        memory, vram = estimates.training_memory(stage.name, smaller)
        if memory <= limits[0] and vram <= limits[1]:
            fits = f"With `{words}` it would need {size(vram or memory)}."
            break
    where = "each GPU's memory" if worst.vram > limits[1] else "memory"
    need, have = (worst.vram, limits[1]) if worst.vram > limits[1] else (worst.memory, limits[0])
    findings.errors.append(
        f"Training stage {stage.name} needs about {size(need)} of {where}, but this machine has {size(have)}. "
        + (fits or "No setting makes it fit: use a smaller model, or several GPUs with FSDP2, which shards it.")
    )


# JSON


def _place(cost: Any, run: Run) -> str:
    return str(cost.step.place.folder.relative_to(run.folder / "stages"))


def _as_json(found: Sequence[Any], machine: Any, processes: int, run: Run) -> dict[str, Any]:
    from hf_contmerge.loop.plan.disk import peak_disk

    kept, most = peak_disk(c.disk for c in found)
    return {
        "machine": {"cores": machine.cores, "memory_bytes": machine.memory, "gpu_bytes": list(machine.gpus),
                    "free_disk_bytes": machine.disk, "processes": processes},
        "phases": [
            {"phase": c.step.phase, "stage": c.step.t, "place": _place(c, run), "memory_bytes": c.memory,
             "gpu_bytes": c.vram, "disk_kept_bytes": c.disk.kept, "disk_at_work_bytes": c.disk.at_work,
             "seconds": round(c.seconds, 2)}
            for c in found
        ],
        "total": {"memory_bytes": max((c.memory for c in found), default=0),
                  "gpu_bytes": max((c.vram for c in found), default=0),
                  "disk_kept_bytes": kept, "disk_peak_bytes": most,
                  "seconds": round(sum(c.seconds for c in found), 1)},
    }  # fmt: skip
