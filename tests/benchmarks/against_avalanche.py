"""Our metrics against those of Avalanche 0.6.0, on accuracies of a network that Avalanche itself trains and measures.

    python tests/benchmarks/against_avalanche.py            five sequences of five tasks
    python tests/benchmarks/against_avalanche.py --quick    one sequence

Avalanche is installed from PyPI into an environment of its own under --models, made at the first run. Its plugins see
the training; ours get the table of accuracies. Where the definitions agree, so must the numbers:

- BWT: the mean of R[T][j] - R[j][j] over the earlier tasks, in both.
- FWT: the mean of R[j-1][j] - R[0][j], in both, if row 0 is the network before any training.

Where they do not: Avalanche's "forgetting" is -BWT, the drop since a task was learnt. Ours is that of Chaudhry et al.
(2018), the drop from the best that the task ever had: never less than -BWT.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import measure
import models

from hf_contmerge.scoring.forgetting.matrix import ScoreMatrix

NEEDS = "avalanche-lib==0.6.0"
PEER = Path(__file__).with_name("avalanche_peer.py")
TASKS = 5
TOLERANCE = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    args = parser.parse_args()
    python = environment(args.models / "avalanche")
    print(measure.machine(args.models), end="\n\n", flush=True)
    print("| sequence | ACC | BWT | Avalanche's | FWT | Avalanche's | F | Avalanche's forgetting |")
    print("|---" * 8 + "|")
    worst = {"BWT": 0.0, "FWT": 0.0, "Avalanche's forgetting + our BWT": 0.0}
    above = True
    for seed in range(1 if args.quick else 5):
        peer = trained(python, seed)
        stages = tuple(f"task {j}" for j in range(1, TASKS + 1))
        ours = ScoreMatrix(stages, tuple(tuple(row) for row in peer["rows"])).metrics()
        acc, bwt, fwt, drop = (ours[name] or 0.0 for name in ("acc", "bwt", "fwt", "forgetting"))
        theirs = peer["StreamBWT"], peer["StreamForwardTransfer"], peer["StreamForgetting"]
        print(
            f"| {seed} | {acc:.4f} | {bwt:+.4f} | {theirs[0]:+.4f} | {fwt:+.4f} | {theirs[1]:+.4f} | {drop:.4f} ",
            end="",
        )
        print(f"| {theirs[2]:.4f} |", flush=True)
        off = (abs(bwt - theirs[0]), abs(fwt - theirs[1]), abs(bwt + theirs[2]))
        worst = {name: max(before, now) for (name, before), now in zip(worst.items(), off, strict=True)}
        above = above and drop >= theirs[2] - TOLERANCE
    print()
    for name, difference in worst.items():
        print(measure.verdict(f"{name}, largest difference", difference, TOLERANCE))
    print(f"- F is never less than Avalanche's forgetting: {'met' if above else 'MISSED'}")


def environment(env: Path) -> Path:
    """Return the Python of an environment with Avalanche, with the torch that runs here."""
    python = env / "bin/python"
    if not (env / ".complete").exists():
        torch_version = f"torch=={importlib.metadata.version('torch').split('+')[0]}"
        print(f"Installing Avalanche into {env}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        for wanted in ([torch_version], [torch_version, NEEDS]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        trained(python, 0, tasks=2)
        (env / ".complete").touch()
    return python


def trained(python: Path, seed: int, tasks: int = TASKS) -> dict:
    """Return what Avalanche measured of one sequence of tasks."""
    done = subprocess.run([str(python), str(PEER), str(tasks), str(seed)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"Avalanche failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
