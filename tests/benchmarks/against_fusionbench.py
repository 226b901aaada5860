"""OPCM against FusionBench 0.2.33, on the same models: time, memory, and whether both compute the same thing.

    python tests/benchmarks/against_fusionbench.py             a Llama of 176M parameters, 4 experts
    python tests/benchmarks/against_fusionbench.py --quick     a tiny one

FusionBench is installed from PyPI into an environment of its own (--env), made at the first run. It takes minutes for
a merge, so it is run once and its cost and result are kept beside the models; `--again` runs it anew.

It differs from our OPCM in two points, on purpose: it decomposes the output head too, and changes tied embeddings
twice. So its time is also given without the head, our result is held against the definition in float64, and its result
against the same definition on the matrices that both project, up to the one scale of the whole model.
"""

import argparse
import importlib.metadata
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import measure
import models
import torch
from safetensors import safe_open
from torch import Tensor

ALPHA = 0.5
ENV = Path("~/.cache/contmerge-bench/fusionbench").expanduser()
NEEDS = ("fusion_bench==0.2.33", "transformers==4.57.*", "datasets<4.5")
PEER = Path(__file__).with_name("fusionbench_peer.py")


@dataclass(frozen=True)
class Peer:
    """What FusionBench's process cost (seconds, bytes), split as its script reports it, and where its result lies."""

    folder: Path
    day: str
    wall: float
    cpu: float
    peak: int
    imports: float
    loading: float
    merge: float
    head: float
    writing: float


@dataclass(frozen=True)
class Errors:
    """Relative errors against float64: our merged - base; FusionBench's on the projected matrices, its scale fitted."""

    ours: float
    peer: float
    peer_scale: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--size", choices=models.SIZES, default="176M")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--env", type=Path, default=ENV, help="FusionBench's environment, made if need be")
    parser.add_argument("--repeats", type=int, default=3, help="of our own merge")
    parser.add_argument("--again", action="store_true", help="run FusionBench although its result is there")
    args = parser.parse_args()
    size = "tiny" if args.quick else args.size
    measure.contmerge("merge", "from-recipe")  # before the minutes of the other
    base = models.base_model(args.models, size, tied=not args.untied)
    experts = models.experts(base, args.experts)
    peer = fusionbench(args.env, base, experts, again=args.again)
    count = models.SIZES[size].parameters(tied=not args.untied)
    print(f"OPCM, alpha {ALPHA}, {args.experts} experts, a Llama of {count:,} stored weights ", end="")
    print(f"({base.parent.name}, vocabulary {models.SIZES[size].vocabulary}), bf16 in, float32 out.")
    print(measure.machine(args.models, "transformers"), end="\n\n", flush=True)
    ours, out = merge(base, experts, args.repeats)
    report(ours, peer, errors(base, experts, out, peer.folder), has_head=peer.head > 0)


def fusionbench(env: Path, base: Path, experts: Sequence[Path], *, again: bool) -> Peer:
    """Return the cost and result of FusionBench's merge, run if need be."""
    out = base.with_name(f"fusionbench-{len(experts)}")
    kept = out / "cost.json"
    if again or not kept.exists():
        words = [str(environment(env)), str(PEER), *map(str, [out, base, *experts])]
        print("FusionBench merges; this may take many minutes", file=sys.stderr, flush=True)
        cost = measure.run(measure.Command(words, output=out))
        split = json.loads(cost.printed.strip().splitlines()[-1])
        found = {"day": date.today().isoformat(), "wall": cost.wall, "cpu": cost.cpu, "peak": cost.peak, **split}
        kept.write_text(json.dumps(found))
    return Peer(out, **json.loads(kept.read_text()))


def environment(env: Path) -> Path:
    """Return the Python of an environment with FusionBench, with the torch that runs here."""
    python = env / "bin/python"
    if not (env / ".complete").exists():
        torch_version = importlib.metadata.version("torch").split("+")[0]
        print(f"Installing FusionBench into {env}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        for wanted in ([f"torch=={torch_version}"], NEEDS):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        subprocess.run([str(python), "-c", "import fusion_bench.method.opcm.opcm_general"], check=True)
        (env / ".complete").touch()
    return python


def merge(base: Path, experts: Sequence[Path], repeats: int) -> tuple[list[measure.Cost], Path]:
    """Merge with our command; return what it cost each time, and the merged folder."""
    out, recipe = base.with_name("contmerge-opcm"), base.with_name("opcm.yml")
    models.recipe(recipe, "opcm", base, list(experts), dtype="float32", alpha=ALPHA, variant="fusionbench")
    words = measure.contmerge("merge", "from-recipe", str(recipe), str(out))
    return measure.alternate({"contmerge": measure.Command(words, output=out)}, repeats=repeats)["contmerge"], out


def report(ours: Sequence[measure.Cost], peer: Peer, found: Errors, *, has_head: bool) -> None:
    """Print the table and the verdicts."""
    mine, mine_peak = measure.median(ours), measure.median(ours, measure.peak)
    print("| process | wall, s | processor, s | peak memory, MiB |\n|---|---|---|---|")
    cpu = measure.median(ours, measure.cpu)
    print(f"| contmerge merge from-recipe (median of {len(ours)}) | {mine:.2f} | {cpu:.2f} | {mine_peak / 2**20:.0f} |")
    print(f"| FusionBench 0.2.33 (once, {peer.day}) | {peer.wall:.2f} | {peer.cpu:.2f} | {peer.peak / 2**20:.0f} |\n")
    print(
        f"FusionBench's seconds: imports {peer.imports:.1f}, loading {peer.loading:.1f}, merge alone {peer.merge:.1f} "
        f"(of which the output head {peer.head:.1f}), writing {peer.writing:.1f}.\n"
    )
    print(measure.verdict("FusionBench's merge alone / our whole process", peer.merge / mine, 10, at_least=True))
    print(measure.verdict("FusionBench's whole process / our whole process", peer.wall / mine, 10, at_least=True))
    if has_head:
        bare = (peer.merge - peer.head) / mine
        print(f"- FusionBench's merge without the output head / our whole process: {bare:.3g}")
    print(measure.verdict("our peak memory / FusionBench's", mine_peak / peer.peak, 1 / 3))
    print(measure.verdict("our merged - base against float64, relative error", found.ours, 1e-4))
    print(f"- FusionBench's projected matrices against the same float64, relative error: {found.peer:.1e}")
    print(f"  (scale of the whole model: its own is {found.peer_scale:.4f} of the definition's)", flush=True)


def errors(base: Path, experts: Sequence[Path], ours: Path, peer: Path) -> Errors:
    """Re-derive the merge in float64 by its definition, all running sums in memory (8 bytes a weight)."""
    running: dict[str, Tensor] = {}
    squares = [0.0] * len(experts)
    for name in names(base):
        deltas = [tensor(e, name) - tensor(base, name) for e in experts]
        squares = [s + float(d.norm()) ** 2 for s, d in zip(squares, deltas, strict=True)]
        running[name] = fold(deltas, projected=is_projected(name))
    total = math.sqrt(sum(float(r.norm()) ** 2 for r in running.values()))
    scale = sum(map(math.sqrt, squares)) / len(squares) / total
    wrong = sum(_square(tensor(ours, n) - tensor(base, n) - scale * s) for n, s in running.items())
    both = [n for n in running if is_projected(n)]
    size = sum(_square(running[n]) for n in both)
    fitted = sum(float(((tensor(peer, n) - tensor(base, n)) * running[n]).sum()) for n in both) / size
    off = sum(_square(tensor(peer, n) - tensor(base, n) - fitted * running[n]) for n in both)
    return Errors(math.sqrt(wrong) / (scale * total), math.sqrt(off / size) / fitted, fitted / scale)


def fold(deltas: Sequence[Tensor], *, projected: bool) -> Tensor:
    """Return OPCM's running sum of one weight, as published (without its lambda, which cancels)."""
    running = deltas[0]
    for delta in deltas[1:]:
        running = running + (clean(running, delta) if projected else delta)
    return running


def clean(running: Tensor, delta: Tensor) -> Tensor:
    """Remove the block of the leading directions, and the whole diagonal, in the singular basis of the running sum."""
    u, s, vh = torch.linalg.svd(running, full_matrices=False)
    inside = u.T @ delta @ vh.T
    r = int((s.cumsum(0) / s.sum() <= ALPHA).sum())
    removed = torch.diag(inside.diagonal())
    removed[:r, :r] = inside[:r, :r]
    return delta - u @ removed @ vh


def is_projected(name: str) -> bool:
    """Return whether a Llama's weight is one of the matrices that both projects decompose."""
    return name.endswith("_proj.weight")


def names(folder: Path) -> list[str]:
    """Return the names of a model's stored weights."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def tensor(folder: Path, name: str) -> Tensor:
    """Return one weight in float64."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name).double()


def _square(x: Tensor) -> float:
    return float(x.norm()) ** 2


if __name__ == "__main__":
    main()
