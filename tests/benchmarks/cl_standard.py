"""A study of cl-standard on SmolLM2-135M: four classification tasks in six orders; linear mixes of its experts.

    python tests/benchmarks/cl_standard.py write DATA out/cl        cl.yml and study.yml
    contmerge study out/cl/study.yml
    python tests/benchmarks/cl_standard.py mix out/cl/studies/cl/runs/*order-1*      other mixes of the same experts

DATA holds cl_standard/agnews, amazon, dbpedia and yahoo, each with train.jsonl and test.jsonl (text, and gold: the
number of the class), general/wikitext2/test.jsonl, eval/arc_easy.jsonl and, with prompt and completion,
instruct/dolly_hhrlhf/train.jsonl. The setting `general` mixes a tenth of the last into every batch. Answers are words
of one token, so that a question costs one forward pass. Texts of 40 to 400 characters are taken. A mix is judged after
the last stage: mean accuracy over the stages, the newest stage, the mean of the earlier ones, questions, and WikiText's
nats.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml

from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.locate import ModelFolders
from hf_contmerge.scoring.score import load_to_score, score_loaded

CLASSES = {
    "agnews": ("Topic", "World Sports Business Science"),
    "amazon": ("Rating", "terrible bad okay good great"),
    "dbpedia": (
        "Class",
        "Company School Artist Athlete Politician Vehicle Building Nature Village Animal Plant Album Film Book",
    ),
    "yahoo": ("Topic", "Society Science Health Education Computers Sports Business Entertainment Family Politics"),
}  # fmt: skip
"""Task -> the word before the answer, and the classes in the order of their numbers."""
ORDERS = [["dbpedia", "amazon", "yahoo", "agnews"], ["dbpedia", "amazon", "agnews", "yahoo"],
          ["yahoo", "amazon", "agnews", "dbpedia"], ["amazon", "yahoo", "agnews", "dbpedia"],
          ["yahoo", "agnews", "dbpedia", "amazon"], ["agnews", "dbpedia", "amazon", "yahoo"]]  # fmt: skip
"""The literature's orders 1 to 3, then the rotations of order 1: with it, each task is once in each place."""
CHARS = range(40, 401)

Mix = Mapping[str, list[float]]
MIXES: dict[str, Mix] = {
    "plain": {"weights": [0, 0, 0, 1]},
    "newest, half": {"weights": [0, 0, 0, 0.5]},
    "newest, 0.6": {"weights": [0, 0, 0, 0.6]},
    "newest, a quarter less": {"weights": [0, 0, 0, 0.75]},
    "blend keep 0.3, take 0.5": {"weights": [0.0135, 0.045, 0.15, 0.5]},
    "0.25 third, 0.75 newest": {"weights": [0, 0, 0.25, 0.75]},
    "0.2 third, 0.4 newest": {"weights": [0, 0, 0.2, 0.4]},
    "0.05, 0.1, 0.15, 0.4": {"weights": [0.05, 0.1, 0.15, 0.4]},
    "0.1 each, 0.4 newest": {"weights": [0.1, 0.1, 0.1, 0.4]},
    "0.7 average": {"weights": [0.175] * 4},
    "0.8 newest and 0.2 each": {"weights": [0.2, 0.2, 0.2, 0.8]},
    "newest and 0.1 each": {"weights": [0.1, 0.1, 0.1, 1]},
    "magmax 0.4": {"magmax": [0.4]},
    "magmax 0.5": {"magmax": [0.5]},
    "magmax 0.6": {"magmax": [0.6]},
    "magmax 1": {"magmax": [1.0]},
}
"""Weights of the experts' changes, which were trained one from the other, or MagMax's lambda."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("data", type=Path)
    writing.add_argument("out", type=Path)
    writing.add_argument("--steps", type=int, default=30)
    writing.add_argument("--limit", type=int, default=64, help="documents of each task")
    mixing = commands.add_parser("mix")
    mixing.add_argument("runs", type=Path, nargs="+")
    mixing.add_argument("--mixes", type=Path, help="JSON in the place of the mixes here")
    args = parser.parse_args()
    if args.command == "write":
        write(args)
    else:
        mixes = json.loads(args.mixes.read_text()) if args.mixes else MIXES
        for run in args.runs:
            mix(Run.load(run), mixes)


def write(args: argparse.Namespace) -> None:
    """Write data, recipe and study."""
    data, out = args.data.resolve(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in CLASSES:
        for split in ("train", "test"):
            rows = list(_rows(data / "cl_standard" / name / f"{split}.jsonl", name))
            (out / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dialogues = map(json.loads, (data / "instruct/dolly_hhrlhf/train.jsonl").read_text(encoding="utf-8").splitlines())
    short = [row for row in dialogues if len(row["prompt"]) + len(row["completion"]) < 800]
    (out / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    questions = {"kind": "multiple_choice"}
    stages = [
        {"name": name,
         "dataset": {"path": str(out / f"{name}-train.jsonl"), "max_examples": 8 * args.steps, "heldout": 0},
         "tasks": [{"name": f"{name}_class", **questions, "dataset": str(out / f"{name}-test.jsonl")}]}
        for name in ORDERS[0]
    ]  # fmt: skip
    general = [
        {"name": "wikitext", "kind": "perplexity",
         "dataset": {"path": str(data / "general/wikitext2/test.jsonl"), "heldout": 16, "heldout_chars": 800}},
        {"name": "arc_easy_words", **questions, "dataset": str(data / "eval/arc_easy.jsonl")},
    ]  # fmt: skip
    train = {
        "strategy": "full", "max_steps": args.steps, "per_device_train_batch_size": 8, "max_length": 192,
        "learning_rate": 1.0e-4, "warmup_steps": 3, "lr_scheduler_type": "cosine", "gradient_checkpointing": False,
        "save_strategy": "no",
    }  # fmt: skip
    merge = [{"rule": "magmax", "start_from": "previous"}, {"rule": "average", "start_from": "previous"},
             {"rule": "blend", "start_from": "previous", "parameters": {"keep": 0, "take": 0.5}}]  # fmt: skip
    parameters = {"share": 0, "general": str(out / "general.jsonl"), "general_share": 0.1, "within_batch": True}
    settings = [{"name": "general", "set": {"train.strategy": ["full", "replay"],
                                            "train.parameters": {"replay": parameters}}}]  # fmt: skip
    recipe = {
        "name": "cl", "base_model": "quickstart:smollm2", "stages": stages, "train": train, "merge": merge,
        "evaluate": {"limit": args.limit, "general_tasks": general},
    }  # fmt: skip
    study = {"name": "cl", "recipe": "cl.yml", "orders": ORDERS, "seeds": [0, 1],
             "vary": {"train.learning_rate": [2e-5, 1e-4, 5e-4]}, "settings": settings}  # fmt: skip
    (out / "cl.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (out / "study.yml").write_text(yaml.safe_dump(study, sort_keys=False))


def _rows(file: Path, name: str) -> Iterator[dict[str, object]]:
    """Yield rows for training (prompt, completion) and asking (query, choices, gold)."""
    word, classes = CLASSES[name][0], CLASSES[name][1].split()
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if len(row["text"]) in CHARS:
            prompt = f"{row['text'].strip()}\n{word}:"
            yield {"prompt": prompt, "completion": f" {classes[row['gold']]}", "query": prompt, "choices": classes,
                   "gold": row["gold"]}  # fmt: skip


def mix(run: Run, mixes: Mapping[str, Mix]) -> None:
    """Print a table of mixes of a run's experts."""
    logging.disable(logging.WARNING)
    count = len(run.recipe.stages)
    folders = [run.expert(t, "base" if t == 1 else "previous").folder / "expert" for t in range(1, count + 1)]
    base, experts = Weights(resolve_model(run.recipe.base_model)), [Weights(folder) for folder in folders]
    tasks = tuple(run.recipe.measured(run.stage_numbers()))
    request = ScoreRequest(tasks, run.tasks, run.recipe.evaluate)
    model, tokenizer = load_to_score(
        ModelFolders(folders[-1], None), request.evaluate, "bfloat16", trust_remote_code=False
    )
    own = [stage.tasks[0].name for stage in run.recipe.stages]
    zero: float | None = None
    print(f"\n{run.folder.name}\n\n| mix | all stages | newest | earlier | questions | WikiText |")
    print("|---|" + "---:|" * 5)
    for name, how in {"base": {"weights": [0] * count}, **mixes}.items():
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                start = base.tensor(key).float()
                changes = torch.stack([expert.tensor(key).float() - start for expert in experts])
                parameter.copy_(start + _mixed(changes, how))
        scores = {task: s.utility for task, s in score_loaded(model, tokenizer, request, ranks=OneRank()).items()}
        zero = scores["wikitext"] if zero is None else zero
        stages = [scores[task] for task in own]
        cells = [sum(stages) / count, stages[-1], sum(stages[:-1]) / (count - 1), scores["arc_easy_words"]]
        print(
            f"| {name} | {' | '.join(f'{100 * x:.1f}' for x in cells)} | {scores['wikitext'] - zero:+.3f} |", flush=True
        )


def _mixed(changes: torch.Tensor, how: Mix) -> torch.Tensor:
    if "magmax" in how:
        return how["magmax"][0] * changes.gather(0, changes.abs().argmax(0, keepdim=True))[0]
    return torch.tensordot(torch.tensor(how["weights"], dtype=changes.dtype), changes, 1)


if __name__ == "__main__":
    main()
