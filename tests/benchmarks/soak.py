"""Long runs: 200 stages in one run, 500 appends to one state. What grows with the stages?

    python tests/benchmarks/soak.py             200 stages, 500 appends (about half an hour)
    python tests/benchmarks/soak.py --quick     8 stages, 12 appends

A toy model, in this process. A stage trains one step and is merged. Scores are made up for the report: a matrix of
scores has its price, t texts after stage t. The cost of a stage or an append should be constant. Printed are processor
seconds, memory and open files: after the first rounds, at the end, and the slope of each per round.
"""

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import measure
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from toys.models import perturbed, toy_llama, write_jsonl
from toys.reports import make_score

from hf_contmerge import MergeState
from hf_contmerge.commands.main import main as contmerge
from hf_contmerge.loop.run import Loop
from hf_contmerge.report.write import write_report
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import write_scores


@dataclass
class Watch:
    """Seconds, memory and open files after each round."""

    rows: list[tuple[float, float, int]] = field(default_factory=list)
    _since: float = field(default_factory=time.process_time)

    def look(self) -> None:
        gc.collect()
        process = psutil.Process()
        now = time.process_time()
        self.rows.append((now - self._since, process.memory_info().rss / 2**20, process.num_fds()))
        self._since = time.process_time()

    def table(self, what: str) -> str:
        """Return a row for seconds, memory and open files."""
        lines = []
        for unit, values in zip(("s", "MiB", "open files"), zip(*self.rows, strict=True), strict=True):
            part = max(1, len(values) // 10)
            early, late = (sorted(some)[len(some) // 2] for some in (values[part : 2 * part], values[-part:]))
            lines.append(f"| {what} | {unit} | {early:.3g} | {late:.3g} | {slope(values[part:]):+.2g} |")
        return "\n".join(lines)


def slope(values: tuple[float, ...]) -> float:
    """Return the growth per round by least squares."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    over = sum((i - middle) * (v - mean) for i, v in enumerate(values))
    return over / max(sum((i - middle) ** 2 for i in range(n)), 1e-9)


def long_run(home: Path, stages: int) -> Watch:
    """Train and merge many stages."""
    base, draw = toy_llama(home / "base", seed=0, hidden=16, layers=1), random.Random(0)
    words, listed = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"], []
    for number in range(1, stages + 1):
        text = write_jsonl(home / f"s{number}.jsonl", [{"text": " ".join(draw.choices(words, k=30))} for _ in range(6)])
        listed.append({"name": f"s{number}", "dataset": {"path": str(text), "heldout": 2}})
    train = {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 32, "save_strategy": "no"}
    recipe = {"name": "soak", "base_model": str(base), "stages": listed, "train": train, "merge": ["magmax"]}
    (home / "soak.yml").write_text(yaml.safe_dump(recipe))
    watch, merge = Watch(), Loop._merge

    def watched(loop: Loop, t: int, place: object) -> None:
        merge(loop, t, place)  # pyright: ignore[reportArgumentType]
        watch.look()

    Loop._merge = watched  # pyright: ignore[reportAttributeAccessIssue]
    try:
        assert contmerge(["run", str(home / "soak.yml"), "--run", str(home / "run"), "--until", "merge"]) == 0
    finally:
        Loop._merge = merge
    return watch


def many_appends(home: Path, count: int) -> Watch:
    """Add as many experts to one state, each deleted afterwards."""
    base, watch = toy_llama(home / "append-base", seed=0, hidden=16, layers=1), Watch()
    state = MergeState.create(home / "state", base=base, rule="magmax")
    expert = home / "expert"
    for number in range(1, count + 1):
        perturbed(base, expert, seed=number, size=0.01)
        watch._since = time.process_time()
        state.add(expert, stages=[f"s{number}"])
        watch.look()
    return watch


def report_seconds(home: Path, stages: int, documents: int = 4) -> float:
    """Return the processor seconds of a report on made-up scores of as many stages."""
    draw = random.Random(0)
    listed = [
        {"name": f"s{i}", "expert": f"e{i}", "tasks": [{"name": f"t{i}", "kind": "perplexity", "dataset": "d"}]}
        for i in range(stages)
    ]
    recipe = parse_recipe({"name": "soak", "base_model": "b", "stages": listed, "merge": ["magmax"]})
    run = Run.open(recipe, home / f"report-{stages}")

    def put(place: Place, count: int) -> None:
        scores = {f"t{i}": make_score(-2 - draw.random(), seed=f"t{i}", documents=documents) for i in range(count)}
        place.finish("score", {"tasks": write_scores(place, scores), "seconds": 1.0})

    put(run.base, stages)
    for t in run.stage_numbers():
        put(run.expert(t, "previous"), t)
        put(run.merged(t, recipe.merge[0]), t)
    since = time.process_time()
    write_report(run)
    return time.process_time() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds")
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--appends", type=int, default=500)
    args = parser.parse_args()
    stages, appends = (8, 12) if args.quick else (args.stages, args.appends)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        print(measure.machine(home), end="\n\n")
        reports = {count: report_seconds(home, count) for count in (2, stages // 4, stages)}
        seconds = ", ".join(f"{count} stages {seconds:.1f} s" for count, seconds in reports.items())
        print(f"Reports, processor seconds: {seconds}\n", flush=True)
        print("| round | unit | early | late | slope |\n|---|---|---|---|---|")
        print(many_appends(home, appends).table("append"), flush=True)
        print(long_run(home, stages).table("stage"), flush=True)


if __name__ == "__main__":
    main()
