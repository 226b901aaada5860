"""`contmerge doctor`: what of this machine and environment is fit to run."""

from __future__ import annotations

import argparse

from hf_contmerge.commands._arguments import add_json_argument, print_json
from hf_contmerge.errors import ResourceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge doctor`."""
    add_json_argument(parser)
    parser.set_defaults(do=doctor_command)


def doctor_command(args: argparse.Namespace) -> None:
    """Print one line for each thing looked at.

    Raises:
        ResourceError: something is not fit; the lines say what to do.
    """
    from hf_contmerge.loop.plan.doctor import Finding, findings

    every: list[Finding] = []
    for finding in findings():
        every.append(finding)
        if not args.json:
            do = f" -> {finding.do}" if finding.do else ""
            print(f"{finding.state:4s}  {finding.what:15s}  {finding.says}{do}", flush=True)
    if args.json:
        print_json([finding._asdict() for finding in every])
    if bad := [finding.what for finding in every if finding.state == "bad"]:
        raise ResourceError(f"Not fit: {', '.join(bad)}.")
