"""`contmerge plan`: checks and cost estimates before a run, without fetching weights.

It runs the checks of `contmerge run` and lists all errors instead of the first. It estimates memory, disk and time for
each phase on this machine, and rejects phases too large for it, with alternatives.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hf_contmerge.commands._arguments import add_json_argument, print_json
from hf_contmerge.commands._plugins import add_plugin_argument, add_trust_argument
from hf_contmerge.errors import ContmergeError, duration, size
from hf_contmerge.loop.plan.plan import Findings, make_plan
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import load_recipe
from hf_contmerge.runtime.plugins import require_given


class PlanError(ContmergeError):
    """The recipe cannot run; the message lists all errors."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge plan`."""
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("--run", metavar="DIR", help="the run folder; finished phases are not counted")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field of the recipe")
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: one per GPU)")
    add_plugin_argument(parser)
    add_trust_argument(parser)
    add_json_argument(parser)
    parser.set_defaults(do=plan_command)


def plan_command(args: argparse.Namespace) -> None:
    """Print the plan of a recipe.

    Raises:
        PlanError: the recipe has errors.
    """
    recipe = load_recipe(args.recipe, args.set)  # recipe errors appear before torch is loaded
    require_given(recipe.plugins, args.recipe)
    from hf_contmerge.runtime.launching import keep_freed_memory

    run = Run(Path(args.run) if args.run else recipe.run_folder(), recipe)
    findings = Findings()
    keep_freed_memory()  # the run does so too, and its steps are timed here
    plan = make_plan(run, findings, processes=args.processes, trust_remote_code=args.trust_remote_code)
    if args.json:
        print_json({**plan, "notes": findings.notes, "errors": findings.errors})
    elif plan:
        _print_table(plan)
    if not args.json:
        print("\n".join(f"Note: {note}" for note in findings.notes), end="\n" if findings.notes else "")
    if findings.errors:
        many = len(findings.errors) > 1
        listed = "".join(f"\n  {i}. {e}" if many else f" {e}" for i, e in enumerate(findings.errors, 1))
        raise PlanError(f"{args.recipe} cannot run:{listed}")
    if not args.json:
        print("All checks passed.")


def _print_table(plan: dict[str, Any]) -> None:
    """Print the phases: a table on a terminal, plain lines elsewhere."""
    rows = [_row(p) for p in plan["phases"]]
    total, machine = plan["total"], plan["machine"]
    by_phase = {p["phase"]: 0.0 for p in plan["phases"]}
    for p in plan["phases"]:
        by_phase[p["phase"]] += p["seconds"]
    times = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in by_phase.items())
    last = (
        f"Total: {size(total['memory_bytes'])} of memory"
        + (f", {size(total['gpu_bytes'])} of each GPU" if machine["gpu_bytes"] else "")
        + f"; on the disk up to {size(total['disk_peak_bytes'])}, {size(total['disk_kept_bytes'])} at the end; "
        f"{duration(total['seconds'])} ({times}).\n"
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
    print(last if rows else "All phases are done.")


def _row(p: dict[str, Any]) -> tuple[str, ...]:
    gpu = size(p["gpu_bytes"]) if p["gpu_bytes"] else "-"
    return (p["phase"], p["place"], size(p["memory_bytes"]), gpu, size(p["disk_kept_bytes"]), duration(p["seconds"]))
