"""Coverage of a study's intervals, on simulated orders, seeds and documents.

    python tests/benchmarks/study_coverage.py [--trials 2000]

True differences are 0. A document's difference is the sum of effects of the document, the order, the seed, the run, and
noise. Next to our interval: the percentile bootstrap that draws orders, seeds and documents anew.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from hf_contmerge.scoring.forgetting.crossed import crossed_change
from hf_contmerge.scoring.forgetting.paired import Sample, paired_change

GRIDS = ((3, 3), (5, 3), (3, 5), (6, 1), (1, 5), (2, 3), (1, 1))
EFFECTS = {  # standard deviations: order, seed, run, document
    "orders differ": (0.05, 0.0, 0.01, 0.3),
    "seeds differ": (0.0, 0.05, 0.01, 0.3),
    "both differ": (0.03, 0.03, 0.02, 0.3),
    "documents only": (0.0, 0.0, 0.0, 0.3),
    "runs only": (0.0, 0.0, 0.05, 0.3),
}
DOCUMENTS = 120


def simulate(dice: np.random.Generator, orders: int, seeds: int, spreads: tuple[float, ...]) -> np.ndarray:
    """Return differences (orders, seeds, documents)."""
    order, seed, run, document = spreads
    return (
        dice.normal(0, order, (orders, 1, 1)) + dice.normal(0, seed, (1, seeds, 1))
        + dice.normal(0, run, (orders, seeds, 1)) + dice.normal(0, document, (1, 1, DOCUMENTS))
        + dice.normal(0, document / 2, (orders, seeds, DOCUMENTS))
    )  # fmt: skip


def covers(data: np.ndarray) -> bool:
    """Say if our interval has the true difference, 0."""
    zeros, ones = (0.0,) * DOCUMENTS, (1.0,) * DOCUMENTS
    means = Sample(tuple(data.mean(axis=(0, 1))), ones)
    grid = {(o, s): float(data[o, s].mean()) for o, s in itertools.product(*map(range, data.shape[:2]))}
    change = crossed_change(grid, paired_change(means, Sample(zeros, ones)), same_documents=True)
    return change.low is not None and change.high is not None and change.low <= 0 <= change.high


def bootstrap_covers(dice: np.random.Generator, data: np.ndarray, draws: int = 400) -> bool:
    """Say if the percentile bootstrap's interval has 0."""
    o, s, d = data.shape
    means = []
    for _ in range(draws):
        picked = data[dice.integers(0, o, o)][:, dice.integers(0, s, s)].mean(axis=(0, 1))
        means.append(picked[dice.integers(0, d, d)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return bool(low <= 0 <= high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--bootstrap-trials", type=int, default=300)
    args = parser.parse_args()
    dice = np.random.default_rng(0)
    print("| orders x seeds | effects | interval covers | bootstrap covers |\n|---|---|---|---|")
    for (orders, seeds), (name, spreads) in itertools.product(GRIDS, EFFECTS.items()):
        if (orders == 1 and spreads[0]) or (seeds == 1 and spreads[1]) or (orders == seeds == 1 and spreads[2]):
            continue  # one level says nothing about how levels differ
        ours = np.mean([covers(simulate(dice, orders, seeds, spreads)) for _ in range(args.trials)])
        n = args.bootstrap_trials
        boot = np.mean([bootstrap_covers(dice, simulate(dice, orders, seeds, spreads)) for _ in range(n)])
        print(f"| {orders} x {seeds} | {name} | {ours:.1%} | {boot:.1%} |", flush=True)


if __name__ == "__main__":
    main()
