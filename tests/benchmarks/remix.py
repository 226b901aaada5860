"""What a candidate of `contmerge remix` costs, next to a step of training: four stages of the quickstart's texts.

    python tests/benchmarks/remix.py                             a Llama of 0.7M parameters
    python tests/benchmarks/remix.py --base quickstart:smollm2   SmolLM2-135M

The experts are the base with noise: what they learnt changes no cost. Costs are seconds of CPU of this process, so
that other work on the machine counts little, and differences of two runs, so that start-up does not count at all. All
is kept under --runs: remove the folder to measure again.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_CONTMERGE_CACHE"] = "off"

import measure
import torch

from hf_contmerge import finetune_stage
from hf_contmerge.commands.main import main as contmerge
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.loading import load_model, load_tokenizer
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.testing.toys import toy_llama

STAGES = ("bible", "pydocs", "recipes", "bank_policies")
BATCH, LENGTH = 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/remix"))
    parser.add_argument("--base", help="default: a toy")
    parser.add_argument("--steps", type=int, nargs=2, default=[10, 40], metavar=("FEW", "MANY"))
    parser.add_argument("--tries", type=int, nargs=2, default=[4, 20], metavar=("FEW", "MANY"))
    args = parser.parse_args()
    base = resolve_model(args.base) if args.base else toy_llama(args.runs / "base", seed=0, hidden=128, layers=4)
    for seed, name in enumerate(STAGES):
        expert_of(base, args.runs / name, seed)
    run = run_recipe(parse_recipe(recipe(base, args.runs)), args.runs / "run", until="train")
    want = ",".join(f"{name}=1" for name in STAGES)

    def search(tries: int) -> None:
        out = str(args.runs / f"remix-{tries}")
        assert contmerge(["remix", str(run.folder), "--want", want, "--tries", str(tries), "-o", out]) == 0

    def train(steps: int) -> None:
        finetune_stage(
            base, f"quickstart:{STAGES[0]}", args.runs / f"trained-{steps}", base=base, max_steps=steps,
            per_device_train_batch_size=BATCH, max_length=LENGTH, learning_rate=1e-4, save_strategy="no",
        )  # fmt: skip

    step, candidate = cost(train, *args.steps), cost(search, *args.tries)
    print("| what | seconds of CPU |\n|---|---:|")
    print(f"| a training step of {BATCH} x {LENGTH} tokens | {step:.2f} |")
    print(f"| a candidate of four stages, five tasks | {candidate:.2f} |")
    print(f"64 candidates cost as much as {64 * candidate / step:.0f} steps.")
    print(measure.machine(args.runs, "trl", "transformers"))


def cost(work: Callable[[int], None], few: int, many: int) -> float:
    """Return the seconds of CPU of one more."""
    times = []
    for count in (few, many):
        start = time.process_time()
        work(count)
        times.append(time.process_time() - start)
    return (times[1] - times[0]) / (many - few)


def expert_of(base: Path, out: Path, seed: int) -> None:
    """Write the base with noise."""
    model, noise = load_model(base, base, dtype=torch.float32), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=noise))
    model.save_pretrained(out)
    load_tokenizer(base).save_pretrained(out)


def recipe(base: Path, experts: Path) -> dict[str, Any]:
    """Return the recipe of four given experts, each with a text to measure."""

    def task(name: str) -> dict[str, Any]:
        text = "{query}" if name == "general_knowledge" else None
        dataset = {"path": f"quickstart:{name}", "text": text, "heldout": 24, "heldout_chars": 900}
        return {"name": f"{name}_text", "kind": "perplexity", "dataset": dataset}

    stages = [{"name": name, "expert": str(experts / name), "tasks": [task(name)]} for name in STAGES]
    general = {"general_tasks": [task("general_knowledge")]}
    return {"name": "remix", "base_model": str(base), "stages": stages, "merge": ["average"], "evaluate": general}


if __name__ == "__main__":
    main()
