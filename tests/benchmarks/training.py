"""A stage of the loop against TRL's own `trl sft`, and what the loop adds to a run.

    python tests/benchmarks/training.py                          SmolLM2-135M, 20 steps each, in turns
    python tests/benchmarks/training.py --run runs/quickstart    and what lay between the phases of that run
    python tests/benchmarks/training.py --quick                  a tiny model

Both train the same model on the same text with the same settings, packed to full blocks, so that a step is the same
number of tokens. Tokens per second: of Trainer's own `train_runtime`, which starts when all is loaded and ends before
the model is saved. Peak memory: of the whole process, with all that the loop has loaded by then.
"""

import argparse
import json
import re
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import measure
import models
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' toys
from toys.models import toy_llama

from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.runtime.device import bf16_pays
from hf_contmerge.training._rows import load_rows

TEXT = "quickstart:bible"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--run", type=Path, help="a finished run, to see what lies between its phases")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.models) as scratch:
        home = Path(scratch)
        base = toy_llama(home / "base", seed=0) if args.quick else resolve_model("quickstart:smollm2")
        compare(home, base, steps=4 if args.quick else args.steps, repeats=1 if args.quick else args.repeats)
    print(measure.machine(args.models, "trl", "transformers"))
    if args.run:
        between_phases(Run.load(args.run))


def compare(home: Path, base: Path, *, steps: int, repeats: int) -> None:
    """Train with both, in turns; print a table and the verdicts."""
    rows = load_rows(Dataset(path=TEXT)).select(range(200))
    (home / "text").mkdir()
    rows.to_json(str(home / "text" / "train.jsonl"))
    shared = {
        "max_steps": steps, "per_device_train_batch_size": 4, "max_length": 128, "learning_rate": 5.0e-4,
        "warmup_steps": 3, "gradient_checkpointing": False, "save_strategy": "no", "seed": 0, "packing": True,
        "packing_strategy": "wrapped", "logging_steps": 5, "use_cpu": True, "bf16": bf16_pays(Weights(base).numel()),
        "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    commands = {"contmerge run": ours(home, base, shared), "trl sft": theirs(home, base, shared)}
    costs: dict[str, list[measure.Cost]] = {name: [] for name in commands}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            costs[name].append(measure.run(command))
            seconds[name].append(recorded(command.output) or trained_for(costs[name][-1].printed))
    tokens = steps * shared["per_device_train_batch_size"] * shared["max_length"]
    print("| command | tokens/s of training | wall, s | peak memory, MiB |\n|---|---|---|---|")
    for name, found in costs.items():
        speeds = sorted(tokens / s for s in seconds[name])
        wall, peak = measure.median(found), measure.median(found, measure.peak)
        print(f"| `{name}` | {speeds[len(speeds) // 2]:.1f} | {wall:.1f} | {peak / 2**20:.0f} |")
    mine, trl = seconds.values()
    ratios = sorted(b / a for a, b in zip(mine, trl, strict=True))
    print()
    print(measure.verdict("tokens per second, ours / trl sft's", ratios[len(ratios) // 2], 0.97, at_least=True))
    print(measure.verdict("peak memory, ours / trl sft's", measure.ratio(*costs.values(), measure.peak), 1.03))


def ours(home: Path, base: Path, shared: dict) -> measure.Command:
    """Return the command that trains one stage by the loop."""
    train = {name: value for name, value in shared.items() if name != "seed"}
    recipe = {
        "name": "one", "base_model": str(base), "train": train, "merge": ["magmax"],
        "stages": [{"name": "text", "dataset": {"path": str(home / "text" / "train.jsonl"), "heldout": 0}}],
    }  # fmt: skip
    path = home / "one.yml"
    path.write_text(yaml.safe_dump(recipe))
    run = home / "run"
    return measure.Command(measure.contmerge("run", str(path), "--run", str(run), "--until", "train"), output=run)


def theirs(home: Path, base: Path, shared: dict) -> measure.Command:
    """Return TRL's command with the same settings."""
    words = [str(Path(sys.executable).with_name("trl")), "sft", "--model_name_or_path", str(base), "--dtype", "float32"]
    words += ["--dataset_name", str(home / "text"), "--output_dir", str(home / "trl")]
    for name, value in shared.items():
        words += [f"--{name}", str(value)]
    return measure.Command(words, output=home / "trl")


def recorded(run: Path | None) -> float | None:
    """Return the seconds of training that our record holds, if the folder is a run of ours."""
    for path in run.glob("stages/*/experts/*/train.json") if run else ():
        return json.loads(path.read_text(encoding="utf-8"))["train_seconds"]
    return None


def trained_for(printed: str) -> float:
    """Return the seconds of training that Trainer printed at its end."""
    return float(re.findall(r"'train_runtime': '?([0-9.e+-]+)", printed)[-1])


def between_phases(run: Run) -> None:
    """Print what of each stage's time lies in none of its phases: looking up what is done, the report."""
    ends: dict[int, list[tuple[datetime, float]]] = {}
    for t, place in run.places():
        for phase in ("train", "merge", "score"):
            if t and place.is_done(phase):
                record = place.record(phase)
                ends.setdefault(t, []).append((datetime.fromisoformat(record["finished"]), record["seconds"]))
    start = datetime.fromisoformat(run.base.record("score")["finished"])
    print("\n| stage | wall, s | its phases, s | the rest |\n|---|---|---|---|")
    for t, found in sorted(ends.items()):
        wall = (max(end for end, _ in found) - start).total_seconds()
        phases = sum(seconds for _, seconds in found)
        start = max(end for end, _ in found)
        print(f"| {run.stage(t).name} | {wall:.0f} | {phases:.1f} | {1 - phases / wall:.1%} |")
    print("\nDates are kept in whole seconds, so a stage's wall time is known to one second.")


if __name__ == "__main__":
    main()
