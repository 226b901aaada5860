"""What a stage learns and loses by its objective: demonstrations (SFT, SDFT), rewards (GRPO), labelled answers (KTO).

    python tests/benchmarks/by_itself.py               SmolLM2-135M-Instruct, one seed, ten minutes on two cores
    python tests/benchmarks/by_itself.py --steps 2 --only GRPO

One stage of small sums, after two solved ones. GRPO gets 1 for the right number and no demonstration; SFT and SDFT see
it; KTO sees the right number and a wrong one, with a label each. Learning is the share of right answers to held-out
sums. General change is measured on texts and questions that the stage does not teach, against the base, with one
standard error over documents. All is kept under --runs, and the same command goes on where it was stopped.
"""

import argparse
import json
import random
from pathlib import Path

import measure

from hf_contmerge.loop.run import run_recipe
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import load_scores
from hf_contmerge.runtime.quickstart import load_quickstart
from hf_contmerge.scoring.forgetting.paired import mean_change

SHOWN = "2 + 3 = 5\n7 - 1 = 6\n"
SAMPLED = {"num_generations": 8, "max_completion_length": 3, "per_device_train_batch_size": 16}
LEARN = {
    "SFT": {"per_device_train_batch_size": 16, "completion_only_loss": True},
    "SDFT": {"learn": "sdft", **SAMPLED, "teacher_prompt_template": "The result is{privileged_context}.\n{prompt}"},
    "GRPO": {"learn": "grpo", "rewards": ["exact_match"], **SAMPLED},
    "KTO": {"learn": "kto", "per_device_train_batch_size": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/by-itself"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=LEARN, default=list(LEARN))
    parser.add_argument("--rate", type=float, default=1.0e-5)
    parser.add_argument("--base", default="quickstart:smollm2")
    args = parser.parse_args()
    write_data(args.runs)
    print("| objective | right sums, base → stage | texts, nats per word | questions, points | reward | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in args.only:
        run = run_recipe(parse_recipe(recipe(name, LEARN[name], args)), args.runs / name.lower())
        print(f"| {name} | {' | '.join(cells(run))} |", flush=True)
    print(f"\n{measure.machine(args.runs, 'trl', 'transformers')}")


def write_data(home: Path) -> None:
    """Write sums with results of one digit: examples, and others that are measured."""
    home.mkdir(parents=True, exist_ok=True)
    sums = [(a, "+", b, a + b) for a in range(10) for b in range(10 - a)]
    sums += [(a, "-", b, a - b) for a in range(10) for b in range(a + 1)]
    random.Random(0).shuffle(sums)
    rows = [{"prompt": f"{SHOWN}{a} {sign} {b} =", "completion": f" {c}", "answer": str(c)} for a, sign, b, c in sums]
    texts = [{"text": row["text"][:900]} for name in ("bible", "pydocs") for row in load_quickstart(name)[:8]]
    judged = [{"prompt": row["prompt"], "completion": f" {(int(row['answer']) + off) % 10}", "label": off == 0}
              for i, row in enumerate(rows[:70]) for off in (0, 1 + i % 9)]  # fmt: skip
    parts = {"sums": rows[:70], "judged": judged, "measured": rows[70:], "texts": texts}
    for name, part in parts.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def recipe(name: str, train: dict, args: argparse.Namespace) -> dict:
    """Return the recipe of one stage by an objective."""
    files = {word: str(args.runs / f"{word}.jsonl") for word in ("sums", "judged", "measured", "texts")}
    learnt = files["judged" if train.get("learn") == "kto" else "sums"]
    return {
        "name": name.lower(), "base_model": args.base, "merge": ["average"],
        "stages": [{"name": "sums", "dataset": {"path": learnt, "heldout": 0}, "tasks": [
            {"name": "right", "kind": "exact_match", "question": "prompt", "answer": "answer", "max_new_tokens": 4,
             "dataset": files["measured"]}]}],
        "train": {**train, "max_steps": args.steps, "learning_rate": args.rate, "logging_steps": 4,
                  "gradient_checkpointing": False, "save_strategy": "no"},
        "evaluate": {"general_tasks": [
            {"name": "texts", "kind": "perplexity", "dataset": {"path": files["texts"], "heldout": 0}},
            {"name": "questions", "kind": "multiple_choice", "dataset": "quickstart:general_knowledge"}]},
    }  # fmt: skip


def cells(run: Run) -> list[str]:
    """Return a run's row: learning, general changes, reward, cost."""
    place = run.expert(1, "base")
    new, old, record = load_scores(place), load_scores(run.base), place.record("train")
    texts, questions = (mean_change([(new, old, [task])], block) for task, block in
                        (("texts", "perplexity"), ("questions", "accuracy")))  # fmt: skip
    assert texts
    assert questions
    rewards = [point["reward"] for point in record["log"] if "reward" in point]
    return [
        f"{old['right'].value:.2f} → {new['right'].value:.2f}",
        f"{texts.mean:+.3f} ± {texts.stderr or 0:.3f}",
        f"{100 * questions.mean:+.1f} ± {100 * (questions.stderr or 0):.1f}",
        f"{rewards[0]:.2f} → {rewards[-1]:.2f}" if rewards else "",
        f"{record['train_seconds']:.0f}",
    ]


if __name__ == "__main__":
    main()
