"""`--plugin FILE.py`, for commands with rules or strategies."""

from __future__ import annotations

import argparse


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--plugin`; its caller passes the files to `use_plugins`."""
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py",
        help="run this file and use its rules and strategies (repeatable)",
    )  # fmt: skip
