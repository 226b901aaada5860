"""Two streams on which no rule or coefficient was chosen: messages to a bank (classes), four texts (perplexity).

    python tests/benchmarks/set_aside.py DATA out/aside             bank.yml and texts.yml, and a study of each
    contmerge study out/aside/study-bank.yml
    contmerge study out/aside/study-texts.yml
    contmerge study out/aside/study-practice.yml        strategies, on two stages of the first stream
    python tests/benchmarks/set_aside.py table out/aside/studies/bank      each line against fine-tuning alone

DATA holds finance/phrasebank and finance/banking77 (text, label; train.jsonl and test.jsonl), the texts named in TEXTS,
general/wikitext2/test.jsonl and eval/arc_easy.jsonl. Stages of `bank`: the sentiment of a sentence, then what a message
is about, among the intents of three areas; answers are words of one token. SmolLM2-135M is trained as in
cl_standard.py. The study of strategies has the first two stages of `bank`; study-distilled.yml, study-anchored.yml
and study-opcm.yml have all four. The table has means and 95 % intervals over a study's cells (orders and seeds), paired
by cell.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from cl_standard import general_tasks, question, training
from scipy import stats

AREAS = {
    "cards": {
        "activate my card": "activate", "card about to expire": "expired", "card acceptance": "accepted",
        "card arrival": "arrival", "card linking": "link", "card swallowed": "machine", "compromised card": "fraud",
        "card not working": "broken", "lost or stolen card": "lost", "getting spare card": "spare"},
    "transfers": {
        "cancel transfer": "cancel", "declined transfer": "declined", "failed transfer": "failed",
        "pending transfer": "pending", "transfer fee charged": "fee", "transfer timing": "timing",
        "transfer not received by recipient": "missing", "transfer into account": "deposit",
        "beneficiary not allowed": "recipient", "receiving money": "salary"},
    "top_ups": {
        "automatic top up": "automatic", "top up failed": "failed", "top up limits": "limits",
        "top up reverted": "cancelled", "pending top up": "pending", "top up by card charge": "charge",
        "top up by cash or cheque": "cash", "verify top up": "verify", "topping up by card": "card",
        "top up by bank transfer charge": "transfer"},
}  # fmt: skip
"""Stage -> label of banking77 -> the word that is learnt and asked for."""
SENTIMENTS = {word: word for word in ("negative", "neutral", "positive")}
TEXTS = {"minutes": "finance/cpt_fomc_minutes", "medicine": "medical/medquad", "code": "code/gpteacher_codegen",
         "math": "math/gsm8k"}  # fmt: skip
STREAMS = {"bank": ["sentiment", *AREAS], "texts": list(TEXTS)}
LINES = [
    {"rule": "magmax", "start_from": "previous"},
    {"rule": "blend", "start_from": "previous", "parameters": {"keep": 0, "take": 0.5}},
    {"rule": "covariance", "start_from": "base", "layers": {"first": 0.7, "last": 0.7}},
]

STRATEGIES: dict[str, dict[str, object]] = {
    "anchor": {}, "soup": {}, "eaft": {}, "talr": {}, "asft": {}, "low_perplexity": {}, "distill": {}, "ewc": {},
    "rates": {"factors": {"layers": 0.1}}, "replay": {"share": 0.1, "within_batch": True},
    "gpm": {}, "refresh": {},
}  # fmt: skip
"""Each with `full`, and its parameters where the defaults are not meant."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="or the word table")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=64, help="questions of each task")
    args = parser.parse_args()
    if str(args.data) == "table":
        print_table(args.out)
        return
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = args.data.resolve()
    for stream, batch in (("bank", 8), ("texts", 4)):
        write_stream(stream, data, out, batch, args)
    write_practice(out)
    write_kept(out)
    write_opcm(out)


def write_stream(stream: str, data: Path, out: Path, batch: int, args: argparse.Namespace) -> None:
    """Write a stream's data, recipe and study."""
    stages = []
    for name in STREAMS[stream]:
        for split in ("train", "test"):
            rows = texts(data / TEXTS[name], split) if stream == "texts" else questions(data, name, split)
            (out / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        test: object = str(out / f"{name}-test.jsonl")
        if stream == "texts":
            task = {"kind": "perplexity", "dataset": {"path": test, "heldout": 24, "heldout_chars": 800}}
        else:
            task = {"kind": "multiple_choice", "dataset": test}
        dataset = {"path": str(out / f"{name}-train.jsonl"), "max_examples": batch * args.steps, "heldout": 0}
        stages.append({"name": name, "dataset": dataset, "tasks": [{"name": f"{name}_test", **task}]})
    recipe = {
        "name": stream, "base_model": "quickstart:smollm2", "stages": stages, "train": training(args.steps, batch),
        "merge": LINES if stream == "bank" else LINES[:2],
        "evaluate": {"limit": args.limit, "general_tasks": general_tasks(data)},
    }  # fmt: skip
    names = STREAMS[stream]
    orders = [names[start:] + names[:start] for start in range(len(names))]
    study = {"name": stream, "recipe": f"{stream}.yml", "orders": orders, "seeds": [0, 1], "keep": "scores",
             "vary": {"train.learning_rate": [1e-4, 2e-5, 5e-4]}}  # fmt: skip
    (out / f"{stream}.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (out / f"study-{stream}.yml").write_text(yaml.safe_dump(study, sort_keys=False))


def write_practice(out: Path) -> None:
    """Write a study of strategies."""
    recipe = yaml.safe_load((out / "bank.yml").read_text())
    recipe |= {"name": "practice", "stages": recipe["stages"][:2], "merge": LINES[:1]}
    settings = [
        {"name": name, "set": {"train.strategy": ["full", name], "train.parameters": {name: parameters}}}
        for name, parameters in STRATEGIES.items()
    ]
    for name, rule in (("lora", "magmax"), ("slao", "slao")):
        adapter = {"train.strategy": name, "train.learning_rate": 1e-3, "merge": [rule]}
        settings.append({"name": name, "set": adapter})
    directions = {"train.strategy": "osf", "train.parameters": {"osf": {"effective_rank": 0.75}}}
    settings.append({"name": "osf", "set": {**directions, "train.learning_rate": 5e-5}})
    settings.append({"name": "joint", "set": {"baselines": ["joint"]}})
    settings += [{"name": f"rate_{rate}", "set": {"train.learning_rate": rate}} for rate in (2e-5, 5e-4)]
    study = {"name": "practice", "recipe": "practice.yml", "keep": "scores",
             "orders": [STREAMS["bank"][:2]], "seeds": [0],
             "settings": [{"name": "full", "set": {"train.strategy": "full"}}, *settings]}  # fmt: skip
    (out / "practice.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (out / "study-practice.yml").write_text(yaml.safe_dump(study, sort_keys=False))


def write_kept(out: Path) -> None:
    """Write studies of the whole stream with the two strategies that keep most in two stages, one a file."""
    study = yaml.safe_load((out / "study-bank.yml").read_text())
    for name, strategy, merges in (("distilled", "distill", LINES[:2]), ("anchored", "anchor", LINES[1:2])):
        kept = {"train.strategy": ["full", strategy], "train.parameters": {strategy: {}}, "merge": merges}
        own = {**study, "name": name, "vary": {}, "settings": [{"name": strategy, "set": kept}]}
        (out / f"study-{name}.yml").write_text(yaml.safe_dump(own, sort_keys=False))


def write_opcm(out: Path) -> None:
    """Write a study of the whole stream with a rule that was found on cl-standard after this stream's others."""
    study = yaml.safe_load((out / "study-bank.yml").read_text())
    settings = [
        {"name": name, "set": {**strategy, "merge": [{"rule": "opcm", "start_from": "previous"}]}}
        for name, strategy in (("full", {}), ("anchor", {"train.strategy": ["full", "anchor"]}))
    ]
    own = {**study, "name": "opcm", "vary": {}, "settings": settings}
    (out / "study-opcm.yml").write_text(yaml.safe_dump(own, sort_keys=False))


def questions(data: Path, stage: str, split: str) -> Iterator[dict[str, object]]:
    """Yield rows for training (prompt, completion) and asking (query, choices, gold)."""
    words = AREAS.get(stage, SENTIMENTS)
    word, source = ("Topic", "banking77") if stage in AREAS else ("Sentiment", "phrasebank")
    for row in read(data / "finance" / source / f"{split}.jsonl"):
        if row["label"] in words:
            choices = list(words.values())
            yield question(f"{row['text'].strip()}\n{word}:", choices, choices.index(words[row["label"]]))


def texts(folder: Path, split: str) -> Iterator[dict[str, object]]:
    """Yield texts; a question and its answer are one."""
    for row in read(folder / f"{split}.jsonl"):
        yield {"text": row["text"] if "text" in row else f"{row['prompt']}\n{row['completion']}"}


def read(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def print_table(study: Path) -> None:
    """Print each line's last row in every finished run, and its lead over fine-tuning alone."""
    leads: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    columns = "mean of stages | newest | questions | WikiText |"
    print(f"| run | line | {columns}\n|---|---|---:|---:|---:|---:|")
    for file in sorted(study.glob("runs/*/report/scores.csv")):
        run = file.parent.parent.name
        last = last_rows(file)
        plain = last["experts/previous"]
        for line, row in last.items():
            print(f"| {run} | {line} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
            leads[run.rpartition("_order")[0], line].append([x - y for x, y in zip(row, plain, strict=True)])
    print(f"\n| setting | line | cells | {columns}\n|---|---|---:|---:|---:|---:|---:|")
    for (setting, line), rows in leads.items():
        if line != "experts/previous":
            print(f"| {setting} | {line} | {len(rows)} | " + " | ".join(map(interval, zip(*rows, strict=True))) + " |")


def last_rows(file: Path) -> dict[str, list[float]]:
    """Return line -> [mean of the stages, newest stage, questions, WikiText less the base's], utilities at the end."""
    scores: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    stages: dict[int, str] = {}
    with file.open() as table:
        for row in csv.DictReader(table):
            stages[int(row["stage_index"])] = row["stage"]
            scores[row["line"], int(row["stage_index"])][row["task"]] = float(row["utility"])
    end = max(stages)
    base = next(tasks for (_, stage), tasks in scores.items() if stage == 0)["wikitext"]
    own = [f"{stages[stage]}_test" for stage in range(1, end + 1)]
    rows = {}
    for (line, stage), tasks in scores.items():
        if stage == end and all(task in tasks for task in own):
            values = [tasks[task] for task in own]
            rows[line] = [statistics.mean(values), values[-1], tasks["arc_easy_words"], tasks["wikitext"] - base]
    return rows


def interval(values: Iterable[float]) -> str:
    """Return a mean with its 95 % interval over cells (t)."""
    values = list(values)
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


if __name__ == "__main__":
    main()
