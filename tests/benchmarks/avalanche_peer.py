"""A small network that Avalanche trains on tasks in sequence, in its own environment: see against_avalanche.py.

    ENV/bin/python tests/benchmarks/avalanche_peer.py TASKS SEED

Prints one line of JSON: `rows`, the accuracy on each task before training and after each task, and what Avalanche's own
stream metrics say at the end. The tasks share a direction that tells the classes apart, and each has one of its own, so
that something is forgotten and something is learnt ahead.
"""

import json
import sys

import torch

# torchvision from PyPI is built for CUDA and finds no operators beside a torch without it; Avalanche imports it, and
# nothing here uses it. This declares the two operators whose absence ends the import.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for operator in () if torch.version.cuda else ("nms", "qnms"):
    LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from avalanche.benchmarks.scenarios.dataset_scenario import (  # pyright: ignore[reportMissingImports]
    benchmark_from_datasets,
)
from avalanche.benchmarks.utils.utils import as_classification_dataset  # pyright: ignore[reportMissingImports]
from avalanche.evaluation.metrics import (  # pyright: ignore[reportMissingImports]
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    forward_transfer_metrics,
)
from avalanche.training.plugins import EvaluationPlugin  # pyright: ignore[reportMissingImports]
from avalanche.training.supervised import Naive  # pyright: ignore[reportMissingImports]
from torch import nn

WIDTH = 16


class Points(torch.utils.data.Dataset):
    """Points of two classes, as far as Avalanche asks of a data set."""

    def __init__(self, direction: torch.Tensor, count: int, noise: torch.Generator) -> None:
        self.x = torch.randn(count, WIDTH, generator=noise)
        self.targets = (self.x @ direction > 0).long().tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.x[i], self.targets[i]


def main() -> None:
    tasks, seed = int(sys.argv[1]), int(sys.argv[2])
    noise = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    shared = torch.randn(WIDTH, generator=noise)
    directions = [2.0 * shared + torch.randn(WIDTH, generator=noise) for _ in range(tasks)]
    train, test = ([as_classification_dataset(Points(d, n, noise)) for d in directions] for n in (200, 300))
    benchmark = benchmark_from_datasets(train=train, test=test)
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True), forgetting_metrics(stream=True), bwt_metrics(stream=True),
        forward_transfer_metrics(stream=True), loggers=[],
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 2))
    strategy = Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), 0.01), train_mb_size=32, train_epochs=1,
        eval_mb_size=300, evaluator=evaluator, eval_every=0,
    )  # fmt: skip
    rows = []
    for i, experience in enumerate(benchmark.train_stream):
        if i == 0:
            rows.append(accuracies(strategy.eval(benchmark.test_stream)))
        strategy.train(experience, eval_streams=[benchmark.test_stream], num_workers=0)
        found = strategy.eval(benchmark.test_stream)
        rows.append(accuracies(found))
    said = {name: value for key, value in found.items() for name in ("StreamForgetting", "StreamBWT",
            "StreamForwardTransfer") if key.startswith(name)}  # fmt: skip
    print(json.dumps({"rows": rows, **said}))


def accuracies(found: dict[str, float]) -> list[float]:
    """Return the accuracy on each task, in order, from the names that Avalanche gives them."""
    named = sorted(key for key in found if key.startswith("Top1_Acc_Exp"))
    return [found[key] for key in named]


if __name__ == "__main__":
    main()
