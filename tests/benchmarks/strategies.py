"""Training strategies side by side, each with and without merging, on a sequence of real texts forwards and backwards.

    python tests/benchmarks/strategies.py               SmolLM2-135M on four domains out of installed packages
    python tests/benchmarks/strategies.py --data DIR    classification: DIR/<stage>/{train.jsonl,test.jsonl,meta.json}
    python tests/benchmarks/strategies.py --strategies full replay --steps 5

Every strategy trains the whole sequence by the loop, and the rules fold these experts: strategies that rely on memory
cannot help independent ones. With opcm, `full` is also merged from independent experts (`opcm-base`), as its paper has
it. All is kept under --runs, and the same command goes on where it was stopped. ACC, LA and BWT are means over the
orders; the difference to plain fine-tuning (`full`, nothing merged) is paired over the same documents, with one
standard error.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import measure
import models

from hf_contmerge.loop.run import run_recipe
from hf_contmerge.report._results import Results
from hf_contmerge.report.write import load_results
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import Block
from hf_contmerge.scoring.forgetting.lines import Line
from hf_contmerge.scoring.forgetting.paired import mean_change

STRATEGIES: dict[str, dict] = {
    "full": {},
    "replay": {"strategy": ["full", "replay"]},
    "anchor": {"strategy": ["full", "anchor"]},
    "osf": {"strategy": "osf", "learning_rate": 5.0e-5, "parameters": {"effective_rank": 0.75}},
    "lora": {"strategy": "lora", "learning_rate": 2.0e-3},
    "olora": {"strategy": "olora", "learning_rate": 2.0e-3},
    **{
        name: {"strategy": ["full", name]}
        for name in ("migu", "distill", "soup", "ewc", "gpm", "eaft", "talr", "asft", "low_perplexity", "refresh")
    },
    "rates": {"strategy": ["full", "rates"], "parameters": {"factors": {"layers": 0.1}}},
    "slao": {"strategy": "slao", "learning_rate": 2.0e-3},
    "rate_1e-4": {"learning_rate": 1.0e-4},
}
"""Each with its own defaults. Adapters learn at a higher rate, as is usual with them, and osf at a low one."""
MERGES: dict[str, dict] = {
    "magmax": {"rule": "magmax"},
    "opcm": {"rule": "opcm", "start_from": "previous"},
    "blend": {"rule": "blend", "start_from": "previous", "parameters": {"keep": 0, "take": 0.5}},
}
INDEPENDENT = {"opcm-base": {"rule": "opcm", "start_from": "base"}}
TEXTS = ("bible", "pydocs", "recipes", "bank_policies")


@dataclass(frozen=True)
class Row:
    """What one strategy with one way of merging (or none) came to in one order."""

    acc: float | None
    la: float | None
    bwt: float | None
    general: float | None
    seconds: float
    gain: float
    stderr: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--data", type=Path, help="classification sets instead of the packages' texts")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--rules", nargs="+", default=["magmax", "opcm"], choices=MERGES)
    parser.add_argument("--orders", type=int, default=2, choices=(1, 2), help="1: forwards alone")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--heldout", type=int, default=24)
    parser.add_argument("--base", default="quickstart:smollm2")
    args = parser.parse_args()
    names = sorted(p.parent.name for p in args.data.glob("*/meta.json")) if args.data else list(TEXTS)
    stages = [classes(args.data / n, args) if args.data else text(n, args) for n in names]
    found = {name: list(each_order(name, stages, args)) for name in dict.fromkeys(["full", *args.strategies])}
    report(found, args, "accuracy" if args.data else "perplexity")
    print(f"\n{measure.machine(args.models, 'trl', 'peft', 'transformers')}")


def text(name: str, args: argparse.Namespace) -> dict:
    """Return a pretraining stage, measured by the perplexity of its held-out documents."""
    path = f"quickstart:{name}"
    return {"name": name, "dataset": {"path": path, "max_examples": 200, "heldout": args.heldout, "heldout_chars": 900}}


def classes(folder: Path, args: argparse.Namespace) -> dict:
    """Return a stage of prompts and class names, measured by the accuracy of choosing among the classes."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    out = args.runs.absolute() / "data"
    out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for part, count in (("train", 1000), ("test", 4 * args.heldout)):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        made = []
        for row in draw.sample(rows, min(count, len(rows))):
            prompt = f"{row['text'][:400]}\n{meta['instruction']} Options: {', '.join(meta['choices'])}\nAnswer:"
            words = {"prompt": prompt, "completion": f" {meta['choices'][row['gold']]}"}
            question = {"query": prompt, "choices": [f" {c}" for c in meta["choices"]], "gold": row["gold"]}
            made.append(words if part == "train" else question)
        (out / f"{folder.name}-{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made), encoding="utf-8")
    task = {
        "name": f"{folder.name}_classes",
        "kind": "multiple_choice",
        "dataset": str(out / f"{folder.name}-test.jsonl"),
    }
    return {
        "name": folder.name,
        "dataset": {"path": str(out / f"{folder.name}-train.jsonl"), "heldout": 0},
        "tasks": [task],
    }


def each_order(name: str, stages: Sequence[dict], args: argparse.Namespace) -> Iterator[Run]:
    """Run one strategy over the stages, and over the stages backwards."""
    for number, order in enumerate((stages, stages[::-1])[: args.orders], 1):
        train = {
            "max_steps": args.steps, "per_device_train_batch_size": 4, "max_length": 128, "learning_rate": 5.0e-4,
            "warmup_steps": 3, "gradient_checkpointing": False, "save_strategy": "no", **STRATEGIES[name],
        }  # fmt: skip
        general = [{"name": "general_knowledge", "kind": "multiple_choice", "dataset": "quickstart:general_knowledge"}]
        recipe = {
            "name": f"{name}-{number}", "base_model": args.base, "stages": list(order), "train": train,
            "merge": [{"name": n, **entry} for n, entry in merges_of(name, args).items()],
            "evaluate": {"general_tasks": general},
        }  # fmt: skip
        yield run_recipe(parse_recipe(recipe), args.runs / f"{name}-{number}")


def merges_of(strategy: str, args: argparse.Namespace) -> dict[str, dict]:
    """Return the merge entries of a strategy's runs."""
    chosen = {name: MERGES[name] for name in args.rules}
    return {**chosen, **INDEPENDENT} if strategy == "full" and "opcm" in chosen else chosen


def report(found: dict[str, list[Run]], args: argparse.Namespace, block: Block) -> None:
    """Print the table, one row for each strategy and way of merging."""
    plain = [load_results(run) for run in found["full"]]
    unit = "nats a word" if block == "perplexity" else "share of documents"
    print(f"Utility in {unit}; means over {args.orders} orders.\n")
    print("| strategy | merged by | ACC | better than plain by | LA | BWT | general delta | seconds |\n|" + "---|" * 8)
    for name, runs in found.items():
        for way in ("", *merges_of(name, args)):
            rows = [row_of(run, way, block, base) for run, base in zip(runs, plain, strict=True)]
            acc, la, bwt, general = (mean([getattr(r, k) for r in rows]) for k in ("acc", "la", "bwt", "general"))
            gain = statistics.mean(r.gain for r in rows)
            error = math.sqrt(sum(r.stderr**2 for r in rows)) / len(rows)
            seconds = statistics.mean(r.seconds for r in rows)
            told = "" if (name, way) == ("full", "") else f"{gain:+.3f} ± {error:.3f}"
            print(f"| {name} | {way or '-'} | {acc} | {told} | {la} | {bwt} | {general} | {seconds:.0f} |")


def row_of(run: Run, way: str, block: Block, plain: Results) -> Row:
    """Return the figures of one run's line: its experts' own, or a merge's."""
    results = load_results(run)
    line = next(x for x in (*results.merges, *results.experts) if x.name == (way or "previous"))
    metrics = line.metrics(results.stages, results.general_tasks, block)
    general = line.metrics(results.stages, results.general_tasks, "accuracy")["general_delta"]
    base = next(x for x in plain.experts if x.name == "previous")
    change = mean_change([(line.rows[-1], base.rows[-1], s.task_names()) for s in results.stages], block)
    assert change
    return Row(
        metrics["acc"], metrics["la"], metrics["bwt"], general, seconds_of(run, line), change.mean, change.stderr or 0
    )


def seconds_of(run: Run, line: Line) -> float:
    """Return what training, and merging if the line is a merge's, took in all."""
    entry = next((e for e in run.recipe.merge if e.name == line.name), None)
    kind = "base" if line.name in INDEPENDENT else "previous"
    total = 0.0
    for t in run.stage_numbers():
        total += run.expert(t, kind).record("train")["seconds"]
        total += run.merged(t, entry).record("merge")["seconds"] if entry else 0
    return total


def mean(values: Sequence[float | None]) -> str:
    """Return the mean in words, or a dash if a part was not measured."""
    known = [v for v in values if v is not None]
    return f"{statistics.mean(known):.3f}" if len(known) == len(values) else "-"


if __name__ == "__main__":
    main()
