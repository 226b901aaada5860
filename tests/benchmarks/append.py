"""Appending experts one by one: what the last of many costs against the second.

    python tests/benchmarks/append.py             64 experts of 60M parameters, magmax and opcm
    python tests/benchmarks/append.py --quick     4 tiny ones

Each expert is made, added with `contmerge merge add` in a process of its own, and deleted. The first append of a
projection rule has nothing to keep off from, so the second is the first to compare with. Figures waver: the 2nd stands
for the median of the 2nd to the 6th, the last for the median of the last five.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import measure
import models

RULES = {"magmax": ["--set", "lambda=0.5"], "opcm": ["--set", "alpha=0.5"]}
NEAR = 5
FIGURES = (measure.peak, measure.wall, measure.cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--size", choices=models.SIZES, default="60M")
    parser.add_argument("--experts", type=int, default=64)
    args = parser.parse_args()
    size, count = ("tiny", 4) if args.quick else (args.size, args.experts)
    for command in ("init", "add"):
        measure.contmerge("merge", command)
    base = models.base_model(args.models, size)
    with tempfile.TemporaryDirectory(dir=args.models) as scratch:
        copied = shutil.copytree(base, Path(scratch) / "base")  # its experts come and go beside it
        costs = append(copied, count)
    print(f"{count} appends, {models.SIZES[size].parameters(tied=True):,} parameters in bf16.")
    print(measure.machine(args.models), end="\n\n")
    for rule, found in costs.items():
        report(rule, found)


def append(base: Path, count: int) -> dict[str, list[measure.Cost]]:
    """Fold `count` experts into a state of each rule; return what each append cost."""
    states = {rule: base.with_name(f"state-{rule}") for rule in RULES}
    for rule, state in states.items():
        words = ["merge", "init", str(state), "--base", str(base), "--rule", rule, *RULES[rule]]
        measure.run(measure.Command(measure.contmerge(*words)))
    add = measure.contmerge("merge", "add")
    costs: dict[str, list[measure.Cost]] = {rule: [] for rule in RULES}
    for number in range(1, count + 1):
        expert = models.expert(base, number)
        for rule, state in states.items():
            costs[rule].append(measure.run(measure.Command([*add, str(state), str(expert)])))
        shutil.rmtree(expert)
    return costs


def report(rule: str, costs: Sequence[measure.Cost]) -> None:
    """Print one rule's table and verdicts."""
    shown = [n for n in (1, 2, 3, 4, 8, 16, 32, 48, 63, 64) if n <= len(costs)]
    print(f"{rule}:\n\n| append | {' | '.join(map(str, shown))} |\n|{'---|' * (len(shown) + 1)}")
    print(f"| wall, s | {' | '.join(f'{costs[n - 1].wall:.2f}' for n in shown)} |")
    print(f"| processor, s | {' | '.join(f'{costs[n - 1].cpu:.2f}' for n in shown)} |")
    print(f"| peak memory, MiB | {' | '.join(f'{costs[n - 1].peak / 2**20:.0f}' for n in shown)} |\n")
    early, late = costs[1 : 1 + NEAR], costs[-NEAR:]
    memory, seconds, cpu = (measure.median(late, w) / measure.median(early, w) for w in FIGURES)
    print(measure.verdict(f"{rule}: peak memory of the {len(costs)}th append / of the 2nd", memory, 1.05))
    print(measure.verdict(f"{rule}: seconds of the {len(costs)}th append / of the 2nd", seconds, 1.15))
    print(f"- {rule}: processor seconds, the same: {cpu:.3g}\n")


if __name__ == "__main__":
    main()
