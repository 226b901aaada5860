"""`--plugin FILE.py` and `--trust-remote-code`: consent to run code."""

from __future__ import annotations

import argparse


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--plugin`; its caller passes the files to `use_plugins`."""
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py",
        help="run this file and use its rules and strategies (repeatable)",
    )  # fmt: skip


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--trust-remote-code`."""
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="let models and task files run their own code, if the recipe has `trust_remote_code: true`",
    )  # fmt: skip
