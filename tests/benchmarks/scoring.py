"""Scoring: two ranks against one, all tasks of a row against `lm_eval` once a task, and whether the values agree.

    python tests/benchmarks/scoring.py             SmolLM2-135M on the quickstart's tasks
    python tests/benchmarks/scoring.py --quick     a tiny model and few documents

(a) The same script on one rank and, by torchrun, on two, one thread each. As the loop does, it scores one model after
another; the first one's seconds have imports in them, which no rank can share. Each document's score must be the same.
(b) A row is what is measured of a model after the last stage:
the held-out texts of three stages and the two general tasks. Ours is one process, the stock command is started for each
task, as people do by hand, with the same batch size and dtype. Both read and write the same files, and both start
Python. (c) Five tasks of three kinds (perplexity, multiple choice, exact match): the stock command's values in float32.
No score comes out of a cache.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import models

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' toys
from toys.models import TEXT, toy_llama

from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import Dataset, Task
from hf_contmerge.runtime.device import bf16_pays
from hf_contmerge.scoring.files import write_answer_task, write_choice_task, write_perplexity_task, write_task
from hf_contmerge.training._forms import rows_of
from hf_contmerge.training._rows import load_rows

ROW = ("bible", "pydocs", "recipes", "bank_policies", "general_knowledge")
AGREE = ("bible", "pydocs", "general_knowledge", "topics", "written")
"""Three kinds: two perplexities, two multiple choices, one exact match."""
METRIC = {"topics": "acc", "general_knowledge": "acc", "written": "exact_match"}
TOLERANCE = 1e-4
ONE_THREAD = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_CONTMERGE_CACHE": "off", "HF_HUB_OFFLINE": "1"}

SCORE = """
import json, sys, time
from pathlib import Path
from hf_contmerge.runtime.launching import join_ranks, keep_freed_memory
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.scoring.score import score_model

model, tasks, dtype, out, models, *names = sys.argv[1:]
keep_freed_memory()
ranks, seconds = join_ranks()[1].ranks, []
for _ in range(int(models)):
    ranks.barrier()
    start = time.perf_counter()
    _, scores = score_model(
        Path(model), [Task(name=name) for name in names], task_folder=Path(tasks), ranks=ranks,
        evaluate=Evaluate(dtype=dtype, batch_size=8),
    )
    seconds.append(time.perf_counter() - start)
if ranks.is_main:
    found = {n: {"value": s.value, "gains": s.gains} for n, s in scores.items()}
    Path(out).write_text(json.dumps({"seconds": seconds, "tasks": found}))
"""
Found = dict[str, Any]
"""`seconds` of scoring each model, and `tasks`: value and gains of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    args.models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.models) as scratch:
        home = Path(scratch)
        base = toy_llama(home / "base", seed=0) if args.quick else resolve_model("quickstart:smollm2")
        write_tasks(home / "tasks", few=args.quick)
        (home / "score.py").write_text(SCORE)
        dtype = "bfloat16" if bf16_pays(Weights(base).numel()) else "float32"
        two_ranks(home, base, dtype, repeats)
        one_process(home, base, dtype, repeats)
        agreement(home, base)
    print(measure.machine(args.models, "lm_eval", "transformers"))


def write_tasks(folder: Path, *, few: bool) -> None:
    """Write the quickstart's five tasks, and two of other kinds about the toys' text. `few`: toys only."""
    words = [w.strip(".,:?") for w in TEXT.split()]
    questions = [{"query": f"The {w} and the", "choices": [w, "law", "hen"], "gold": 0} for w in dict.fromkeys(words)]
    write_choice_task(folder, "topics", questions[:24])
    written = [{"query": f"Question: what comes after {n}? Answer:", "gold": str(n + 1)} for n in range(16)]
    write_answer_task(folder, "written", written, max_new_tokens=4, stop=["\n", "."])
    for name in ROW[:4]:
        lines = TEXT.strip().splitlines()
        if few:
            write_perplexity_task(folder, name, [lines[i % len(lines)][i:] for i in range(12)])
        else:
            data = Dataset(path=f"quickstart:{name}", heldout=24, heldout_chars=900)
            write_task(folder, Task(name=name, kind="perplexity", dataset=data))
    if few:
        write_choice_task(folder, ROW[4], questions[24:36])
    else:
        write_choice_task(folder, ROW[4], list(rows_of(load_rows(Dataset(path=f"quickstart:{ROW[4]}")))))


def ours(
    home: Path, base: Path, dtype: str, names: tuple[str, ...], *, ranks: int = 1, models: int = 1, device: str = "cpu"
) -> tuple[measure.Cost, Found]:
    """Score with us so many models in a process; return its cost and what it found."""
    out = home / f"ours-{ranks}.json"
    script = [str(home / "score.py"), str(base), str(home / "tasks"), dtype, str(out), str(models), *names]
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(ranks), "--"]
    words = [sys.executable, *script] if ranks == 1 else [*torchrun, *script]
    cost = measure.run(measure.Command(words, env=surroundings(device)))
    return cost, json.loads(out.read_text())


def surroundings(device: str) -> dict[str, str]:
    """Return what a command's environment gets."""
    return ONE_THREAD | ({} if device == "cpu" else {"ACCELERATE_USE_CPU": "false"})


def stock(home: Path, base: Path, dtype: str, name: str, *, device: str = "cpu") -> tuple[measure.Cost, float]:
    """Score one task with the stock command; return its cost and the value of the task's metric."""
    out = home / "stock"
    words = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
        f"pretrained={base},dtype={dtype},softmax_dtype=float32", "--include_path", str(home / "tasks"),
        "--tasks", name,
        "--device", device, "--batch_size", "8", "--output_path", str(out),
    ]  # fmt: skip
    cost = measure.run(measure.Command(words, env=surroundings(device), output=out))
    (path,) = out.rglob("results_*.json")
    return cost, json.loads(path.read_text())["results"][name][f"{METRIC.get(name, 'word_perplexity')},none"]


def two_ranks(home: Path, base: Path, dtype: str, repeats: int) -> None:
    """(a)"""
    costs: dict[int, list[measure.Cost]] = {1: [], 2: []}
    seconds: dict[int, list[list[float]]] = {1: [], 2: []}
    gains = {}
    for _ in range(repeats):
        for ranks in costs:
            cost, found = ours(home, base, dtype, ROW, ranks=ranks, models=2)
            costs[ranks].append(cost)
            seconds[ranks].append(found["seconds"])
            gains[ranks] = {name: task["gains"] for name, task in found["tasks"].items()}
    print(f"\n(a) {len(ROW)} tasks, {sum(map(len, gains[1].values()))} documents, {dtype}; two models in a process\n")
    print("\n".join(measure.cost_rows({f"{n} rank{'s' * (n > 1)}": c for n, c in costs.items()})))
    first, later = (
        sorted(one[i] / two[i] for one, two in zip(*seconds.values(), strict=True))[repeats // 2] for i in (0, 1)
    )
    print()
    print(measure.verdict("1 rank / 2 ranks, scoring a model", later, 1.7, at_least=True))
    print(f"- of the first model, imports included: {first:.2f}; seconds of the two: {seconds}")
    print(f"- 1 rank / 2 ranks, whole process: {measure.ratio(costs[1], costs[2]):.2f}")
    pairs = [pair for name in ROW for pair in zip(gains[1][name], gains[2][name], strict=True)]
    print(f"- documents whose scores differ: {sum(a != b for a, b in pairs)}")


def one_process(home: Path, base: Path, dtype: str, repeats: int) -> None:
    """(b)"""
    mine: list[measure.Cost] = []
    theirs: list[list[measure.Cost]] = []
    for _ in range(repeats):
        mine.append(ours(home, base, dtype, ROW)[0])
        theirs.append([stock(home, base, dtype, name)[0] for name in ROW])
    walls = [sum(c.wall for c in round_) for round_ in theirs]
    ratios = sorted(w / m.wall for w, m in zip(walls, mine, strict=True))
    work = sorted(sum(c.cpu for c in r) / m.cpu for r, m in zip(theirs, mine, strict=True))
    print(
        f"\n(b) one process for {len(ROW)} tasks: {measure.median(mine):.1f} s; lm_eval once a task: {walls[0]:.1f} s\n"
    )
    print(measure.verdict("lm_eval once a task / ours, wall", ratios[repeats // 2], 3, at_least=True))
    print(f"- the same of processor seconds: {work[repeats // 2]:.2f}")


def agreement(home: Path, base: Path) -> None:
    """(c)"""
    found = ours(home, base, "float32", AGREE)[1]["tasks"]
    print("\n(c) float32\n\n| task | ours | lm_eval |\n|---|---|---|")
    worst = 0.0
    for name in AGREE:
        value, theirs = found[name]["value"], stock(home, base, "float32", name)[1]
        worst = max(worst, abs(value - theirs) / max(abs(theirs), 1e-12) if theirs or value else 0.0)
        print(f"| {name} | {value:.6g} | {theirs:.6g} |")
    print()
    print(measure.verdict("largest relative difference", worst, TOLERANCE))


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1")
    main()
