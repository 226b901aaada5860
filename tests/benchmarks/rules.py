"""What each merge rule costs beside magmax: processor seconds a GB in and out, state, and memory at 8B shapes.

    python tests/benchmarks/rules.py                20M parameters, four experts in bf16, one thread
    python tests/benchmarks/rules.py --quick        a tiny model, to see that it works

The rules take turns, and each run's seconds are divided by those of magmax in the same round; the median is printed.
Statistics are made up. Bytes at 8B shapes (Llama-3-8B's, in bf16) are those that `contmerge plan` counts: the state on
the disk, and the largest working memory of one thread on one weight.
"""

import argparse
import json
import statistics
import struct
import tempfile
import time
from pathlib import Path

import models
import torch

from hf_contmerge.merge_rules import MergeRule, get_rule, inputs_shape
from hf_contmerge.merging.costs import Passage, state_bytes, stream_job, weight_of
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import expert_sha256, open_expert
from hf_contmerge.models.statistics import write_statistics
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew

RULES = [
    ("magmax", {}), ("average", {}), ("blend", {}), ("average", {"first_layer": 0.2}), ("dare", {}), ("stitch", {}),
    ("ties", {}), ("opcm", {}), ("covariance", {}), ("covariance", {"form": "diagonal"}),
    ("covariance", {"space": "inputs"}), ("curvature", {}), ("input_space", {}),
]  # fmt: skip
LLAMA_8B = models.Size(4096, 14336, 32, 32, 8, 128256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = models.base_model(args.models, "tiny" if args.quick else "20M")
    experts = models.experts(base, 4)
    for number, expert in enumerate(experts):
        measure(base, expert, seed=number)
    large = eight_billion(args.models / "8B-shapes")
    rounds = [{i: seconds(rule, base, experts) for i, rule in enumerate(made())} for _ in range(args.repeats)]
    moved = 2 * Weights(base).numel() * (len(experts) + 2) / 1e9
    print("| rule | times magmax | s a GB in and out | state at 8B | memory at 8B |\n|---|---|---|---|---|")
    for i, ((name, parameters), rule) in enumerate(zip(RULES, made(), strict=True)):
        ratio = statistics.median(r[i] / r[0] for r in rounds)
        each = statistics.median(r[i] for r in rounds) / moved
        words = " ".join((name, *(f"{word}={value}" for word, value in parameters.items())))
        state, memory = at_large(rule, large)
        print(f"| `{words}` | {ratio:.1f} | {each:.1f} | {state / 1e9:.0f} GB | {memory / 1e9:.2f} GB |")


def made() -> list[MergeRule]:
    return [get_rule(name, **parameters) for name, parameters in RULES]


def seconds(rule: MergeRule, base: Path, experts: list[Path]) -> float:
    """Return the processor seconds of one merge by one thread."""
    weights = Weights(base)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "merged")
        out.mkdir()
        start = time.process_time()
        merge_experts(
            rule, weights, [open_expert(e, weights) for e in experts], merged_out=Output(out), crew=Crew(workers=1)
        )
        return time.process_time() - start


def measure(base: Path, expert: Path, *, seed: int) -> None:
    """Write made-up statistics next to an expert."""
    weights, draw = Weights(base), torch.Generator().manual_seed(seed)
    shapes = {name: weights.shape(name) for name in weights.floating()}
    matrices = [name for name in shapes if weight_of(weights, name, 1).is_matrix]
    inputs = {}
    for name in matrices:
        x = torch.randn(64, inputs_shape(shapes[name][-1])[0], generator=draw)
        inputs[name] = x.T @ x / 64
    fisher = {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}
    for kind, tensors in (("inputs", inputs), ("fisher", fisher)):
        write_statistics(expert / "statistics", kind, tensors, {}, expert_sha256=expert_sha256(expert))


def eight_billion(folder: Path) -> Weights:
    """Return the headers of a model of 8B parameters: a file of holes."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, end = {}, 0
    for name, shape in LLAMA_8B.shapes(tied=False):
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": LLAMA_8B.vocabulary}))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return Weights(folder)


def at_large(rule: MergeRule, base: Weights) -> tuple[int, int]:
    """Return the bytes of the state, and of the most demanding weight in work."""
    state = sum(state_bytes(rule, weight_of(base, name, 1)) for name in base.floating())
    return state, max(stream_job(rule, base, name, Passage(3)).memory for name in base.names)


if __name__ == "__main__":
    main()
