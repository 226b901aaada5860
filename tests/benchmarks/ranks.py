"""OPCM on one rank, on two ranks, and on two threads: how much faster, and the same bytes.

    python tests/benchmarks/ranks.py             4 experts of 60M parameters
    python tests/benchmarks/ranks.py --quick     tiny ones

Every rank and thread has one BLAS thread. What starting costs (torchrun's own start too) is measured on a tiny model
and taken off. A last row folds the same matrices one after the other, each with two BLAS threads, writing nothing: what
one would get without workers.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import measure
import models
from measure import Command, median, ratio

ONE, TWO, THREADS, BLAS = (
    "1 rank, 1 worker",
    "2 ranks, 1 worker each",
    "1 rank, 2 workers",
    "2 BLAS threads, no workers",
)
ALPHA = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--size", choices=models.SIZES, default="60M")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fold", nargs="+", help=argparse.SUPPRESS)  # what the last row runs
    args = parser.parse_args()
    if args.fold:
        fold(int(args.fold[0]), args.fold[1:])
        return
    size, repeats = ("tiny", 1) if args.quick else (args.size, args.repeats)
    measure.contmerge("merge", "from-recipe")
    found = [models.base_model(args.models, s) for s in (size, "tiny")]
    large, tiny = ([base, *models.experts(base, args.experts)] for base in found)
    with tempfile.TemporaryDirectory(dir=args.models) as scratch:
        costs = measure.alternate(commands(Path(scratch), large, "merge"), repeats=repeats)
        digests = {name: digest(Path(scratch) / f"out-{i}-merge") for i, name in enumerate((ONE, TWO, THREADS))}
        starts = measure.alternate(commands(Path(scratch), tiny, "start"), repeats=repeats)
    count = models.SIZES[size].parameters(tied=True)
    print(f"opcm, {args.experts} experts, {count:,} parameters in bf16; medians of {repeats} rounds.")
    print(measure.machine(args.models), end="\n\n")
    report(costs, {name: median(found) for name, found in starts.items()}, digests)


def commands(scratch: Path, folders: Sequence[Path], what: str) -> dict[str, Command]:
    """Return the merges that are compared."""
    recipe = scratch / f"recipe {what}.yml"
    models.recipe(recipe, "opcm", folders[0], list(folders[1:]), dtype="float32", out_dtype="bfloat16", alpha=ALPHA)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    launchers = {ONE: ([], 1), TWO: (torchrun, 1), THREADS: ([], 2)}
    found = {}
    for i, (name, (launcher, workers)) in enumerate(launchers.items()):
        out = scratch / f"out-{i}-{what}"
        words = measure.contmerge("merge", "from-recipe", str(recipe), str(out), "--workers", str(workers))
        found[name] = Command([*launcher, *words], {"OMP_NUM_THREADS": "1"}, out)
    bare = [sys.executable, __file__, "--fold", "2", *map(str, folders)]
    return found | {BLAS: Command(bare, {"OMP_NUM_THREADS": "2"})}


def fold(threads: int, folders: Sequence[str]) -> None:
    """Fold all projected matrices one after the other, with `threads` BLAS threads. Runs in a process of its own."""
    import torch
    from safetensors import safe_open

    from hf_contmerge.merge_rules import Weight, get_rule

    torch.set_num_threads(threads)
    rule = get_rule("opcm", alpha=ALPHA)
    base, *experts = (safe_open(f"{folder}/model.safetensors", framework="pt") for folder in folders)
    for name in base.keys():  # noqa: SIM118  (not a dict)
        start = base.get_tensor(name).float()
        running = torch.zeros_like(start)
        for stage, expert in enumerate(experts, 1):
            weight = Weight(name, name.endswith("_proj.weight"), stage)
            running = rule.update(running, expert.get_tensor(name).float() - start, weight)


def digest(folder: Path) -> str:
    """Return the digest of a model's files of weights, byte for byte."""
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors*"))}
    return json.dumps(found)


def report(costs: dict[str, list[measure.Cost]], starts: dict[str, float], digests: dict[str, str]) -> None:
    """Print the table and the verdicts."""
    print("| what | wall, s | of it the start, s | beyond it, s |\n|---|---|---|---|")
    for name, found in costs.items():
        print(f"| {name} | {median(found):.2f} | {starts[name]:.2f} | {median(found) - starts[name]:.2f} |")
    print()
    for name, target in ((TWO, 1.7), (THREADS, None), (BLAS, None)):
        faster = ratio(costs[ONE], costs[name], starts=(starts[ONE], starts[name]))
        what = f"{name}: times faster than {ONE}, beyond the start"
        print(measure.verdict(what, faster, target, at_least=True) if target else f"- {what}: {faster:.3g}")
    alike = len(set(digests.values())) == 1
    print(f"- the same bytes in all three files of weights: {'yes' if alike else 'NO'}")


if __name__ == "__main__":
    main()
