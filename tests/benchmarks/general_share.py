"""How much general data a stage needs: general change and learning at shares of 0, 5, 10 and 20 %.

    python tests/benchmarks/general_share.py                       SmolLM2-135M, two seeds
    python tests/benchmarks/general_share.py --steps 8 --seeds 0   one seed, fewer steps
    python tests/benchmarks/general_share.py --rows 0 written      plain, and with replay that the model writes


One stage is trained on recipes, plainly and with a share of two other texts mixed in (`replay: {general_share}`, in
every batch), or with a fifth that the start model writes itself (`replay: {synthesise}`). Learning is measured on
held-out recipes. General change is measured on documents of the general texts without those trained on, on a text that
is in neither, and on general questions. All changes are against the base, in nats per word (of questions: points), with
one standard error over documents, averaged over the seeds. All is kept under --runs, and the same command goes on where
it was stopped.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import measure

from hf_contmerge.loop.run import run_recipe
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import load_scores
from hf_contmerge.runtime.quickstart import load_quickstart
from hf_contmerge.scoring.forgetting.paired import mean_change

ROWS = {"0": 0.0, "5": 0.05, "10": 0.1, "20": 0.2, "written": 0.2}
"""General share in percent -> the share; `written`: of documents that the start model writes."""
MIXED = ("general-train.jsonl", "synthesised")
STAGE, GENERAL, OTHER = "recipes", ("bible", "pydocs"), "bank_policies"
COLUMNS = {"learnt": "recipes_heldout", "general texts": "general", "another text": "other", "questions": "questions"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/general-share"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rate", type=float, default=5.0e-4)
    parser.add_argument("--heldout", type=int, default=24)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--base", default="quickstart:smollm2")
    args = parser.parse_args()
    write_texts(args.runs, args.heldout)
    print("| general share | " + " | ".join(COLUMNS) + " | loss of general data, first → last | seconds |")
    print("|---:|" + "---:|" * (len(COLUMNS) + 2))
    for row in args.rows:
        runs = [run_recipe(parse_recipe(recipe(row, seed, args)), folder(row, seed, args)) for seed in args.seeds]
        name = f"{100 * ROWS[row]:.0f} %{', written by the model' if row == 'written' else ''}"
        print(f"| {name} | {' | '.join(cell(runs, task) for task in COLUMNS.values())} | {costs(runs)} |", flush=True)
    print(f"\n{measure.machine(args.runs, 'trl', 'transformers')}")


def folder(row: str, seed: int, args: argparse.Namespace) -> Path:
    return args.runs / f"share-{row}-seed-{seed}"


def write_texts(home: Path, heldout: int) -> None:
    """Write the general texts, split into examples and documents that are measured, and the other text."""
    home.mkdir(parents=True, exist_ok=True)
    texts = {name: [row["text"] for row in load_quickstart(name)] for name in (*GENERAL, OTHER)}
    each = heldout // len(GENERAL)
    parts = {
        "general-train": [text for name in GENERAL for text in texts[name][each : each + 200]],
        "general-measured": [text[:900] for name in GENERAL for text in texts[name][:each]],
        "other-measured": [text[:900] for text in texts[OTHER][:heldout]],
    }
    for name, documents in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        (home / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def recipe(row: str, seed: int, args: argparse.Namespace) -> dict:
    """Return the recipe of one stage with a general share."""
    share = ROWS[row]
    replay = {"general": str(args.runs / "general-train.jsonl"), "general_share": share, "within_batch": True}
    if row == "written":
        replay = {"synthesise": 48, "synthesise_tokens": 96, "share": share, "within_batch": True}
    stage = {"path": f"quickstart:{STAGE}", "max_examples": 200, "heldout": args.heldout, "heldout_chars": 900}
    general = [
        {"name": "questions", "kind": "multiple_choice", "dataset": "quickstart:general_knowledge"},
        *(
            {"name": n, "kind": "perplexity", "dataset": {"path": str(args.runs / f"{n}-measured.jsonl"), "heldout": 0}}
            for n in ("general", "other")
        ),
    ]
    return {
        "name": f"share-{row}", "base_model": args.base, "seed": seed, "merge": ["average"],
        "stages": [{"name": STAGE, "dataset": stage}], "evaluate": {"general_tasks": general},
        "train": {
            "strategy": ["full", "replay"] if share else "full", "parameters": {"replay": replay} if share else {},
            "max_steps": args.steps, "per_device_train_batch_size": 4, "max_length": 128, "learning_rate": args.rate,
            "warmup_steps": 3, "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1,
        },
    }  # fmt: skip


def cell(runs: Sequence[Run], task: str) -> str:
    """Return a task's mean change from the base over the seeds."""
    block = "accuracy" if task == "questions" else "perplexity"
    scores = [(load_scores(run.expert(1, "base")), load_scores(run.base)) for run in runs]
    changes = [change for new, old in scores if (change := mean_change([(new, old, [task])], block))]
    mean = statistics.mean(change.mean for change in changes)
    error = math.sqrt(statistics.mean((change.stderr or 0) ** 2 for change in changes))
    scale, digits = (100, 1) if task == "questions" else (1, 3)
    return f"{scale * mean:+.{digits}f} ± {scale * error:.{digits}f}"


def costs(runs: Sequence[Run]) -> str:
    """Return the general data's loss while training, and the seconds of training."""
    records = [run.expert(1, "base").record("train") for run in runs]
    seconds = f"{statistics.mean(record['train_seconds'] for record in records):.0f}"
    parts = [part for record in records for part in record.get("mixed", ()) if part["source"] in MIXED]
    if not parts:
        return f" | {seconds}"
    first, last = (statistics.mean(part[word] for part in parts) for word in ("first_loss", "loss"))
    return f"{first:.2f} → {last:.2f} | {seconds}"


if __name__ == "__main__":
    main()
