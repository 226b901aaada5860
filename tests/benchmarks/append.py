"""Appending experts one by one: what the 64th costs against the 2nd.

    python tests/benchmarks/append.py             64 experts of 60M parameters, magmax and opcm
    python tests/benchmarks/append.py --quick     4 tiny ones

Two states of each rule are made, one of 1 expert and one of 63; each expert is deleted once it has been added. Then one
and the same new expert is added to a copy of either, by `contmerge merge add` in a process of its own, in turns: a
machine that grows slower while 64 experts come slows both. (The first append of a projection rule has nothing to keep
off from, so the second is the first to compare with.)
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import measure
import models

from hf_contmerge import MergeState

RULES: dict[str, dict[str, float]] = {"magmax": {"lambda": 0.5}, "opcm": {"alpha": 0.5}}
Costs = dict[str, list[measure.Cost]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--size", choices=models.SIZES, default="60M")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    size, count = ("tiny", 4) if args.quick else (args.size, args.experts)
    measure.contmerge("merge", "add")
    base = models.base_model(args.models, size)
    print(f"{count} appends, {models.SIZES[size].parameters(tied=True):,} parameters in bf16; {args.repeats} rounds.")
    print(measure.machine(args.models), end="\n\n")
    print("| rule | append | wall, s | processor, s | peak memory, MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.models) as scratch:
        copied = shutil.copytree(base, Path(scratch) / "base")  # its experts come and go beside it
        found = {rule: compare(copied, rule, count, rounds=args.repeats) for rule in RULES}
    print()
    for rule, costs in found.items():
        report(rule, costs)


def compare(base: Path, rule: str, count: int, *, rounds: int) -> Costs:
    """Measure the 2nd append and the last in turns; print a row of each."""
    state = MergeState.create(base.with_name(f"{rule}-state"), base=str(base), rule=rule, **RULES[rule])
    states: dict[str, Path] = {}
    for number in range(1, count):
        expert = models.expert(base, number)
        state.add(str(expert))
        shutil.rmtree(expert)
        if number == 1:
            states["2nd"] = shutil.copytree(state.folder, base.with_name(f"{rule}-few"))
    states[f"{count}th"] = state.folder
    newest = models.expert(base, count)
    costs: Costs = {name: [] for name in states}
    for _ in range(rounds):
        for name, there in states.items():
            copied = shutil.copytree(there, base.with_name("copied"))
            costs[name].append(
                measure.run(measure.Command(measure.contmerge("merge", "add", str(copied), str(newest))))
            )
            shutil.rmtree(copied)
    shutil.rmtree(newest)
    for name, rows in costs.items():
        wall, cpu, peak = (measure.median(rows, what) for what in (measure.wall, measure.cpu, measure.peak))
        print(f"| {rule} | {name} | {wall:.2f} | {cpu:.2f} | {peak / 2**20:.0f} |", flush=True)
    return costs


def report(rule: str, costs: Costs) -> None:
    """Print one rule's verdicts."""
    (early, few), (late, many) = costs.items()
    what = f"of the {late} append / of the {early}"
    print(measure.verdict(f"{rule}: peak memory {what}", measure.ratio(many, few, measure.peak), 1.05))
    print(measure.verdict(f"{rule}: seconds {what}", measure.ratio(many, few), 1.15))
    print(f"- {rule}: processor seconds, the same: {measure.ratio(many, few, measure.cpu):.3g}\n")


if __name__ == "__main__":
    main()
