"""Time and peak memory of a merge as functions of parameters and experts: measured, fitted, drawn.

    python tests/benchmarks/cost_model.py --picture cost.png             4 sizes, 2, 4 and 8 experts, magmax and opcm
    python tests/benchmarks/cost_model.py --picture cost.png --quick     two sizes, to see that it works

The models, fitted by least squares of the relative residuals; P parameters, T experts, matrices of q x n with q <= n:

    seconds = a + b * 2 P (T + 2) / 10^9  + c * (T - 1) * sum of q^2 n / 10^12        bytes in and out; decompositions
    bytes   = a + b * 4 * (largest matrix) + c * 2 P (T + 2)                          c: what grows with the model

c is left out for magmax's seconds, which decomposes nothing. A constant that would be negative is taken as zero.
"""

import argparse
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import measure
import models
import numpy as np

RULES = {"magmax": {"lambda": 0.5}, "opcm": {"alpha": 0.5}}
SIZES = ("8M", "20M", "60M", "176M")
COUNTS = (2, 4, 8)
COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito's, told apart by colour-blind readers
MARKERS = "os^"


@dataclass(frozen=True)
class Point:
    """One merge: what was merged, and what it cost."""

    rule: str
    size: str
    experts: int
    seconds: float
    memory: float

    @property
    def parameters(self) -> int:
        return models.SIZES[self.size].parameters(tied=True)


@dataclass(frozen=True)
class Fit:
    """Fitted constants, what they multiply, and the relative residuals."""

    words: tuple[str, ...]
    constants: tuple[float, ...]
    residuals: tuple[float, ...]

    def at(self, features: Sequence[float]) -> float:
        """Return what the model expects."""
        return float(np.dot(self.constants, features))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_arguments(parser)
    parser.add_argument("--picture", type=Path, help="where the PNG goes")
    parser.add_argument("--sizes", nargs="+", choices=models.SIZES, default=SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    sizes, counts, repeats = (("tiny", "8M"), (2, 3), 1) if args.quick else (args.sizes, COUNTS, args.repeats)
    measure.contmerge("merge", "from-recipe")
    points = measured(args.models, sizes, counts, repeats)
    print(f"Medians of {repeats} runs, bf16 in and out. {measure.machine(args.models)}\n")
    print("\n".join(table(points)), end="\n\n")
    fits = {rule: (fit(points, rule, time_features), fit(points, rule, memory_features)) for rule in RULES}
    for rule, (seconds, memory) in fits.items():
        print(f"- {rule}, seconds: {formula(seconds, 1, 's')}")
        print(f"- {rule}, bytes: {formula(memory, 2**20, 'MiB')}")
    if args.picture:
        draw(args.picture, points, fits)
        print(f"\nPicture: {args.picture}")


def measured(root: Path, sizes: Sequence[str], counts: Sequence[int], repeats: int) -> list[Point]:
    """Run every merge `repeats` times, in turn with the other rule."""
    points = []
    for size, count in itertools.product(sizes, counts):
        base = models.base_model(root, size)
        experts = models.experts(base, count)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            commands = {rule: _command(Path(scratch), rule, base, experts) for rule in RULES}
            costs = measure.alternate(commands, repeats=repeats)
        for rule, found in costs.items():
            points.append(Point(rule, size, count, measure.median(found), measure.median(found, measure.peak)))
    return points


def _command(scratch: Path, rule: str, base: Path, experts: list[Path]) -> measure.Command:
    recipe, out = scratch / f"{rule}.yml", scratch / rule
    models.recipe(recipe, rule, base, experts, dtype="float32", out_dtype="bfloat16", **RULES[rule])
    return measure.Command(measure.contmerge("merge", "from-recipe", str(recipe), str(out)), output=out)


def time_features(rule: str, size: str, experts: float) -> dict[str, float]:
    """Return what the seconds are made of: word -> amount."""
    dimensions = models.SIZES[size]
    moved = 2 * dimensions.parameters(tied=True) * (experts + 2) / 1e9
    work = (experts - 1) * sum(q * q * n for q, n in dimensions.projections()) / 1e12
    return {"": 1.0, " per GB in and out": moved} | ({" per 10^12 of q^2 n": work} if rule == "opcm" else {})


def memory_features(rule: str, size: str, experts: float) -> dict[str, float]:
    """Return what the memory is made of: word -> amount."""
    dimensions = models.SIZES[size]
    largest = max(math.prod(shape) for _, shape in dimensions.shapes(tied=True))
    moved = 2 * dimensions.parameters(tied=True) * (experts + 2)
    return {"": 1.0, " per MiB of the largest weight in float32": 4.0 * largest, " per MiB of all models": moved}


def fit(points: Sequence[Point], rule: str, features) -> Fit:
    """Fit the constants of one rule; those that come out negative are dropped, one by one."""
    chosen = [p for p in points if p.rule == rule]
    rows = [features(rule, p.size, p.experts) for p in chosen]
    found = np.array([p.seconds if features is time_features else p.memory for p in chosen])
    words = tuple(rows[0])
    matrix = np.array([list(row.values()) for row in rows])
    kept = list(range(len(words)))
    while True:
        solved = np.linalg.lstsq(matrix[:, kept] / found[:, None], np.ones(len(found)), rcond=None)[0]
        if solved.min() >= 0:
            break
        kept.pop(int(solved.argmin()))
    constants = np.zeros(len(words))
    constants[kept] = solved
    residuals = matrix @ constants / found - 1
    return Fit(words, tuple(map(float, constants)), tuple(map(float, residuals)))


def formula(found: Fit, unit: float, word: str) -> str:
    """Return a fit in words. Only the first constant has a unit to be changed: the others are per unit already."""
    terms = [f"{found.constants[0] / unit:.3g} {word}"]
    terms += [f"{c:.3g} {word}{per}" for per, c in zip(found.words[1:], found.constants[1:], strict=True)]
    worst = max(map(abs, found.residuals))
    typical = math.sqrt(sum(r * r for r in found.residuals) / len(found.residuals))
    return f"{' + '.join(terms)}; residuals {typical:.1%} (root mean square), {worst:.1%} (largest)"


def table(points: Sequence[Point]) -> list[str]:
    """Return all points as a Markdown table."""
    rows = ["| rule | parameters | experts | wall, s | peak memory, MiB |", "|---|---|---|---|---|"]
    for p in sorted(points, key=lambda p: (p.rule, p.parameters, p.experts)):
        rows.append(f"| {p.rule} | {p.parameters:,} | {p.experts} | {p.seconds:.2f} | {p.memory / 2**20:.0f} |")
    return rows


def draw(path: Path, points: Sequence[Point], fits: dict[str, tuple[Fit, Fit]]) -> None:
    """Draw seconds and memory over parameters: dots are measured, lines are fitted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(RULES), figsize=(9, 6.4), sharex=True, sharey="row", constrained_layout=True)
    for column, rule in enumerate(RULES):
        for row, features in enumerate((time_features, memory_features)):
            panel(axes[row][column], [p for p in points if p.rule == rule], fits[rule][row], features)
        axes[0][column].set_title(rule)
        axes[1][column].set_xlabel("parameters")
    axes[0][0].set_ylabel("seconds, whole process")
    axes[1][0].set_ylabel("peak memory, MiB")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(axis, points: Sequence[Point], found: Fit, features) -> None:
    """Draw one rule's seconds or memory; for memory also the size of the inputs, to compare with."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    is_time = features is time_features
    counts = sorted({p.experts for p in points})
    for count, colour, marker in zip(counts, COLOURS, MARKERS, strict=False):
        chosen = sorted((p for p in points if p.experts == count), key=lambda p: p.parameters)
        across = [p.parameters for p in chosen]
        unit = 1 if is_time else 2**20
        fitted = [found.at(list(features(p.rule, p.size, count).values())) / unit for p in chosen]
        axis.plot(across, fitted, color=colour, linewidth=1.2)
        measured_at = [p.seconds if is_time else p.memory / unit for p in chosen]
        axis.plot(across, measured_at, marker, color=colour, label=f"{count} experts")
    if not is_time:
        inputs = [2 * p.parameters * (counts[-1] + 1) / 2**20 for p in chosen]
        axis.plot(across, inputs, "--", color="grey", linewidth=1)
        axis.annotate(f"all inputs, {counts[-1]} experts", (across[-1], inputs[-1]), ha="right", va="bottom",
                      color="grey", fontsize=9, xytext=(-24, -4), textcoords="offset points")  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    sizes = {p.parameters: p.size for p in points}
    axis.set_xticks(list(sizes), list(sizes.values()))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_formatter(NullFormatter())
        side.set_minor_locator(NullLocator())
    axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)


if __name__ == "__main__":
    main()
