"""`contmerge run` on several ranks, by accelerate's launcher."""

from __future__ import annotations

import argparse
import logging
import sys

from hf_contmerge.errors import ResourceError
from hf_contmerge.runtime.examples import launcher_file

_ALONE = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
"""What accelerate would otherwise guess aloud; the recipe sets the precision."""


def launch(args: argparse.Namespace) -> None:
    """Start the ranks of a run and wait for them.

    Raises:
        RecipeError: no such configuration.
        ResourceError: a rank was killed.
        SystemExit: a rank ended with an exit code; it has said why.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = [*_launcher_words(args), "-m", "hf_contmerge.train", *run_words(args)]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # repeats at length what a rank said
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # that each rank has one thread, by default
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        raise ResourceError(
            f"Rank {rank} was killed by signal {-failure.exitcode}. Finished work is kept: the same command continues."
        ) from error


def _launcher_words(args: argparse.Namespace) -> list[str]:
    """Return accelerate's options.

    Without a GPU, its type for several GPUs is the one that starts all ranks.
    """
    from hf_contmerge.runtime.device import cpu_only

    several = ["--num_processes", str(args.num_processes)] if args.num_processes else []
    if args.config_file:
        return ["--config_file", str(launcher_file(args.config_file)), *several]
    if cpu_only():
        return ["--config_file", str(launcher_file("cpu2")), *several]
    return [*several, *_ALONE, "--multi_gpu"]


def run_words(args: argparse.Namespace) -> list[str]:
    """Return the words of a `contmerge run` on each rank."""
    words = [args.recipe] if args.recipe else []
    words += ["--run", args.run] if args.run else []
    words += ["--from", args.before] if args.before else []
    words += [word for value in args.set for word in ("--set", value)]
    words += ["--until", args.until]
    words += [word for file in args.plugin for word in ("--plugin", file)]
    return words + ["--trust-remote-code"] * args.trust_remote_code + ["--open"] * args.open
