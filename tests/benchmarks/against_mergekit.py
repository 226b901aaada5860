"""MagMax against mergekit's own task arithmetic on the same files, and against copying the same bytes.

    python tests/benchmarks/against_mergekit.py             4 experts of 176M parameters, bf16
    python tests/benchmarks/against_mergekit.py --quick     tiny ones

All commands are whole processes, run in turn. What a process costs before it can work is measured on a model of 250 kB.
mergekit computes in bf16 here, which is what it does fastest; in float32, as our rules always do, is a row of its own.
The models have no tokenizer, so it is told not to look for one.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import measure
import models
from measure import Command, Cost, median, ratio

OURS, PEER, PEER32, PLUGIN = (
    "`contmerge merge from-recipe`, magmax",
    "`mergekit-yaml`, task_arithmetic in bfloat16",
    "`mergekit-yaml`, task_arithmetic in float32",
    "`mergekit-yaml`, our magmax",
)
COPY, READ = "`cp` of base and experts", "`cat` of base and experts, `cp` of one"
HELP, TORCH, OUR_START, PEER_START = (
    "`contmerge --help`",
    '`python -c "import torch"`',
    "`contmerge merge from-recipe`, tiny model",
    "`mergekit-yaml`, tiny model",
)
METHODS = {
    OURS: ("magmax", "float32", {"lambda": 0.5}),
    PEER: ("task_arithmetic", "bfloat16", {"lambda": 0.3}),
    PEER32: ("task_arithmetic", "float32", {"lambda": 0.3}),
    PLUGIN: ("magmax", "float32", {"lambda": 0.5}),
}
ALONE = {"HF_CONTMERGE_AUTOLOAD": "0"}  # mergekit as it is without us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--size", choices=models.SIZES, default="176M")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    size, repeats = ("tiny", 2) if args.quick else (args.size, args.repeats)
    measure.contmerge("merge", "from-recipe")
    folders = [models.base_model(args.models, size), models.base_model(args.models, "tiny")]
    found = [[base, *models.experts(base, args.experts)] for base in folders]
    with tempfile.TemporaryDirectory(dir=args.models) as scratch:
        costs = measure.alternate(commands(Path(scratch), *found), repeats=repeats)
        alike = same_tensors(Path(scratch) / "out-0", Path(scratch) / "out-3")
    count = models.SIZES[size].parameters(tied=True)
    print(f"{args.experts} experts, {count:,} parameters in bf16; medians of {repeats} rounds, warm page cache.")
    print(measure.machine(args.models, "mergekit", "transformers"), end="\n\n")
    report(costs)
    print(f"- the stock mergekit-yaml with our magmax gives the same tensors: {'yes' if alike else 'NO'}")


def commands(scratch: Path, large: Sequence[Path], tiny: Sequence[Path]) -> dict[str, Command]:
    """Return what is measured: the merges, the copies, the starts."""
    found = {}
    for i, name in enumerate((OURS, PEER, PEER32, PLUGIN)):
        found[name] = merge(name, scratch / f"recipe-{i}.yml", large, scratch / f"out-{i}")
    files = shlex.join(str(folder / "model.safetensors") for folder in large)
    sources, copies = shlex.join(map(str, large)), scratch / "copies"
    into = f"mkdir {copies} && cp"
    found[COPY] = Command(["sh", "-c", f"{into} -r {sources} {copies}"], output=copies)
    found[READ] = Command(["sh", "-c", f"cat {files} > /dev/null && {into} -r {large[0]} {copies}"], output=copies)
    found[HELP] = Command(measure.contmerge("--help"))
    found[TORCH] = Command([sys.executable, "-c", "import torch"], ALONE)
    for start, name in ((OUR_START, OURS), (PEER_START, PEER)):
        found[start] = merge(name, scratch / f"start-{name == OURS}.yml", tiny, scratch / f"start-{name == OURS}")
    return found


def merge(name: str, recipe: Path, folders: Sequence[Path], out: Path) -> Command:
    """Return the command of one merge, its recipe written."""
    method, dtype, values = METHODS[name]
    models.recipe(recipe, method, folders[0], list(folders[1:]), dtype=dtype, out_dtype="bfloat16", **values)
    if name == OURS:
        return Command(measure.contmerge("merge", "from-recipe", str(recipe), str(out)), output=out)
    words = measure.mergekit_yaml(str(recipe), str(out), "--quiet", "--no-copy-tokenizer")
    return Command(words, {} if name == PLUGIN else ALONE, out)


def report(costs: Mapping[str, Sequence[Cost]]) -> None:
    """Print the table and the verdicts."""
    print("\n".join(measure.cost_rows(costs)), end="\n\n")
    ours, start = costs[OURS], median(costs[OUR_START])
    print(measure.verdict("wall time, ours / mergekit's (bfloat16)", ratio(ours, costs[PEER]), 0.6))
    print(f"- wall time, ours / mergekit's (float32): {ratio(ours, costs[PEER32]):.3g}")
    print(f"- processor seconds, ours / mergekit's (bfloat16): {ratio(ours, costs[PEER], measure.cpu):.3g}")
    starts = (start, median(costs[PEER_START]))
    print(f"- the same beyond the process start, bfloat16: {ratio(ours, costs[PEER], starts=starts):.3g}")
    print(measure.verdict("peak memory, ours / mergekit's (bfloat16)", ratio(ours, costs[PEER], measure.peak), 0.5))
    beyond = (start, 0.0)
    print(measure.verdict("beyond the process start / `cp` of all", ratio(ours, costs[COPY], starts=beyond), 3))
    print(f"- beyond the process start / reading all and writing one: {ratio(ours, costs[READ], starts=beyond):.3g}")


def same_tensors(ours: Path, theirs: Path) -> bool:
    """Return whether two model folders hold the same tensors."""
    from hf_contmerge.models.weights import weights_sha256

    return weights_sha256(ours) == weights_sha256(theirs)


if __name__ == "__main__":
    main()
