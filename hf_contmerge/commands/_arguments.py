"""Arguments of several commands: the run, `--json`, numbers."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_contmerge.errors import RunError
from hf_contmerge.runtime.hiding import printable

if TYPE_CHECKING:
    from hf_contmerge.run.folder import Run

_RUNS = Path("runs")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add an optional RUN; its caller passes it to `named_run`."""
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run folder (default: the only one under runs/)")


def named_run(name: str | None) -> Run:
    """Open the run of a folder, or the only one here.

    Raises:
        RunError: no run is named, and runs/ holds none or several.
    """
    from hf_contmerge.run.folder import Run  # and with it the recipe, which merges and scores do not need

    if name:
        return Run.load(name)
    here = sorted(file.parent for file in _RUNS.glob("*/recipe.yml"))
    if len(here) == 1:
        return Run.load(here[0])
    found = f"{_RUNS}/ holds several: {', '.join(map(str, here))}" if here else f"{_RUNS}/ holds none here"
    raise RunError(f"No run is named, and {found}. Name the folder that `contmerge run` wrote.")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, for facts on standard output; see `print_json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_json(value: Any) -> None:
    """Print one JSON value, without secrets."""
    print(printable(json.dumps(value, indent=1)))


def add_cpu_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--cpu`; its caller passes it to `compute_on`."""
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU")


def compute_on(*, cpu: bool) -> None:
    """Leave this process the CPU only, if asked; before accelerate starts."""
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"


def words_of(text: str) -> list[str]:
    """Return the words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of a number from `least` on, up to `most`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            end = "on" if most is None else f"to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} {end}; got {text!r}")
        return int(text)

    return number


def number_from(least: float, below: float, words: str) -> Callable[[str], float]:
    """Return the type of a number in a range, which `words` describe."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"must be {words}; got {text!r}")
        return value

    return number
