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
    from hf_contmerge.loop.plan._machine import Machine
    from hf_contmerge.loop.plan._planned import Host, PlannedRun
    from hf_contmerge.loop.plan.estimates import PhaseEstimate

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


def _no_look(_planned: PlannedRun) -> None:
    return None


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


def make_plan(
    run: Run,
    findings: Findings,
    *,
    processes: int | None = None,
    trust_remote_code: bool = False,
    whole: bool = False,
    look: Callable[[PlannedRun], None] = _no_look,
) -> dict[str, Any]:
    """Check a run and estimate its phases. Arguments as for `run_recipe`.

    Args:
        run: the run.
        findings: takes errors and notes.
        processes: of this machine; default: as a run has them.
        trust_remote_code: allow models to run their own code, where the recipe says so too.
        whole: also return the phases that are finished.
        look: called with the run after its checks, while its task files are there.

    Returns:
        Machine, phases and totals, for JSON; empty if errors prevent estimates.
    """
    import psutil

    from hf_contmerge.loop.plan._machine import measure_speeds, this_machine
    from hf_contmerge.loop.plan._planned import Host
    from hf_contmerge.loop.plan.estimates import estimates
    from hf_contmerge.run.steps import run_steps

    with tempfile.TemporaryDirectory() as scratch:
        count = processes or _processes(run.recipe)
        planned = check_run(run, findings, Path(scratch), count, trust_remote_code=trust_remote_code)
        if planned is None:
            return {}
        look(planned)
        _load_libraries()
        start = psutil.Process().memory_info().rss  # this process has loaded a run's libraries
        host = Host(this_machine(run.folder), measure_speeds(run.folder), start, count)
        steps = [step for step in run_steps(run, planned.kinds) if whole or not step.done]
        every = findings.ask(lambda: list(estimates(planned, host, steps)))
        if every is None:
            return {}
        phases = [phase for phase in every if not phase.step.done]
        if run.recipe.tunes:
            findings.notes.append(
                "Attempts of a guard or an `auto` parameter are not included: each writes a merged model next to the "
                "merge and scores it on the validation slices."
            )
        _judge(phases, host.machine, run, findings)
        _suggest(phases, host, planned, findings)
        return _as_json(every, host, run)


def check_run(
    run: Run, findings: Findings, scratch: Path, processes: int, *, trust_remote_code: bool
) -> PlannedRun | None:
    """Run all checks; return None after an error."""
    from hf_contmerge.loop.plan._planned import PlannedRun
    from hf_contmerge.loop.plan.checks import Circumstances, Prepared, checks
    from hf_contmerge.models.headers import needs_converting, resolve_headers

    prepared, tasks = Prepared(), scratch / "tasks"
    resolve = functools.partial(resolve_headers, scratch=scratch / "models")
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    how = Circumstances(tasks, processes, per_machine, plans=True, trust_remote_code=trust_remote_code, resolve=resolve)
    for check in checks(run, prepared, how):
        findings.ask(check)
    base = run.recipe.base_model
    if needs_converting(base):
        findings.notes.append(
            f"{base} is a GGUF file: the run first converts it to bfloat16, once, in the Hub's cache."
        )
    for stage, data in prepared.data.items():
        findings.notes += [f"Stage {stage}: {words}" for source in data.sources for words in source.sentences()]
    if findings.errors:
        return None
    return PlannedRun(run, prepared.base, prepared.rules, prepared.kinds, prepared.given, prepared.data, tasks)


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


def _judge(phases: Sequence[PhaseEstimate], machine: Machine, run: Run, findings: Findings) -> None:
    """Add errors for merging, scoring and disk."""
    from hf_contmerge.loop.plan.disk import disk_need

    for name, cure in (("merge", "fewer threads"), ("score", "a smaller evaluate.batch_size")):
        worst = max((p for p in phases if p.step.phase == name), key=lambda p: p.cost.memory, default=None)
        if worst and worst.cost.memory > machine.memory:
            findings.errors.append(
                f"The {name} phase needs about {size(worst.cost.memory)} of memory ({_place(worst, run)}), but this "
                f"machine has {size(machine.memory)}. Use {cure}, a smaller model or a larger machine."
            )
    need = disk_need(p.disk for p in phases).peak
    if need > machine.disk:
        findings.errors.append(
            f"This run still needs {size(need)} in {run.folder}, but {size(machine.disk)} are free. Free some space, "
            "choose another disk with --run, set train.save_strategy: 'no', or use fewer merge entries."
        )
    most = max((p.cost.memory for p in phases), default=0)
    if machine.available < most <= machine.memory:
        findings.notes.append(
            f"The run needs up to {size(most)} of memory, but only {size(machine.available)} are free now: close "
            "other programs first."
        )


def _suggest(phases: Sequence[PhaseEstimate], host: Host, planned: PlannedRun, findings: Findings) -> None:
    """Add an error for training, with smaller settings."""
    from hf_contmerge.loop.plan._training import training_cost

    memory, vram = host.machine.memory, min(host.machine.gpus, default=2**62)
    training = [p for p in phases if p.step.phase == "train"]
    worst = max(training, key=lambda p: (p.cost.vram, p.cost.memory), default=None)
    if worst is None or (worst.cost.memory <= memory and worst.cost.vram <= vram):
        return
    stage = planned.run.stage(worst.step.t)
    fits = None
    for words, changes in _CURES:
        smaller = Train.model_validate({**planned.recipe.train_of(stage).model_dump(), **changes})
        cost = training_cost(planned, host, stage.name, smaller)
        if cost.memory <= memory and cost.vram <= vram:
            fits = f"With `{words}` it would need {size(cost.vram or cost.memory)}."
            break
    on_gpu = worst.cost.vram > vram
    where = "each GPU's memory" if on_gpu else "memory"
    need, have = (worst.cost.vram, vram) if on_gpu else (worst.cost.memory, memory)
    findings.errors.append(
        f"Training stage {stage.name} needs about {size(need)} of {where}, but this machine has {size(have)}. "
        + (fits or "No setting makes it fit: use a smaller model, or several GPUs with FSDP2, which shards it.")
    )


# JSON


def _place(phase: PhaseEstimate, run: Run) -> str:
    return str(phase.step.place.folder.relative_to(run.folder / "stages"))


def _as_json(phases: Sequence[PhaseEstimate], host: Host, run: Run) -> dict[str, Any]:
    from hf_contmerge.loop.plan.disk import disk_need

    machine, need = host.machine, disk_need(p.disk for p in phases)
    return {
        "machine": {"cores": machine.cores, "memory_bytes": machine.memory, "gpu_bytes": list(machine.gpus),
                    "free_disk_bytes": machine.disk, "processes": host.processes},
        "phases": [
            {"phase": p.step.phase, "stage": p.step.t, "place": _place(p, run), "memory_bytes": p.cost.memory,
             "gpu_bytes": p.cost.vram, "disk_kept_bytes": p.disk.kept, "disk_at_work_bytes": p.disk.at_work,
             "seconds": round(p.cost.seconds, 2)}
            for p in phases
        ],
        "total": {"memory_bytes": max((p.cost.memory for p in phases), default=0),
                  "gpu_bytes": max((p.cost.vram for p in phases), default=0),
                  "disk_kept_bytes": need.kept, "disk_peak_bytes": need.peak,
                  "seconds": round(sum(p.cost.seconds for p in phases), 1)},
    }  # fmt: skip
