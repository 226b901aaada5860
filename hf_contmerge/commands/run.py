"""`contmerge run` and train.py: run a recipe."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hf_contmerge.commands._arguments import whole_number
from hf_contmerge.commands._plugins import add_plugin_argument, add_trust_argument
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.phases import PHASES
from hf_contmerge.run.recipe.text import load_recipe
from hf_contmerge.runtime.plugins import require_given
from hf_contmerge.runtime.quickstart import quickstart_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train.py` and `contmerge run`."""
    parser.add_argument("recipe", nargs="?", help="a YAML file; without it, the quickstart")
    parser.add_argument("--run", metavar="DIR", help="the run folder (default: the recipe's `output`, or runs/<name>)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field of the recipe")
    parser.add_argument(
        "--from", dest="before", metavar="MERGE", help="continue a published merge: owner/name[@revision], or a folder"
    )
    parser.add_argument("--until", choices=PHASES, default="report", help="stop after this phase")
    add_plugin_argument(parser)
    add_trust_argument(parser)
    parser.add_argument("--open", action="store_true", help="show the report in a browser, if available")
    parser.add_argument("--num-processes", type=whole_number(1), metavar="N", help="start N ranks on this machine")
    parser.add_argument(
        "--config-file",
        metavar="F",
        help="start the ranks of an accelerate configuration: a file, or fsdp2, zero3 ...",
    )
    parser.set_defaults(do=run_command)


def _starts_ranks(args: argparse.Namespace) -> bool:
    return bool(args.config_file or (args.num_processes or 1) > 1) and "RANK" not in os.environ


def run_command(args: argparse.Namespace) -> None:
    """Start or resume a run; report a finished one."""
    file = args.recipe or quickstart_recipe()
    before = [f"continue_from={args.before}"] if args.before else []
    recipe = load_recipe(file, [*args.set, *before])
    require_given(recipe.plugins, file)
    run = Run(Path(args.run) if args.run else recipe.run_folder(), recipe)
    if _starts_ranks(args) and not run.is_complete():
        from hf_contmerge.commands._launch import launch

        launch(args)
        return  # rank 0 has shown the report
    if not run.is_complete():  # a finished run needs no torch
        from hf_contmerge.runtime.launching import keep_freed_memory, leave_ranks

        keep_freed_memory()
        run = run_recipe(recipe, args.run, until=args.until, trust_remote_code=args.trust_remote_code)
        leave_ranks()
    elif int(os.environ.get("RANK", "0")) == 0:
        print(f"{run.folder} is complete.")
    if int(os.environ.get("RANK", "0")) == 0 and run.is_complete():
        from hf_contmerge.report.write import show_report

        show_report(run, browser=args.open)
