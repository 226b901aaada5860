"""`contmerge study`: a recipe over orders, seeds and settings."""

from __future__ import annotations

import argparse
import re
import shlex

from hf_contmerge.commands._arguments import add_json_argument, print_json, whole_number
from hf_contmerge.commands._plugins import add_plugin_argument, add_trust_argument
from hf_contmerge.errors import RecipeError, RunError, duration, size
from hf_contmerge.loop.study import StudyFolder, run_cells, run_side_by_side, unfinished
from hf_contmerge.run.recipe.study import load_study
from hf_contmerge.runtime.files import FOREVER, FolderLock
from hf_contmerge.runtime.foreign import read_object, require_shape
from hf_contmerge.runtime.plugins import require_given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge study`."""
    parser.add_argument("study", help="a YAML file with `recipe`, `orders`, `seeds`, `vary`")
    parser.add_argument("--out", metavar="DIR", help="the study folder (default: its `output`, or studies/<name>)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--plan", action="store_true", help="list the runs and estimate their time; run nothing")
    one.add_argument("--jobs", type=whole_number(1), default=1, metavar="N", help="runs side by side on this machine")
    one.add_argument("--part", metavar="I/N", help="run the I-th of N parts, as a job of a cluster's array does")
    one.add_argument("--slurm", type=whole_number(1), metavar="N", help="print a SLURM script with an array of N parts")
    add_json_argument(parser)
    add_plugin_argument(parser)
    add_trust_argument(parser)
    parser.set_defaults(do=study_command)


def study_command(args: argparse.Namespace) -> None:
    """Run a study or a part; report after all runs."""
    part = _part(args.part) if args.part else None
    folder = StudyFolder.open(load_study(args.study), args.out)
    require_given(folder.cells[0].recipe.plugins, args.study)
    if args.slurm:
        script = slurm_script(args, folder)
        print_json({"script": script}) if args.json else print(script, end="")
    elif args.plan:
        _plan(folder, args)
    elif folder.is_complete():
        if not args.json:
            print(f"{folder.folder} is complete.")
        _show_stored(folder, args)
    else:
        _run(args, folder, part)


def _run(args: argparse.Namespace, folder: StudyFolder, part: tuple[int, int] | None) -> None:
    from hf_contmerge.runtime.launching import keep_freed_memory

    keep_freed_memory()
    cells = folder.part(*part) if part else folder.cells
    if any(unfinished(folder)):  # else a report is missing
        from hf_contmerge.loop.plan.study import check_study

        check_study(folder, cells, trust_remote_code=args.trust_remote_code)
    folder.write()
    if args.jobs > 1:
        run_side_by_side(folder, args.jobs, _words(args), quiet=args.json)
    else:
        run_cells(folder, cells, trust_remote_code=args.trust_remote_code)
    left = [cell.name for cell in unfinished(folder)]
    if left and args.json:
        print_json({"cells": len(folder.cells), "left": left})
    elif left:
        print(f"{len(left)} of {len(folder.cells)} runs of {folder.folder} are left.")
    if left:
        return
    with FolderLock(folder.folder, wait=FOREVER):  # the last jobs may end at the same moment
        if not folder.is_complete():
            _report(folder, args)
            return
    _show_stored(folder, args)


def _report(folder: StudyFolder, args: argparse.Namespace) -> None:
    from hf_contmerge.report.study import load_study_results, print_study, write_study_report

    runs = [(cell, folder.run(cell)) for cell in folder.cells]
    results = load_study_results(folder.study.name, runs, folder.study.seeds, folder.study.reference)
    page = write_study_report(results, folder.report)
    folder.finish()
    if args.json:
        _show_stored(folder, args)
        return
    print_study(results)
    print(f"Report:  {page}")


def _show_stored(folder: StudyFolder, args: argparse.Namespace) -> None:
    """Print a finished study's findings."""
    file = folder.report / "study.json"
    try:
        stored = read_object(file)
        require_shape(stored, {"findings": [str]})
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}. Remove {folder.report}, and give the command again.") from error
    if args.json:
        print_json(stored)
        return
    print("\n".join([*stored["findings"], f"Report:  {folder.report / 'index.html'}"]))


def _part(text: str) -> tuple[int, int]:
    """Return the numbers of `--part I/N`. Raises RecipeError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= parts:
        raise RecipeError(f"--part expects I/N with I from 1 to N, such as 3/9; got {text!r}")
    return number, parts


def _words(args: argparse.Namespace) -> list[str]:
    """Return the arguments of a job."""
    words = [args.study]
    words += ["--out", args.out] if args.out else []
    words += [word for file in args.plugin for word in ("--plugin", file)]
    return words + ["--trust-remote-code"] * args.trust_remote_code


def slurm_script(args: argparse.Namespace, folder: StudyFolder) -> str:
    """Return a batch script: an array of a study's parts."""
    parts = min(args.slurm, len(folder.cells))
    command = shlex.join(["contmerge", "study", *_words(args)])
    return f"""#!/bin/bash
#SBATCH --job-name={folder.study.name}
#SBATCH --array=1-{parts}
#SBATCH --gres=gpu:1
#SBATCH --output={folder.study.name}-%a.log
# The last job to end writes the report. A job that was stopped goes on where it was.
{command} --part "$SLURM_ARRAY_TASK_ID/{parts}"
"""


def _plan(folder: StudyFolder, args: argparse.Namespace) -> None:
    """Print the runs and their estimated time, shared training once."""
    from hf_contmerge.loop.plan.study import plan_study, refuse

    plan = plan_study(folder, trust_remote_code=args.trust_remote_code)
    refuse(folder, plan.findings)
    if args.json:
        cells = {cell.name: [stage.name for stage in cell.recipe.stages] for cell in folder.cells}
        sums = {"left": plan.left, "trained": plan.trained, "trainings": plan.trainings, "disk_bytes": plan.disk_bytes}
        print_json({"cells": cells, **sums, "seconds": plan.seconds, "notes": plan.findings.notes})
        return
    print("\n".join(f"{cell.name}  {' '.join(s.name for s in cell.recipe.stages)}" for cell in folder.cells))
    for note in plan.findings.notes:
        print(f"Note: {note}")
    runs = f"{plan.cells} runs" if plan.left == plan.cells else f"{plan.left} of {plan.cells} runs are left"
    trainings = f"{plan.trained} training{'s' * (plan.trained != 1)}"
    if plan.trained < plan.trainings:
        trainings += f" instead of {plan.trainings}, for equal experts are shared"
    times = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in plan.seconds.items())
    hours = duration(sum(plan.seconds.values()))
    print(f"{runs}; {trainings}; up to {size(plan.disk_bytes)} on the disk; {hours} ({times}).")
