"""`contmerge plan`: everything that can be known of a run before it starts, without fetching weights.

It checks what `contmerge run` would check, and tells all that is wrong instead of the first; then it estimates memory,
disk and time for each phase on this machine, and refuses what cannot fit, with what would.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hf_contmerge.errors import ContmergeError, ResourceError, size
from hf_contmerge.recipe import Recipe, Train, load_recipe
from hf_contmerge.run_folder import Run

T = TypeVar("T")

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


class PlanError(ContmergeError):
    """A run cannot be carried out as its recipe says. The message lists all that is wrong."""


@dataclass
class Findings:
    """What is wrong, and what is worth knowing; collected, so that all of it is told at once."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ask(self, do: Callable[[], T], *, ignore: type[ContmergeError] | None = None) -> T | None:
        """Return what `do` returns, or None and keep its error if the user can mend it; not one to be ignored."""
        try:
            return do()
        except ContmergeError as error:
            if not (ignore and isinstance(error, ignore)) and str(error) not in self.errors:
                self.errors.append(str(error))
            return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge plan`."""
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("--run", metavar="DIR", help="the run folder; what is done there is not counted")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field of the recipe")
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: one a GPU)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(do=plan_command)


def plan_command(args: argparse.Namespace) -> None:
    """Print the plan of a recipe. Raises PlanError if anything is wrong with it."""
    recipe = load_recipe(args.recipe, args.set)  # refused, if it must be, before torch is loaded
    from hf_contmerge.launching import keep_freed_memory

    run = Run(Path(args.run) if args.run else recipe.run_folder(), recipe)
    findings = Findings()
    keep_freed_memory()  # as the run will, whose steps are timed here
    plan = make_plan(run, findings, processes=args.processes)
    if args.json:
        print(json.dumps({**plan, "notes": findings.notes, "errors": findings.errors}, indent=1))
    elif plan:
        _print_table(plan)
    if not args.json:
        print("\n".join(f"Note: {note}" for note in findings.notes), end="\n" if findings.notes else "")
    if findings.errors:
        many = len(findings.errors) > 1
        listed = "".join(f"\n  {i}. {e}" if many else f" {e}" for i, e in enumerate(findings.errors, 1))
        raise PlanError(f"{args.recipe} cannot be run as it is:{listed}")
    if not args.json:
        print("All that could be checked is in order.")


def make_plan(run: Run, findings: Findings, *, processes: int | None = None) -> dict[str, Any]:
    """Check a run, and estimate what its phases take; `findings` gets what is wrong.

    Returns:
        machine, phases and totals, for JSON; nothing if too much is wrong for estimates.
    """
    import psutil

    from hf_contmerge.plan_estimates import Estimates, costs
    from hf_contmerge.plan_machine import measure_speeds, this_machine
    from hf_contmerge.run_phases import run_steps

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


def _processes(recipe: Recipe) -> int:
    """Return the processes of the job: those of the launcher; else one a GPU, or one for all of them."""
    import torch

    from hf_contmerge.model_folder import cpu_only

    one = recipe.evaluate.backend == "vllm" or recipe.evaluate.parallel == "layers"
    return int(os.environ.get("WORLD_SIZE", "0")) or (1 if one or cpu_only() else max(1, torch.cuda.device_count()))


def _load_libraries() -> None:
    """Import what training and scoring import when they begin."""
    from trl.trainer.sft_trainer import SFTTrainer

    from hf_contmerge import lm_tasks

    lm_tasks.load_libraries()
    assert SFTTrainer


# Checks


def _checked(run: Run, findings: Findings, scratch: Path, processes: int) -> Any:
    """Check all that a run's preflight checks, each by itself; return a Subject, or None if the base is no good."""
    from hf_contmerge import experts, finetune, model_folder, preflight
    from hf_contmerge.merge_words import make_entry_rule
    from hf_contmerge.model_headers import needs_converting, resolve_headers
    from hf_contmerge.plan_estimates import Subject
    from hf_contmerge.trackers import check_trackers

    recipe = run.recipe
    findings.ask(run.check_folder)
    findings.ask(lambda: check_trackers(recipe.train))
    resolve = functools.partial(resolve_headers, scratch=scratch / "models")
    made = {e.name: findings.ask(functools.partial(make_entry_rule, e)) for e in recipe.merge}
    findings.ask(lambda: preflight.check_ladder(recipe))
    rules = {name: rule for name, rule in made.items() if rule}
    base = findings.ask(lambda: resolve(recipe.base_model))
    if base is None:
        findings.ask(lambda: finetune.make_strategies(recipe.train))
        return None
    findings.ask(lambda: experts.check_mergeable(base))
    findings.ask(lambda: model_folder.check_tokenizer(base))
    if needs_converting(recipe.base_model):
        findings.notes.append(
            f"{recipe.base_model} is a GGUF file: the run converts it to bfloat16 first, once, into the Hub's cache."
        )
    given: dict[str, Path] = {}
    for stage in recipe.stages:
        one = recipe.model_copy(update={"stages": (stage,)})
        given |= findings.ask(functools.partial(preflight.given_models, one, base, resolve=resolve)) or {}
    machine = {"processes": processes, "per_machine": int(os.environ.get("LOCAL_WORLD_SIZE", processes))}
    findings.ask(lambda: preflight.check_scoring(recipe, base, given, **machine))
    if any(s.dataset for s in recipe.stages):
        _check_training(recipe, base, findings)
    known = len(rules) == len(recipe.merge)
    kinds = preflight.merge_kinds(recipe, rules) if known else {}
    data = _checked_data(recipe, base, findings, scratch)
    _check_tasks(recipe, findings, scratch / "tasks")
    if known and not findings.errors:
        findings.ask(lambda: preflight.check_kept_adapters(recipe, kinds, given))
        findings.ask(lambda: finetune.check_stages(recipe, data))
        findings.ask(lambda: preflight.check_replay(recipe, data))
    return None if findings.errors else Subject(run, base, rules, kinds, given, data, scratch / "tasks")


def _check_training(recipe: Recipe, base: Path, findings: Findings) -> None:
    """Check strategies and SFTConfig fields. Whether it fits is judged later, by a better estimate than preflight's."""
    from hf_contmerge import finetune

    if findings.ask(lambda: finetune.make_strategies(recipe.train)) is None:
        return
    findings.ask(lambda: finetune.check_training(recipe.train, base), ignore=ResourceError)


def _checked_data(recipe: Recipe, base: Path, findings: Findings, scratch: Path) -> dict[str, Any]:
    """Load each stage's data and the general tasks', and write their task files."""
    from hf_contmerge import preflight

    quiet = recipe.evaluate.model_copy(update={"general_tasks": ()})
    parts = [recipe.model_copy(update={"stages": (stage,), "evaluate": quiet}) for stage in recipe.stages]
    parts += [
        recipe.model_copy(
            update={"stages": (), "evaluate": recipe.evaluate.model_copy(update={"general_tasks": (task,)})}
        )
        for task in recipe.evaluate.general_tasks
    ]
    data: dict[str, Any] = {}
    for part in parts:
        data |= findings.ask(functools.partial(preflight.load_data, Run(scratch, part), base, write=True)) or {}
    return data


def _check_tasks(recipe: Recipe, findings: Findings, tasks: Path) -> None:
    """Check lm-eval's own tasks, together first: indexing them takes seconds."""
    from hf_contmerge.lm_tasks import check_tasks

    made = {s.heldout_task for s in recipe.stages} | {t.name for t in recipe.tasks() if t.dataset}
    ours = [t for t in recipe.measured(range(1, len(recipe.stages) + 1)) if t.name not in made]
    folders = recipe.evaluate.task_folders(tasks)
    trial = Findings()
    if ours:
        trial.ask(lambda: check_tasks(ours, folders, split=recipe.tunes, limit=recipe.evaluate.limit))
    if len(ours) == 1:
        findings.errors += trial.errors
    for task in ours if trial.errors and len(ours) > 1 else ():
        findings.ask(functools.partial(check_tasks, [task], folders, split=recipe.tunes))


# What cannot fit


def _judge(found: Sequence[Any], machine: Any, run: Run, findings: Findings) -> None:
    """Add an error for what does not fit this machine: merging, scoring, the disk. Of training, see `_suggest`."""
    from hf_contmerge.run_phases import peak_disk

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


def _suggest(found: Sequence[Any], machine: Any, estimates: Any, subject: Any, findings: Findings) -> None:
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


def _place(cost: Any, run: Run) -> str:
    return str(cost.step.place.folder.relative_to(run.folder / "stages"))


def _as_json(found: Sequence[Any], machine: Any, processes: int, run: Run) -> dict[str, Any]:
    from hf_contmerge.run_phases import peak_disk

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


def _print_table(plan: dict[str, Any]) -> None:
    """Print the phases: a table on a terminal, plain lines elsewhere."""
    rows = [_row(p) for p in plan["phases"]]
    total, machine = plan["total"], plan["machine"]
    by_phase = {p["phase"]: 0.0 for p in plan["phases"]}
    for p in plan["phases"]:
        by_phase[p["phase"]] += p["seconds"]
    times = ", ".join(f"{phase} {_duration(seconds)}" for phase, seconds in by_phase.items())
    last = (
        f"In all: {size(total['memory_bytes'])} of memory"
        + (f", {size(total['gpu_bytes'])} of each GPU" if machine["gpu_bytes"] else "")
        + f"; on the disk up to {size(total['disk_peak_bytes'])}, {size(total['disk_kept_bytes'])} at the end; "
        f"{_duration(total['seconds'])} ({times}).\n"
        f"This machine: {machine['cores']} cores, {size(machine['memory_bytes'])} of memory, "
        f"{len(machine['gpu_bytes'])} GPUs, {size(machine['free_disk_bytes'])} of free disk; "
        f"{machine['processes']} process{'es' * (machine['processes'] > 1)}."
    )
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table("phase", "place", "memory", "GPU", "disk", "time")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        print("\n".join("  ".join(row) for row in rows))
    print(last if rows else "All of it is done.")


def _row(p: dict[str, Any]) -> tuple[str, ...]:
    gpu = size(p["gpu_bytes"]) if p["gpu_bytes"] else "-"
    return (p["phase"], p["place"], size(p["memory_bytes"]), gpu, size(p["disk_kept_bytes"]), _duration(p["seconds"]))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
