"""What storing a merge in 16 bits costs: nearest, stochastic and no rounding, on experts of usual learning rates.

    python tests/benchmarks/rounding.py                 SmolLM2-135M; trains four experts, then merges and scores
    python tests/benchmarks/rounding.py --quick         a tiny model, to see that it runs
    python tests/benchmarks/rounding.py --speed         seconds of a merge of 100M elements, by way of storing

Experts are trained from the bfloat16 base in float32, the loop's default, at 1e-5 and 5e-5. Every rule's merge is
written in each way. Kept and error: as in the records of a run. Perplexity: per word, over held-out documents of both
texts, computed in float32 from the stored weights, so that what differs is what the file holds. Mixed: the bytes of a
file with float32 for the tensors that keep less than 90 % under rounding to nearest.
"""

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import measure
import models
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' toys
from toys.models import toy_llama

from hf_contmerge import MergeState, finetune_stage, score_stage
from hf_contmerge.models.rounding import Rounding, compared
from hf_contmerge.models.survival import LEAST, Survival
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.launching import keep_freed_memory

RATES = ("1e-5", "5e-5")
RULES = {"magmax": {}, "opcm": {}, "average": {}, "task_arithmetic": {"lambda": 0.5}}
WAYS = {
    "nearest": {"rounding": "nearest"},
    "stochastic": {"rounding": "stochastic"},
    "float32": {"dtype": "float32"},
}
TEXTS = ("bible", "pydocs")


@dataclass(frozen=True)
class Setting:
    """The base, the folder for experts, and the sizes."""

    base: str
    experts: Path
    steps: int
    heldout: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--heldout", type=int, default=16)
    parser.add_argument("--experts", type=Path, help="where trained experts are kept (default: a scratch folder)")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=args.models) as scratch:
        home = Path(scratch)
        if args.speed:
            speed(home)
        else:
            base = str(toy_llama(home / "base", seed=0, dtype=torch.bfloat16)) if args.quick else "quickstart:smollm2"
            steps, heldout = (2, 2) if args.quick else (args.steps, args.heldout)
            table(home, Setting(base, args.experts or home / "experts", steps, heldout))
    print(f"\n{measure.machine(args.models, 'trl', 'transformers')}")


def table(home: Path, setting: Setting) -> None:
    """Print a row for each rate, rule and way of storing."""
    print("| rate | rule | stored as | kept | error | perplexity | against float32, nats | bytes |\n|" + "---|" * 8)
    print(f"| | base | | | | {math.exp(-loss(setting.base, setting)):.2f} | | |", flush=True)
    for rate in RATES:
        experts = [expert(text, rate, setting) for text in TEXTS]
        for name, one in zip(TEXTS, experts, strict=True):
            print(
                f"| {rate} | expert {name} | float32 | | | {math.exp(-loss(str(one), setting)):.2f} | | |", flush=True
            )
        for rule, parameters in RULES.items():
            state = MergeState.create(home / f"{rule}-{rate}", base=setting.base, rule=rule, **parameters)
            state.add(*map(str, experts))
            outs = {way: state.export(home / f"{rule}-{rate}-{way}", **how) for way, how in WAYS.items()}
            rows(rate, rule, state, outs, setting)


def rows(rate: str, rule: str, state: MergeState, outs: dict[str, Path], setting: Setting) -> None:
    """Print the rows of one merge."""
    exact = loss(str(outs["float32"]), setting)
    for (way, out), record in zip(outs.items(), state.exports(), strict=True):
        kept, utility = Survival.read(record), loss(str(out), setting)
        shares = f"{100 * kept.survival:.1f} % | {kept.error:.3f}"
        cells = f"{shares} | {math.exp(-utility):.2f} | {utility - exact:+.4f} | {kept.nbytes / 1e6:.0f} MB"
        print(f"| {rate} | {rule} | {way} | {cells} |", flush=True)
    nbytes, wide, count = mixed(state.base(), outs)
    print(
        f"| {rate} | {rule} | mixed ({wide} of {count} tensors in float32) | | | | | {nbytes / 1e6:.0f} MB |",
        flush=True,
    )


def expert(text: str, rate: str, setting: Setting) -> Path:
    """Train an expert of one text, unless its folder exists."""
    data = {"path": f"quickstart:{text}", "max_examples": 200, "heldout": 24, "heldout_chars": 900}
    trained = finetune_stage(
        setting.base, data, setting.experts / f"{text}-{rate}", learning_rate=float(rate), max_steps=setting.steps,
        per_device_train_batch_size=2, max_length=128, warmup_steps=3, gradient_checkpointing=False,
        save_strategy="no", lr_scheduler_type="constant_with_warmup", logging_steps=1,
    )  # fmt: skip
    return trained.folder


def loss(model: str, setting: Setting) -> float:
    """Return the mean utility (-nats per word) over both texts' held-out documents."""
    data = {"heldout": setting.heldout, "heldout_chars": 900}
    tasks = [{"name": t, "kind": "perplexity", "dataset": {"path": f"quickstart:{t}", **data}} for t in TEXTS]
    scores = score_stage(model, tasks, dtype="float32", batch_size=4)
    return sum(score.utility for score in scores.values()) / len(scores)


def mixed(base: Weights, outs: dict[str, Path]) -> tuple[int, int, int]:
    """Return the bytes of a mixed file, its float32 tensors, and all tensors."""
    near, exact, nbytes, wide = Weights(outs["nearest"]), Weights(outs["float32"]), 0, 0
    for name in base.names:
        start = base.tensor(name).float()
        lossy = compared(near.tensor(name), start, exact.tensor(name) - start).survival < LEAST
        wide, nbytes = wide + lossy, nbytes + (exact if lossy else near).nbytes(name)
    return nbytes, wide, len(base.names)


def speed(home: Path) -> None:
    """Print the seconds of a merge of 100M elements on one thread, by way of storing, in turns."""
    from hf_contmerge.merge_rules import get_rule
    from hf_contmerge.merging.stream import merge_experts
    from hf_contmerge.merging.write import Output
    from hf_contmerge.models.experts import open_expert
    from hf_contmerge.runtime.crew import Crew

    torch.manual_seed(0)
    for number in range(3):
        folder = home / f"m{number}"
        folder.mkdir()
        tensors = {f"layers.{i}.w": (0.02 * torch.randn(2500, 4000)).bfloat16() for i in range(10)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text("{}")
    base = Weights(home / "m0")
    experts = [open_expert(home / f"m{n}", base) for n in (1, 2)]
    seconds: dict[Rounding, list[float]] = {"nearest": [], "stochastic": []}
    for turn in range(5):
        for way, times in seconds.items():
            out = home / f"{way}-{turn}"
            out.mkdir()
            start = time.perf_counter()
            merge_experts(
                get_rule("magmax"), base, experts, merged_out=Output(out, rounding=way), crew=Crew(workers=1)
            )  # fmt: skip
            times.append(time.perf_counter() - start)
    best = {way: min(times) for way, times in seconds.items()}
    print(f"nearest {best['nearest']:.2f} s, stochastic {best['stochastic']:.2f} s: "
          f"{best['stochastic'] / best['nearest']:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
