"""A study of cl-standard on SmolLM2-135M: four classification tasks in six orders; linear mixes of its experts.

    python tests/benchmarks/cl_standard.py write DATA out/cl        cl.yml and study.yml
    contmerge study out/cl/study.yml
    python tests/benchmarks/cl_standard.py mix out/cl/studies/cl/runs/*order-1*      other mixes of the same experts
    contmerge run out/cl/rules.yml --run out/cl/runs/rules --until train             an expert of each task
    python tests/benchmarks/cl_standard.py rules out/cl/runs/rules                   each rule's merge of these four

DATA holds cl_standard/agnews, amazon, dbpedia and yahoo, each with train.jsonl and test.jsonl (text, and gold: the
number of the class), general/wikitext2/test.jsonl, eval/arc_easy.jsonl and, with prompt and completion,
instruct/dolly_hhrlhf/train.jsonl. The setting `general` mixes a tenth of the last into every batch. Answers are words
of one token, so that a question costs one forward pass. Texts of 40 to 400 characters are taken. A mix or merge is
judged after the last stage: accuracy on each stage and their mean, on questions, and WikiText's nats. The experts for
`rules` are trained from the base; those of rules-general.yml with a tenth of general data.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import open_expert
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


RULES: list[tuple[str, dict[str, object]]] = [
    ("average", {}), ("task_arithmetic", {}), ("task_arithmetic", {"lambda": 0.5}), ("magmax", {}),
    ("magmax", {"lambda": 1.0}), ("random_mix", {}), ("ties", {}), ("dare", {}), ("stitch", {}), ("opcm", {}),
    ("null_space", {}), ("input_space", {}), ("iso_c", {}), ("covariance", {}), ("covariance", {"space": "inputs"}),
    ("curvature", {}), ("curvature", {"importance": "adam"}), ("ema", {}), ("blend", {"keep": 0.7, "take": 0.7}),
    *(("covariance", {"first_layer": scale, "last_layer": scale}) for scale in (0.7, 0.5)),
]  # fmt: skip
"""Rules and parameters, for experts that were trained from the base."""
FROM_LAST: list[dict[str, object]] = [
    {"rule": "magmax", "start_from": "previous"},
    {"rule": "blend", "start_from": "previous", "parameters": {"keep": 0, "take": 0.5}},
    {"rule": "opcm", "start_from": "previous"},
]
SEARCHED = {"rule": "task_arithmetic", "start_from": "previous", "parameters": {"lambda": "auto"}}
LINES: list[dict[str, object]] = [
    {"name": "opcm", "set": {"merge": FROM_LAST[2:], "baselines": ["joint"]}},
    {"name": "replay", "set": {"train.strategy": ["full", "replay"], "merge": FROM_LAST}},
    {"name": "auto", "set": {"merge": [SEARCHED]}},
    {"name": "lora", "set": {"train.strategy": "lora", "train.learning_rate": 1e-3, "merge": FROM_LAST}},
    {"name": "slao", "set": {"train.strategy": "slao", "train.learning_rate": 1e-3, "merge": ["slao"]}},
]
"""Settings of the study with other rules, old examples (a tenth), adapters and joint training."""


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
    merging = commands.add_parser("rules")
    merging.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "write":
        write(args)
    elif args.command == "rules":
        for run in args.runs:
            merge_by_rules(Run.load(run))
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
    general, train = general_tasks(data), training(args.steps, batch=8)
    merge = [*FROM_LAST[:2], {"rule": "average", "start_from": "previous"}]
    parameters = {"share": 0, "general": str(out / "general.jsonl"), "general_share": 0.1, "within_batch": True}
    settings = [{"name": "general", "set": {"train.strategy": ["full", "replay"],
                                            "train.parameters": {"replay": parameters}}}, *LINES]  # fmt: skip
    recipe = {
        "name": "cl", "base_model": "quickstart:smollm2", "stages": stages, "train": train, "merge": merge,
        "evaluate": {"limit": args.limit, "general_tasks": general},
    }  # fmt: skip
    study = {"name": "cl", "recipe": "cl.yml", "orders": ORDERS, "seeds": [0, 1],
             "vary": {"train.learning_rate": [2e-5, 1e-4, 5e-4]}, "settings": settings}  # fmt: skip
    (out / "cl.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (out / "study.yml").write_text(yaml.safe_dump(json.loads(json.dumps(study)), sort_keys=False))  # without anchors
    measured = {**train, "statistics": {"kinds": ["inputs", "fisher", "adam"], "examples": 128, "max_length": 192}}
    alone = {**recipe, "name": "cl-rules", "train": measured, "merge": [{"rule": "average", "start_from": "base"}]}
    (out / "rules.yml").write_text(yaml.safe_dump(alone, sort_keys=False))
    mixed = {**measured, "strategy": ["full", "replay"], "parameters": {"replay": parameters}}
    (out / "rules-general.yml").write_text(yaml.safe_dump({**alone, "train": mixed}, sort_keys=False))


def general_tasks(data: Path) -> list[dict[str, object]]:
    """Return what is measured beside the stages."""
    return [
        {"name": "wikitext", "kind": "perplexity",
         "dataset": {"path": str(data / "general/wikitext2/test.jsonl"), "heldout": 16, "heldout_chars": 800}},
        {"name": "arc_easy_words", "kind": "multiple_choice", "dataset": str(data / "eval/arc_easy.jsonl")},
    ]  # fmt: skip


def training(steps: int, batch: int) -> dict[str, object]:
    """Return the settings of all stages."""
    return {
        "strategy": "full", "max_steps": steps, "per_device_train_batch_size": batch, "max_length": 192,
        "learning_rate": 1.0e-4, "warmup_steps": 3, "lr_scheduler_type": "cosine", "gradient_checkpointing": False,
        "save_strategy": "no",
    }  # fmt: skip


def question(prompt: str, choices: list[str], gold: int) -> dict[str, object]:
    """Return a row for training (prompt, completion) and asking (query, choices, gold)."""
    return {"prompt": prompt, "completion": f" {choices[gold]}", "query": prompt, "choices": choices, "gold": gold}


def _rows(file: Path, name: str) -> Iterator[dict[str, object]]:
    """Yield rows for training (prompt, completion) and asking (query, choices, gold)."""
    word, classes = CLASSES[name][0], CLASSES[name][1].split()
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if len(row["text"]) in CHARS:
            yield question(f"{row['text'].strip()}\n{word}:", classes, row["gold"])


def mix(run: Run, mixes: Mapping[str, Mix]) -> None:
    """Print a table of mixes of a run's experts."""
    folders = expert_folders(run)
    base, experts = Weights(resolve_model(run.recipe.base_model)), [Weights(folder) for folder in folders]
    table = Table(run, folders[-1])
    for name, how in {"base": {"weights": [0] * len(folders)}, **mixes}.items():

        def mixed(key: str, how: Mix = how) -> torch.Tensor:
            start = base.tensor(key).float()
            changes = torch.stack([expert.tensor(key).float() - start for expert in experts])
            return start + _mixed(changes, how)

        table.add(name, mixed)


def merge_by_rules(run: Run) -> None:
    """Print a table of what each rule makes of a run's experts."""
    folders = expert_folders(run)
    base = Weights(resolve_model(run.recipe.base_model))
    table = Table(run, folders[-1])
    table.add("base", base.tensor)
    for name, parameters in RULES:
        rule = get_rule(name, **parameters)
        words = " ".join((f"`{name}`", *(f"{key}={value}" for key, value in parameters.items())))
        with TemporaryDirectory(dir=run.folder) as scratch:
            begun = time.monotonic()
            experts = [open_expert(folder, base) for folder in folders]
            merge_experts(rule, base, experts, merged_out=Output(Path(scratch)))
            seconds = time.monotonic() - begun
            table.add(f"{words} ({seconds:.0f} s)", Weights(Path(scratch)).tensor)


def expert_folders(run: Run) -> list[Path]:
    """Return the trained model of each stage."""
    places = [[run.expert(t, kind).folder / "expert" for kind in ("previous", "base")] for t in run.stage_numbers()]
    return [next(folder for folder in both if folder.is_dir()) for both in places]


class Table:
    """Judges models of one run; prints a row of each."""

    def __init__(self, run: Run, like: Path) -> None:
        logging.disable(logging.WARNING)
        self._request = ScoreRequest(tuple(run.recipe.measured(run.stage_numbers())), run.tasks, run.recipe.evaluate)
        self._model, self._tokenizer = load_to_score(
            ModelFolders(like, None), self._request.evaluate, "bfloat16", trust_remote_code=False
        )
        self._own = [stage.tasks[0].name for stage in run.recipe.stages]
        self._base: float | None = None
        names = " | ".join(stage.name for stage in run.recipe.stages)
        print(f"\n{run.folder.name}\n\n| model | all stages | {names} | questions | WikiText |")
        print("|---|" + "---:|" * (3 + len(self._own)))

    def add(self, name: str, weights: Callable[[str], torch.Tensor]) -> None:
        """Judge the model whose weights a function returns; the first is the base."""
        with torch.no_grad():
            for key, parameter in self._model.named_parameters():
                parameter.copy_(weights(key))
        scores = score_loaded(self._model, self._tokenizer, self._request, ranks=OneRank())
        utility = {task: score.utility for task, score in scores.items()}
        self._base = utility["wikitext"] if self._base is None else self._base
        stages = [utility[task] for task in self._own]
        cells = [sum(stages) / len(stages), *stages, utility["arc_easy_words"]]
        accuracies = " | ".join(f"{100 * x:.1f}" for x in cells)
        print(f"| {name} | {accuracies} | {utility['wikitext'] - self._base:+.3f} |", flush=True)


def _mixed(changes: torch.Tensor, how: Mix) -> torch.Tensor:
    if "magmax" in how:
        return how["magmax"][0] * changes.gather(0, changes.abs().argmax(0, keepdim=True))[0]
    return torch.tensordot(torch.tensor(how["weights"], dtype=changes.dtype), changes, 1)


if __name__ == "__main__":
    main()
