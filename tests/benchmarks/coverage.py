"""Intervals of paired differences, held against simulated stages whose true drop is known.

    python tests/benchmarks/coverage.py                       500 trials of each shape, well under a minute
    python tests/benchmarks/coverage.py --trials 4000         finer
    python tests/benchmarks/coverage.py --bootstrap           the studentised bootstrap beside it (a minute more)

Each trial draws the documents of a stage anew, how two models do on them, and asks for the 95 % interval of their
difference: how often does it hold the truth? And with no true change: how often does a guard cry wolf, that allows
nothing at all, or 0.01 (nats a word, or a share of answers)?

What is drawn: word counts are lognormal. A document's change per word has the shape that the row names; `skewed` is a
gamma distribution of shape 3 (a few documents lose much; `lifted`: gain much), `heavy` is Student's with 4 degrees of
freedom, `words` has noise of each word and so less of it in long documents. Answers: one rate of right answers that
become wrong, another of the reverse.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hf_contmerge.run.scores import Sample
from hf_contmerge.scoring.forgetting.paired import Change, Part, exceeds, paired_change

Drawn = tuple[Sample, Sample]
SIZES = (20, 50, 200)
SPREAD = 0.05  # nats a word between documents, of a change
TOLERATED = 0.01


@dataclass(frozen=True)
class Shape:
    """How documents are drawn: (new, old) for a generator, a number of documents, and whether there is a drop."""

    draw: Callable[[np.random.Generator, int, bool], Drawn]
    drop: float
    """The truth, where there is one: utility(old) - utility(new)."""


def texts(kind: str, *, unequal: float, drop: float = 0.1) -> Shape:
    """Return texts whose log-likelihood a word falls by `drop` on average; `unequal`: sigma of the log of the words."""

    def draw(rng: np.random.Generator, n: int, dropped: bool) -> Drawn:
        words = np.round(rng.lognormal(4.5, unequal, n)) + 1
        hardness = rng.normal(-3.0, 0.5, n)
        noise = {
            "normal": lambda: rng.normal(size=n),
            "heavy": lambda: rng.standard_t(4, n) / 2**0.5,
            "skewed": lambda: (3 - rng.gamma(3, size=n)) / 3**0.5,
            "lifted": lambda: (rng.gamma(3, size=n) - 3) / 3**0.5,
            "words": lambda: rng.normal(size=n) * 10 / np.sqrt(words),
        }[kind]()
        change = SPREAD * noise - dropped * drop
        weights = tuple(words.tolist())
        return Sample(tuple((words * (hardness + change)).tolist()), weights), Sample(
            tuple((words * hardness).tolist()), weights
        )

    return Shape(draw, drop)


def answers(worse: float, better: float) -> Shape:
    """Return right and wrong answers; a share becomes wrong, and another right. Without a drop both are equal."""

    def draw(rng: np.random.Generator, n: int, dropped: bool) -> Drawn:
        rates = (worse, better) if dropped else ((worse + better) / 2,) * 2
        lot = rng.random(n)
        old = (lot < rates[0]) | ((lot > rates[0] + rates[1]) & (rng.random(n) < 0.6))
        new = np.where(lot < rates[0], False, np.where(lot < rates[0] + rates[1], True, old))
        ones = (1.0,) * n
        return Sample(tuple(new.astype(float).tolist()), ones), Sample(tuple(old.astype(float).tolist()), ones)

    return Shape(draw, worse - better)


SHAPES: Mapping[str, Shape] = {
    "texts, normal": texts("normal", unequal=0.3),
    "texts, words": texts("words", unequal=0.5),
    "texts, heavy": texts("heavy", unequal=0.5),
    "texts, skewed": texts("skewed", unequal=0.5),
    "texts, skewed, very unequal": texts("skewed", unequal=0.8),
    "texts, lifted": texts("lifted", unequal=0.3),
    "answers, 30 % lost, 10 % won": answers(0.30, 0.10),
    "answers, 20 % lost, 5 % won": answers(0.20, 0.05),
    "answers, 10 % lost, 2 % won": answers(0.10, 0.02),
}


@dataclass(frozen=True)
class Found:
    """Shares of trials: intervals that hold the truth, by method; guards that cry wolf, by what they tolerate."""

    covered: Mapping[str, float]
    wolf: Mapping[float, float]


Limits = Callable[[Sample, Sample], tuple[float, float]]


def ours(new: Sample, old: Sample) -> tuple[float, float]:
    change = paired_change(new, old)
    assert change.low is not None
    assert change.high is not None
    return change.low, change.high


def two_errors(new: Sample, old: Sample) -> tuple[float, float]:
    """Return the estimate and 1.96 standard errors of the ratio (linearised): what most people would do."""
    gains, weights = np.array(new.gains) - np.array(old.gains), np.array(new.weights)
    mean, n = gains.sum() / weights.sum(), len(gains)
    error = np.sqrt(n / (n - 1) * ((gains - mean * weights) ** 2).sum()) / weights.sum()
    z = NormalDist().inv_cdf(0.975)
    return float(mean - z * error), float(mean + z * error)


def bootstrap(new: Sample, old: Sample, *, resamples: int = 999) -> tuple[float, float]:
    """Return the studentised bootstrap's interval, resampling documents, with the jackknife's standard error."""
    rng = np.random.default_rng(0)
    gains, weights = np.array(new.gains) - np.array(old.gains), np.array(new.weights)
    drawn = rng.integers(0, len(gains), (resamples, len(gains)))
    mean, error = _jackknife(gains[None], weights[None])
    means, errors = _jackknife(gains[drawn], weights[drawn])
    t = np.sort((means - mean) / np.maximum(errors, 1e-12))
    return float((mean - t[int(0.975 * resamples)] * error)[0]), float((mean - t[int(0.025 * resamples)] * error)[0])


def _jackknife(gains: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total, n = weights.sum(1, keepdims=True), gains.shape[1]
    mean = gains.sum(1, keepdims=True) / total
    without = (gains - mean * weights) / (total - weights)
    return mean[:, 0], np.sqrt((n - 1) / n * (without**2).sum(1))


def trial(shape: Shape, n: int, seed: int, methods: Mapping[str, Limits]) -> tuple[dict[str, bool], Drawn]:
    """Return which intervals hold the truth in one draw with a drop, and a draw without one."""
    rng = np.random.default_rng(seed)
    new, old = shape.draw(rng, n, True)
    limits = {name: method(new, old) for name, method in methods.items()}
    return {k: low <= -shape.drop <= high for k, (low, high) in limits.items()}, shape.draw(rng, n, False)


def measure(shape: Shape, n: int, trials: int, methods: Mapping[str, Limits]) -> Found:
    """Return how the methods did on a shape with n documents; trial i has the seed i."""
    found = [trial(shape, n, seed, methods) for seed in range(trials)]
    same = [paired_change(*drawn) for _, drawn in found]
    return Found(
        {name: float(np.mean([holds[name] for holds, _ in found])) for name in methods},
        {allowed: float(np.mean([exceeds([c], allowed) for c in same])) for allowed in (0.0, TOLERATED)},
    )


def means(trials: int) -> tuple[float, float]:
    """Return the coverage of a mean over four stages, and how often a guard over eight tasks cries wolf at 0."""
    covered, wolf = [], []
    stages = [SHAPES[name] for name in ("texts, words", "texts, heavy", "texts, skewed", "texts, normal")]
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        change = _mean([s.draw(rng, 20, True) for s in stages])
        covered.append(change.low is not None and change.high is not None and change.low <= -0.1 <= change.high)
        eight = [s.draw(rng, 20, False) for s in (*stages, *list(SHAPES.values())[-4:])]
        wolf.append(exceeds([paired_change(*drawn) for drawn in eight], 0.0))
    return float(np.mean(covered)), float(np.mean(wolf))


def _mean(drawn: list[Drawn]) -> Change:
    """Return the mean over stages of one task each."""
    each = [paired_change(new, old).parts[0] for new, old in drawn]
    parts = tuple(Part(1 / len(each), p.gains, p.weights) for p in each)
    return Change(float(np.mean([p.mean for p in each])), None, parts=parts).at(0.95)


def _cells(shares: Iterable[float]) -> str:
    return " | ".join(f"{100 * share:.1f} %" for share in shares) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--bootstrap", action="store_true")
    args = parser.parse_args()
    methods = {"ours": ours, "1.96 errors": two_errors} | ({"bootstrap": bootstrap} if args.bootstrap else {})
    print(f"{args.trials} trials: share of 95 % intervals that hold the true drop; false alarms without a change\n")
    print("| documents | " + " | ".join(("n", *methods, "guard, allows 0", f"allows {TOLERATED}")) + " |")
    print("|---" * (4 + len(methods)) + "|")
    rows = []
    for name, shape in SHAPES.items():
        for n in SIZES:
            found = measure(shape, n, args.trials, methods)
            rows.append((*found.covered.values(), *found.wolf.values()))
            print(f"| {name} | {n} | " + _cells(rows[-1]), flush=True)
    print("| the mean of these | | " + _cells(np.mean(rows, axis=0)))
    covered, wolf = means(args.trials)
    print(f"\nMean over four stages of 20 texts each: {100 * covered:.1f} % of the intervals hold the truth.")
    print(f"A guard over eight tasks of 20 documents each that allows 0: {100 * wolf:.1f} % false alarms.")


if __name__ == "__main__":
    main()
