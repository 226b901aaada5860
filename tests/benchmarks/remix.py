"""What a search of stage weights costs, next to the training of a stage: `contmerge remix` after a run of four stages.

    python tests/benchmarks/remix.py                                        a small Llama, four texts
    python tests/benchmarks/remix.py --base quickstart:smollm2 --steps 20   SmolLM2-135M

The stages are the quickstart's four texts, each trained from the base alone; the kept task is the text of its general
questions. Costs are seconds of CPU of this process, so that other work on the machine does not count. All is kept under
--runs: remove the folder to measure again.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ["HF_CONTMERGE_CACHE"] = "off"

import measure

from hf_contmerge import finetune_stage
from hf_contmerge.commands.main import main as contmerge
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.quickstart import load_quickstart
from hf_contmerge.runtime.records import read_record
from hf_contmerge.testing.toys import toy_llama

STAGES = ("bible", "pydocs", "recipes", "bank_policies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/remix"))
    parser.add_argument("--base", help="default: a toy, trained here for a while")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tries", type=int, default=64)
    args = parser.parse_args()
    base = args.base or str(toy_base(args.runs))
    start = time.process_time()
    run = run_recipe(parse_recipe(recipe(base, args.steps)), args.runs / "run", until="train")
    stage = (time.process_time() - start) / len(STAGES)
    out, want = args.runs / f"remix-{args.tries}", ",".join(f"{name}=1" for name in STAGES)
    start = time.process_time()
    code = contmerge(["remix", str(run.folder), "--want", want, "--tries", str(args.tries), "-o", str(out)])
    assert code == 0
    whole, record = time.process_time() - start, read_record(out / "remix.json", "")
    tries = record["tries"]
    print("| what | seconds of CPU |\n|---|---:|")
    print(f"| training a stage ({args.steps} steps of 8 x 128 tokens), with start-up, mean of four | {stage:.0f} |")
    print(f"| {len(tries)} candidates, with the base, the experts, the merge and its test scores | {whole:.0f} |")
    first, best = tries[0], next(t for t in tries if t["taken"])
    for name, each in (("as in the run", first), ("chosen", best)):
        gain, worst = each["learning"], min(s["mean"] for s in each["kept"])
        weights = ", ".join(f"{w:.2f}" for w in each["weights"])
        print(f"{name}: weights {weights}; {100 * gain['mean']:.0f} % of the gain "
              f"({100 * gain['low']:.0f} to {100 * gain['high']:.0f}), general {worst:+.3f} nats")  # fmt: skip
    print(f"on test documents: {record['test']}")
    print(measure.machine(args.runs, "trl", "transformers"))


def toy_base(runs: Path) -> Path:
    """Return a small Llama that has read some of each text."""
    start = toy_llama(runs / "start", seed=0, hidden=128, layers=4) if not (runs / "start").exists() else runs / "start"
    texts = [row["text"] for name in STAGES for row in load_quickstart(name)[-300:]]
    texts += [row["query"] for row in load_quickstart("general_knowledge")]
    import datasets

    data: Any = datasets.Dataset.from_dict({"text": texts})
    fields = {"learning_rate": 2e-3, "max_steps": 150, "per_device_train_batch_size": 8, "max_length": 128}
    return Path(finetune_stage(start, data, runs / "base", base=start, save_strategy="no", **fields))


def recipe(base: str, steps: int) -> dict[str, Any]:
    """Return the recipe of four stages."""
    stages = [
        {"name": n, "dataset": {"path": f"quickstart:{n}", "max_examples": 600, "heldout": 24, "heldout_chars": 900}}
        for n in STAGES
    ]
    kept = {"path": "quickstart:general_knowledge", "text": "{query}", "heldout": 48}
    return {
        "name": "remix", "base_model": base, "stages": stages, "merge": [{"rule": "average", "start_from": "base"}],
        "train": {
            "max_steps": steps, "per_device_train_batch_size": 8, "max_length": 128, "learning_rate": 5e-4,
            "save_strategy": "no", "gradient_checkpointing": False,
        },
        "evaluate": {"general_tasks": [{"name": "questions", "kind": "perplexity", "dataset": kept}]},
    }  # fmt: skip


if __name__ == "__main__":
    main()
