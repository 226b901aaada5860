"""Coverage of a study's intervals, on simulated orders, seeds and documents.

    python tests/benchmarks/study_coverage.py [--trials 2000]

True differences are 0. A document's difference is the sum of effects of the document, the order, the seed, the run, and
noise. Next to our interval: the percentile bootstrap that draws orders, seeds and documents anew.

The second table has documents that are the same in all runs (general tasks, tasks of stages) next to held-out documents
that each seed draws anew, and what becomes of the interval without the documents' part. The third has answers: a share
becomes wrong, and one right; half of these documents change in all runs, the others in each run for itself.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace

import numpy as np

from hf_contmerge.scoring.forgetting.crossed import crossed_change
from hf_contmerge.scoring.forgetting.paired import Change, Sample, mean_of_runs, paired_change

GRIDS = ((3, 3), (5, 3), (3, 5), (6, 1), (1, 5), (2, 3), (1, 1))
EFFECTS = {  # standard deviations: order, seed, run, document
    "orders differ": (0.05, 0.0, 0.01, 0.3),
    "seeds differ": (0.0, 0.05, 0.01, 0.3),
    "both differ": (0.03, 0.03, 0.02, 0.3),
    "documents only": (0.0, 0.0, 0.0, 0.3),
    "runs only": (0.0, 0.0, 0.05, 0.3),
}
DOCUMENTS = 120
SCOPES = ((1, 3, 200, 0.003), (3, 3, 200, 0.01), (3, 3, 1000, 0.005), (3, 3, 200, 0.03))
"""Orders, seeds, documents, and the standard deviation of orders', seeds' and runs' effects; documents' is 0.5."""
RATES = ((0.03, 0.0), (0.01, 0.03), (0.1, 0.05), (0.2, 0.2))


def simulate(dice: np.random.Generator, orders: int, seeds: int, spreads: tuple[float, ...]) -> np.ndarray:
    """Return differences (orders, seeds, documents)."""
    order, seed, run, document = spreads
    return (
        dice.normal(0, order, (orders, 1, 1)) + dice.normal(0, seed, (1, seeds, 1))
        + dice.normal(0, run, (orders, seeds, 1)) + dice.normal(0, document, (1, 1, DOCUMENTS))
        + dice.normal(0, document / 2, (orders, seeds, DOCUMENTS))
    )  # fmt: skip


def study_change(data: np.ndarray, *, drawn: bool = False, documents: bool = True) -> Change:
    """Return the mean difference of a study (orders, seeds, documents), as its report has it.

    `drawn`: each seed has other documents.
    """
    ones, runs = (1.0,) * data.shape[2], {}
    for o, s in itertools.product(*map(range, data.shape[:2])):
        one = paired_change(Sample(tuple(data[o, s].tolist()), ones), Sample((0.0,) * len(ones), ones))
        source = ("task", (str(s if drawn else 0),))
        runs[o, s] = replace(one, parts=tuple(replace(part, source=source) for part in one.parts))
    of_documents = mean_of_runs(list(runs.values())) if documents else None
    return crossed_change({at: change.mean for at, change in runs.items()}, of_documents)


def covers(change: Change, truth: float = 0.0) -> bool:
    """Say if an interval has the true difference."""
    return change.low is not None and change.high is not None and change.low <= truth <= change.high


def bootstrap_covers(dice: np.random.Generator, data: np.ndarray, draws: int = 400) -> bool:
    """Say if the percentile bootstrap's interval has 0."""
    o, s, d = data.shape
    means = []
    for _ in range(draws):
        picked = data[dice.integers(0, o, o)][:, dice.integers(0, s, s)].mean(axis=(0, 1))
        means.append(picked[dice.integers(0, d, d)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return bool(low <= 0 <= high)


def of_grids(dice: np.random.Generator, trials: int, bootstrap_trials: int) -> None:
    """Print the table of grids and effects."""
    print("| orders x seeds | effects | interval covers | bootstrap covers |\n|---|---|---|---|")
    for (orders, seeds), (name, spreads) in itertools.product(GRIDS, EFFECTS.items()):
        if (orders == 1 and spreads[0]) or (seeds == 1 and spreads[1]) or (orders == seeds == 1 and spreads[2]):
            continue  # one level says nothing about how levels differ
        ours = np.mean([covers(study_change(simulate(dice, orders, seeds, spreads))) for _ in range(trials)])
        boot = np.mean(
            [bootstrap_covers(dice, simulate(dice, orders, seeds, spreads)) for _ in range(bootstrap_trials)]
        )
        print(f"| {orders} x {seeds} | {name} | {ours:.1%} | {boot:.1%} |", flush=True)


def of_scopes(dice: np.random.Generator, trials: int) -> None:
    """Print the table of documents that are the same or drawn by seed."""
    print(
        "\n| orders x seeds | documents | effects | same | same, left out | drawn by seed |\n|---|---|---|---|---|---|"
    )
    for orders, seeds, n, effect in SCOPES:
        found = np.zeros(3)
        for _ in range(trials):
            own = dice.normal(0, effect if orders > 1 else 0, (orders, 1, 1)) + dice.normal(0, 0.1, (orders, seeds, n))
            own = own + dice.normal(0, effect if orders > 1 else 0, (1, seeds, 1))
            own = own + dice.normal(0, effect, (orders, seeds, 1))
            same, drawn = own + dice.normal(0, 0.5, n), own + dice.normal(0, 0.5, (1, seeds, n))
            found += [
                covers(study_change(same)),
                covers(study_change(same, documents=False)),
                covers(study_change(drawn, drawn=True)),
            ]
        cells = " | ".join(f"{x:.1%}" for x in found / trials)
        print(f"| {orders} x {seeds} | {n} | {effect} | {cells} |", flush=True)


def of_answers(dice: np.random.Generator, trials: int) -> None:
    """Print the table of answers of which few change."""
    print("\n| orders x seeds | documents | worse | better | interval covers |\n|---|---|---|---|---|")
    for (orders, seeds), n, (worse, better) in itertools.product(((1, 1), (1, 3), (3, 3)), (20, 100), RATES):
        held = 0
        for _ in range(trials):
            lots = dice.random((orders, seeds, n)), np.broadcast_to(dice.random(n), (orders, seeds, n))
            own, common = (np.where(lot < worse, -1.0, np.where(lot < worse + better, 1.0, 0.0)) for lot in lots)
            data = np.where(dice.random(n) < 0.5, common, own)
            held += covers(study_change(data), better - worse)
        print(f"| {orders} x {seeds} | {n} | {worse:.0%} | {better:.0%} | {held / trials:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--bootstrap-trials", type=int, default=300)
    args = parser.parse_args()
    of_grids(np.random.default_rng(0), args.trials, args.bootstrap_trials)
    of_scopes(np.random.default_rng(1), args.trials)
    of_answers(np.random.default_rng(2), args.trials)


if __name__ == "__main__":
    main()
