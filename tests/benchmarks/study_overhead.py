"""What a study costs beyond its phases, and how long a finished one takes to answer.

    python tests/benchmarks/study_overhead.py                 SmolLM2-135M, the quickstart's texts, two orders
    python tests/benchmarks/study_overhead.py --quick         a toy, to see that it works

Overhead: the command's seconds, less those of each training, merge and scoring by its own record (training that a cell
takes from another one counts once). It is the start of Python and its libraries, the checks of each cell, and reports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # toy recipes of the tests

PHASES = ("train", "merge", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy, to see that the script works")
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--limit", type=int, default=24, help="documents of each task")
    parser.add_argument("--repeats", type=int, default=5, help="of the finished study")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        study = write_study(home, args)
        print(measure.machine(home, "transformers", "trl", "lm_eval"), end="\n\n")
        compare(home, study, args.repeats)


def write_study(home: Path, args: argparse.Namespace) -> Path:
    """Write the study's file: the quickstart's recipe with one rule."""
    from hf_contmerge import load_recipe
    from hf_contmerge.runtime.quickstart import quickstart_recipe

    if args.quick:
        from toys.recipes import toy_recipe

        recipe = toy_recipe("quickstart", home)
    else:
        recipe = load_recipe(quickstart_recipe())
    fields: dict[str, Any] = recipe.model_dump(mode="json")
    fields["train"]["max_steps"] = args.steps
    fields["merge"] = [{"rule": "magmax"}]
    fields["evaluate"] |= {"limit": args.limit, "cache": False}
    path = home / "study.yml"
    path.write_text(yaml.safe_dump({"name": "overhead", "recipe": fields, "orders": args.orders}))
    return path


def compare(home: Path, study: Path, repeats: int) -> None:
    """Run the study, then ask the finished one; print both figures."""
    command = measure.Command(measure.contmerge("study", str(study), "--out", str(home / "study")))
    wall = measure.run(command).wall
    cells = sorted((home / "study" / "runs").iterdir())
    spent = {phase: seconds_of(home / "study", phase) for phase in PHASES}
    phases = sum(spent.values())
    over = wall - phases
    each = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in spent.items())
    print(f"{len(cells)} runs: {wall:.1f} s; phases {phases:.1f} s ({each})")
    print(f"overhead {over:.1f} s, {over / len(cells):.1f} s a run, {100 * over / phases:.1f} % of the phases")
    again = [measure.run(command).wall for _ in range(repeats)]
    print(f"finished, {repeats} times: median {statistics.median(again):.2f} s, longest {max(again):.2f} s")


def seconds_of(study: Path, phase: str) -> float:
    """Return the seconds of a phase in all runs, shared training once."""
    records = [json.loads(path.read_text()) for path in study.glob(f"runs/*/stages/**/{phase}.json")]
    return sum(record["seconds"] for record in records if "shared" not in record)


if __name__ == "__main__":
    main()
