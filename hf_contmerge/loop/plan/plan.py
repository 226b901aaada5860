"""What a run takes: memory, disk and time of each phase on this machine."""

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
    from hf_contmerge.loop.plan._machine import Machine
    from hf_contmerge.loop.plan.estimates import Cost, Estimates, Subject

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
"""What makes training smaller, from what costs least to what costs most."""


T = TypeVar("T")


@dataclass
class Findings:
    """What is wrong, and what is worth knowing; collected, so that all of it is told at once."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ask(self, do: Callable[[], T]) -> T | None:
        """Return what a function returns; keep a user error and return None."""
        try:
            return do()
        except ContmergeError as error:
            if str(error) not in self.errors:
                self.errors.append(str(error))
            return None


def make_plan(run: Run, findings: Findings, *, processes: int | None = None) -> dict[str, Any]:
    """Check a run, and estimate what its phases take; `findings` gets what is wrong.

    Returns:
        machine, phases and totals, for JSON; nothing if too much is wrong for estimates.
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
        start = psutil.Process().memory_info().rss  # this process has loaded what a run loads
        machine, speeds = this_machine(run.folder), measure_speeds(run.folder)
        estimates = Estimates(subject, machine, speeds, start=start, processes=count)
        found = findings.ask(lambda: list(costs(estimates, list(run_steps(run, subject.kinds)))))
        if found is None:
            return {}
        if run.recipe.tunes:
            findings.notes.append(
                "What a guard or an `auto` parameter tries comes on top: each try writes a merged model beside the "
                "merge and scores it on the validation slices."
            )
        _judge(found, machine, run, findings)
        _suggest(found, machine, estimates, subject, findings)
        return _as_json(found, machine, count, run)


def _checked(run: Run, findings: Findings, scratch: Path, processes: int) -> Subject | None:
    """Ask every check of the run; return what was found, or None after an error."""
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
            f"{base} is a GGUF file: the run converts it to bfloat16 first, once, into the Hub's cache."
        )
    if findings.errors:
        return None
    return Subject(run, found.base, found.rules, found.kinds, found.given, found.data, tasks)


def _processes(recipe: Recipe) -> int:
    """Return the processes of the job: those of the launcher; else one a GPU, or one for all of them."""
    import torch

    from hf_contmerge.runtime.device import cpu_only

    one = recipe.evaluate.backend == "vllm" or recipe.evaluate.parallel == "layers"
    return int(os.environ.get("WORLD_SIZE", "0")) or (1 if one or cpu_only() else max(1, torch.cuda.device_count()))


def _load_libraries() -> None:
    """Import what training and scoring import when they begin."""
    from trl.trainer.sft_trainer import SFTTrainer

    from hf_contmerge.scoring.tasks import load_libraries

    load_libraries()
    assert SFTTrainer


# What cannot fit


def _judge(found: Sequence[Cost], machine: Machine, run: Run, findings: Findings) -> None:
    """Add an error for what does not fit this machine: merging, scoring, the disk. Of training, see `_suggest`."""
    from hf_contmerge.loop.plan.disk import peak_disk

    for phase, cure in (("merge", "fewer threads at a time"), ("score", "a smaller evaluate.batch_size")):
        costs = [c for c in found if c.step.phase == phase]
        worst = max(costs, key=lambda c: c.memory, default=None)
        if worst and worst.memory > machine.memory:
            findings.errors.append(
                f"To {phase} takes about {size(worst.memory)} of memory ({_place(worst, run)}), and this machine has "
                f"{size(machine.memory)}. Use {cure}, a smaller model or a larger machine."
            )
    need = peak_disk(c.disk for c in found)[1]
    if need > machine.disk:
        findings.errors.append(
            f"This run still needs {size(need)} in {run.folder} and {size(machine.disk)} are free. Free some, name "
            "another disk with --run, set train.save_strategy: 'no', or use fewer merge entries."
        )
    most = max((c.memory for c in found), default=0)
    if machine.available < most <= machine.memory:
        findings.notes.append(
            f"It takes up to {size(most)} of memory, and only {size(machine.available)} are free now: end other "
            "programs first."
        )


def _suggest(
    found: Sequence[Cost], machine: Machine, estimates: Estimates, subject: Subject, findings: Findings
) -> None:
    """Add an error if training does not fit, with the settings that would make it fit."""
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
            fits = f"With `{words}` it would take {size(vram or memory)}."
            break
    where = "each GPU's memory" if worst.vram > limits[1] else "memory"
    need, have = (worst.vram, limits[1]) if worst.vram > limits[1] else (worst.memory, limits[0])
    findings.errors.append(
        f"To train stage {stage.name} takes about {size(need)} of {where}, and this machine has {size(have)}. "
        + (fits or "No setting makes it fit: use a smaller model, or several GPUs with FSDP2, which share it out.")
    )


# What is shown


def _place(cost: Cost, run: Run) -> str:
    return str(cost.step.place.folder.relative_to(run.folder / "stages"))


def _as_json(found: Sequence[Cost], machine: Machine, processes: int, run: Run) -> dict[str, Any]:
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
