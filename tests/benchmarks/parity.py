"""How exact the merges are: the loop and the stock mergekit-yaml against float64, and against each other.

    python tests/benchmarks/parity.py                                   toy Llamas, tied and untied
    python tests/benchmarks/parity.py --run runs/quickstart             and the experts of a run

Prints a Markdown table. Relative error: |(merged - base) - exact| / |exact| over all tensors (Frobenius), where exact
is each rule's definition in float64, with LAPACK's SVD of the running sum.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' toys
from toys.models import perturbed, toy_llama

from hf_contmerge.merge_rules import MergeRule, Norms, Weight, get_rule
from hf_contmerge.merge_rules.opcm import Opcm
from hf_contmerge.merging.in_mergekit.replay import mergekit_yaml
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run

CASES = [
    ("magmax", {}),
    ("average", {}),
    ("opcm", {"variant": "fusionbench"}),
    ("opcm", {"variant": "block"}),
    ("opcm", {"variant": "paper"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run folder whose experts are measured too")
    args = parser.parse_args()
    print("| model | rule | loop, error | mergekit-yaml, error | equal to the last bit | loop, s | mergekit-yaml, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, base, experts_of in models(args.run, Path(scratch)):
            for rule_name, parameters in CASES:
                row(name, base, experts_of[rule_name == "opcm"], rule_name, parameters)


def models(run_folder: str | None, scratch: Path) -> Iterator[tuple[str, Path, tuple[list[Path], list[Path]]]]:
    """Yield (name, base, (sequential experts, independent experts))."""
    for tied in (True, False):
        folder = scratch / ("tied" if tied else "untied")
        base = toy_llama(folder / "base", seed=0, tied=tied, hidden=64)
        experts = [perturbed(base, folder / f"e{i}", seed=i, size=0.02) for i in (1, 2, 3)]
        yield f"toy Llama, {folder.name}", base, (experts, experts)
    if run_folder:
        run = Run.load(run_folder)
        kinds = [[run.expert(t, k).model for t in run.stage_numbers()] for k in ("previous", "base")]
        yield run.recipe.base_model, run.base_model, (kinds[0], kinds[1])


def row(name: str, base: Path, experts: Sequence[Path], rule_name: str, parameters: dict) -> None:
    """Measure one case and print its line."""
    rule = get_rule(rule_name, **parameters)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        loop = by_loop(rule, base, experts, Path(scratch))
        middle = time.perf_counter()
        stock = by_mergekit(rule_name, rule, base, experts, Path(scratch))
        end = time.perf_counter()
        errors = relative_errors(rule, base, experts, (Weights(loop), Weights(stock)))
        same = all(torch.equal(Weights(loop).tensor(n), Weights(stock).tensor(n)) for n in Weights(loop).names)
    label = f"{rule_name} {parameters['variant']}" if parameters else rule_name
    times = f"{middle - start:.1f} | {end - middle:.1f}"
    print(f"| {name} | {label} | {errors[0]:.1e} | {errors[1]:.1e} | {'yes' if same else 'NO'} | {times} |", flush=True)


def by_loop(rule: MergeRule, base: Path, experts: Sequence[Path], scratch: Path) -> Path:
    """Merge stage by stage, as a run does; return the last merged folder, in float32."""
    running, norms, weights = None, (), Weights(base)
    for i, expert in enumerate(experts):
        folders = [scratch / f"{kind}{i}" for kind in ("running", "merged")]
        for folder in folders:
            folder.mkdir()
        merged = merge_experts(
            rule, weights, [open_expert(expert, weights)], running=running, earlier=norms,
            running_out=folders[0], merged_out=Output(folders[1], torch.float32),
        )  # fmt: skip
        running, norms = folders[0], merged.norms.experts
    return folders[1]


def by_mergekit(name: str, rule: MergeRule, base: Path, experts: Sequence[Path], scratch: Path) -> Path:
    """Merge with the stock command."""
    recipe, out = scratch / "merge.yml", scratch / "mergekit"
    recipe.write_text(mergekit_yaml(name, rule, base=base, experts=experts, dtype=torch.float32))
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(recipe), str(out), "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def relative_errors(rule: MergeRule, base: Path, experts: Sequence[Path], results: Sequence[Weights]) -> list[float]:
    """Re-derive the merge in float64, all running sums in memory (8 bytes a parameter)."""
    base_weights, expert_weights = Weights(base), [Weights(e) for e in experts]
    vocabulary, squares = base_weights.vocabulary, [0.0] * len(experts)
    running: dict[str, Tensor] = {}
    for name in base_weights.floating():
        start = base_weights.tensor(name).double()
        deltas = [e.tensor(name).double() - start for e in expert_weights]
        squares = [s + float(d.norm()) ** 2 for s, d in zip(squares, deltas, strict=True)]
        running[name] = exact_running(rule, deltas, matrix=is_matrix(name, start.shape, vocabulary))
    total = math.sqrt(sum(float(r.norm()) ** 2 for r in running.values()))
    scale = rule.scale(Norms(tuple(map(math.sqrt, squares)), total))
    wrong = [0.0] * len(results)
    for name, exact in running.items():
        start = base_weights.tensor(name).double()
        for i, result in enumerate(results):
            wrong[i] += float((result.tensor(name).double() - start - scale * exact).norm()) ** 2
    return [math.sqrt(w) / (scale * total) for w in wrong]


def exact_running(rule: MergeRule, deltas: Sequence[Tensor], *, matrix: bool) -> Tensor:
    running = torch.zeros_like(deltas[0])
    for delta in deltas:
        if isinstance(rule, Opcm) and matrix and bool(running.any()):
            running = running + exact_clean(rule, running, delta)
        else:
            running = rule.update(running, delta, Weight("", False, 1))
    return running


def exact_clean(rule: Opcm, running: Tensor, delta: Tensor) -> Tensor:
    """The projection by its definition, with LAPACK's SVD in float64."""
    u, s, vh = torch.linalg.svd(running, full_matrices=False)
    coefficients, share = u.T @ delta @ vh.T, s.cumsum(0) / s.sum()
    kept = delta - u @ coefficients @ vh
    if rule.variant == "paper":
        r = int((share < rule.alpha).sum()) + 1
        # Rows i < r and columns j < r go whole, with what of them lies outside the span of the thin bases.
        kept = kept - u[:, :r] @ (u[:, :r].T @ kept) - (kept @ vh[:r].T) @ vh[:r]
        coefficients[:r] = 0
        coefficients[:, :r] = 0
    else:
        r = int((share <= rule.alpha).sum())
        coefficients[:r, :r] = 0
    if rule.variant != "block":
        coefficients.diagonal().zero_()
    return kept + u @ coefficients @ vh


if __name__ == "__main__":
    main()
