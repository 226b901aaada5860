"""Confidence intervals of paired differences between two models.

Both models were scored on the same documents, so only the variation of the difference between documents counts. Three
kinds of interval were compared on simulated documents (tests/benchmarks/coverage.py). These have the best coverage:

- right or wrong, 0 or 1: the score interval for paired proportions (Tango, Statistics in Medicine 17, 1998), valid
  even if few or no documents changed sides;
- all other scores: the jackknife of the ratio sum(gains) / sum(weights) with Student's t, its degrees of freedom from
  the weights (Satterthwaite; Bell & McCaffrey 2002), widened on one side for skewed differences (Johnson, JASA 73,
  1978). It is as good as the studentised bootstrap, needs no seed, and costs one pass.

A mean hides documents that went wrong while others went right. `flips` counts both, beyond what guessing does by
itself: with c the chance of a guess, q = max(0, (accuracy - c) / (1 - c)) the share of known answers, and independent
knowledge and guesses, a document that neither model knows is right before and wrong after in (1 - q_old)(1 - q_new)
c (1 - c) of cases. The limits of such a share are no closer than Wilson's of the documents that changed sides, and end
at 0.

Means over tasks combine by squaring the distances from the estimate to its limits (Zou & Donner 2008). Answers to the
same documents in several comparisons (a study's runs) are one sample, whose size is the effective one: that of as many
independent answers with the same variance, between all answers and the documents alone (Kish 1965; for score intervals,
Dean & Pagano, J. Survey Statistics and Methodology 3, 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from hf_contmerge.errors import RunError
from hf_contmerge.run.scores import Block, Sample, Scores, TaskScore

CONFIDENCE = 0.95
_POWER = 0.8


Answers = tuple[float, float, float]
"""How many became right, how many became wrong, and of how many."""


@dataclass(frozen=True)
class Part:
    """A task's share in a mean difference.

    `gains` holds new - old per document, `weights` the documents' weights.
    """

    share: float
    gains: tuple[float, ...]
    weights: tuple[float, ...]
    counts: int = 0
    """1 or -1 for a share of documents that changed sides in one direction."""
    counted: Answers | None = None
    """What the gains count, where they are not 1 (now right), -1 (now wrong) or 0 themselves."""
    guessed: bool = False
    """True if guessing was taken off the gains."""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """The least and the largest possible mean."""
    source: tuple[str, tuple[str, ...]] = ("", ())
    """The task, and what tells its documents from others."""

    @property
    def mean(self) -> float:
        return math.fsum(self.gains) / math.fsum(self.weights)

    @property
    def answers(self) -> Answers | None:
        """The answers that changed sides; None for other scores."""
        if self.counted or set(self.weights) != {1.0} or not set(self.gains) <= {-1.0, 0.0, 1.0}:
            return self.counted
        return self.gains.count(1.0), self.gains.count(-1.0), len(self.gains)


@dataclass(frozen=True)
class Change:
    """A paired utility difference; interval fields are None for too few documents."""

    mean: float
    stderr: float | None
    low: float | None = None
    high: float | None = None
    confidence: float = CONFIDENCE
    parts: tuple[Part, ...] = field(default=(), repr=False, compare=False)
    matters: float = 0.0
    """A smaller difference is the same for all purposes, however certain."""

    @property
    def sign(self) -> int:
        """1 for better, -1 for worse, 0 for inconclusive or the same."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high or abs(self.mean) < self.matters:
            return 0
        return int(math.copysign(1, self.mean))

    @property
    def same(self) -> bool:
        """True if the difference or its interval is too small."""
        if self.low is None or self.high is None or not self.matters:
            return False
        certain = not self.low <= 0 <= self.high
        return (certain and abs(self.mean) < self.matters) or -self.matters < self.low <= self.high < self.matters

    @property
    def seen(self) -> str:
        """The conclusion in words."""
        return "the same" if self.same else ("no change seen", "better", "worse")[self.sign]

    @property
    def detectable(self) -> float | None:
        """The smallest true difference detectable in four of five such samples."""
        if self.low is None or self.high is None or self.low == self.high:
            return None
        normal = NormalDist()
        limit = normal.inv_cdf((1 + self.confidence) / 2)
        return max(self.mean - self.low, self.high - self.mean) * (1 + normal.inv_cdf(_POWER) / limit)

    def at(self, confidence: float) -> Change:
        """Return the difference with another confidence level (0 to 1)."""
        if not self.parts:
            return Change(self.mean, self.stderr, confidence=confidence, matters=self.matters)
        return replace(_change(self.parts, confidence), matters=self.matters)


Group = tuple[Scores, Scores, Sequence[str]]
"""New scores, old scores, and the tasks averaged within the group."""


def mean_change(groups: Iterable[Group], block: Block, confidence: float = CONFIDENCE) -> Change | None:
    """Return the mean change over groups; None if a score is missing.

    Stages are averaged as in ScoreMatrix.

    Raises:
        RunError: the two scores of a task were measured on different documents.
    """
    parts = _parts(groups, block, _difference)
    return _change(_joined(parts), confidence) if parts else None


def level(groups: Iterable[tuple[Scores, Sequence[str]]], block: Block) -> Change | None:
    """Return one model's mean utility, as a change from 0."""
    parts = _parts([(scores, scores, names) for scores, names in groups], block, _utility)
    return _change(_joined(parts), CONFIDENCE) if parts else None


def mean_of_runs(changes: Sequence[Change], confidence: float = CONFIDENCE) -> Change:
    """Return the mean change over runs, whose documents may be the same."""
    return _change(_joined([replace(p, share=p.share / len(changes)) for c in changes for p in c.parts]), confidence)


def combined(changes: Iterable[tuple[float, Change]], confidence: float = CONFIDENCE) -> Change:
    """Return a weighted sum of changes on different documents.

    Weights are 0 or more.
    """
    return _change([replace(p, share=factor * p.share) for factor, c in changes for p in c.parts], confidence)


def flips(groups: Iterable[Group], to: Literal["wrong", "right"], confidence: float = CONFIDENCE) -> Change | None:
    """Return the shares of documents gone right or wrong, beyond guessing.

    Utility changes: wrong ones are negative, and both add up to the change of the accuracy. None if a score is missing,
    is not simply right or wrong, or does not say how likely a guess is. Raises as `mean_change`.
    """
    parts = _parts(groups, "accuracy", lambda new, old, share: _flipped(new, old, share, to))
    return _change(_joined(parts), confidence) if parts else None


_PartOf = Callable[[TaskScore, TaskScore, float], Part | None]


def _parts(groups: Iterable[Group], block: Block, part_of: _PartOf) -> list[Part] | None:
    """Return each task's part in a mean over groups; None if incomplete."""
    measured = []
    for new, old, names in groups:
        tasks = [t for t in names if any(t in scores and scores[t].block == block for scores in (new, old))]
        if any(t not in new or t not in old for t in tasks):
            return None
        if tasks:
            measured.append([(t, new[t], old[t]) for t in tasks])
    parts: list[Part] = []
    for tasks in measured:
        for task, new, old in tasks:
            _require_same_documents(task, new, old)
            part = part_of(new, old, 1 / len(tasks) / len(measured))
            if part is None:
                return None
            digest = str(new.details.get("documents_sha256", ""))
            parts.append(replace(part, source=(task, new.documents or (digest,))))
    return parts


def paired_change(new: Sample, old: Sample, confidence: float = CONFIDENCE) -> Change:
    """Return utility(new) - utility(old) on the same documents.

    Pairing removes the documents' common variation, and detects far smaller changes than two separate standard errors.

    Raises:
        ValueError: the samples have different documents.
    """
    if new.weights != old.weights:
        raise ValueError("the two samples have different documents")
    gains = tuple(a - b for a, b in zip(new.gains, old.gains, strict=True))
    return _change((Part(1.0, gains, new.weights),), confidence)


def score_change(task: str, new: TaskScore, old: TaskScore) -> Change:
    """Return the change of one task. Raises RunError for different documents."""
    _require_same_documents(task, new, old)
    return paired_change(new.sample, old.sample)


def same_documents(new: TaskScore, old: TaskScore) -> bool:
    """Check two scores for equal documents, as far as recorded."""
    digests = new.details.get("documents_sha256"), old.details.get("documents_sha256")
    differ = (new.documents and old.documents and new.documents != old.documents) or (
        all(digests) and digests[0] != digests[1]
    )
    return new.weights == old.weights and not differ


def exceeds(changes: Iterable[Change | None], allowed: float, confidence: float = CONFIDENCE) -> bool:
    """Check for a drop larger than `allowed` among several changes.

    The test is one-sided and Bonferroni-corrected: a model without losses triggers it in at most 1 - confidence of all
    cases, for any number of changes. Changes not measured, or measured on a single document, never trigger it.

    Args:
        changes: new - old, each in the utility of its block.
        allowed: tolerated drop in the same units; 0 or more.
        confidence: 0 to 1.
    """
    return any(proven_drops([c for c in changes if c is not None], allowed, confidence))


def proven_drops(changes: Sequence[Change], allowed: float, confidence: float = CONFIDENCE) -> list[bool]:
    """Say of each change if it proves a drop, as in `exceeds`."""
    uppers = (c.high for c in one_sided(changes, confidence))
    return [upper is not None and -upper > allowed for upper in uppers]


def one_sided(changes: Sequence[Change], confidence: float) -> list[Change]:
    """Return changes with one-sided intervals that hold jointly.

    Bonferroni-corrected. Changes measured on a single document have no interval and do not count.
    """
    measured = sum(c.stderr is not None for c in changes)
    return [c.at(1 - 2 * (1 - confidence) / max(measured, 1)) for c in changes]


def _require_same_documents(task: str, new: TaskScore, old: TaskScore) -> None:
    if not same_documents(new, old):
        raise RunError(
            f"Cannot compare scores of the task {task}: the old score has {len(old.gains)} documents, the new one "
            f"{len(new.gains)} different ones. Measure again with `contmerge redo RUN score`."
        )


def _utility(score: TaskScore, _: TaskScore, share: float) -> Part:
    bounds = (0.0, 1.0) if score.block == "accuracy" else (-math.inf, math.inf)
    return Part(share, score.gains, score.weights, counts=1, bounds=bounds)


def _difference(new: TaskScore, old: TaskScore, share: float) -> Part:
    largest = 1.0 if new.block == "accuracy" else math.inf
    gains = tuple(a - b for a, b in zip(new.gains, old.gains, strict=True))
    return Part(share, gains, new.weights, bounds=(-largest, largest))


def _flipped(new: TaskScore, old: TaskScore, share: float, to: Literal["wrong", "right"]) -> Part | None:
    """Return the flips of a task's documents, with influences on guessing."""
    c, variance = (new.details.get(word) for word in ("chance", "chance_variance"))
    if (
        c is None
        or variance is None
        or not 0 <= c < 1
        or not 0 <= variance <= 1
        or {*new.gains, *old.gains} - {0.0, 1.0}
    ):
        return None
    before, after, sign = np.array(old.gains), np.array(new.gains), -1 if to == "wrong" else 1
    flipped = before * (1 - after) if to == "wrong" else (1 - before) * after
    unknown = [min(1.0, (1 - x.mean()) / (1 - c)) for x in (before, after)]  # 1 - q
    slopes = [(x - x.mean()) / (1 - c) * (x.mean() > c) for x in (before, after)]
    guessed = variance * (unknown[0] * unknown[1] - unknown[1] * slopes[0] - unknown[0] * slopes[1])
    gains = tuple(float(x) for x in sign * (flipped - guessed))
    turned = float(flipped.sum())
    counted = (0.0, turned, float(len(gains))) if sign < 0 else (turned, 0.0, float(len(gains)))
    bounds = (-1.0, 0.0) if sign < 0 else (0.0, 1.0)
    return Part(share, gains, new.weights, sign, counted, guessed=bool(guessed.any()), bounds=bounds)


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Combine parts of the same documents into one; they are not independent."""
    together: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        together.setdefault((part.source, part.weights), []).append(part)
    joined = []
    for same in together.values():
        share = math.fsum(p.share for p in same)
        factors = [p.share / share for p in same]
        means = tuple(
            map(math.fsum, zip(*([f * g for g in p.gains] for f, p in zip(factors, same, strict=True)), strict=True))
        )
        one = replace(same[0], share=share, gains=means, counted=_together(same, factors, means))
        joined.append(replace(one, guessed=any(p.guessed for p in same)) if len(same) > 1 else same[0])
    return tuple(joined)


def _together(parts: Sequence[Part], factors: Sequence[float], gains: Sequence[float]) -> Answers | None:
    """Return answers to the same documents as one sample of effective size.

    Args:
        parts: the answers of each comparison.
        factors: their weights, which sum to 1.
        gains: the documents' weighted means.
    """
    answers = [p.answers for p in parts]
    shares = [(better / of, worse / of) for better, worse, of in filter(None, answers)]
    if len(shares) < len(parts):
        return None
    better, worse = (math.fsum(f * x[side] for f, x in zip(factors, shares, strict=True)) for side in (0, 1))
    apart = math.fsum(f * (b + w - (b - w) ** 2) for f, (b, w) in zip(factors, shares, strict=True))
    n, most = len(gains), len(gains) / math.fsum(f * f for f in factors)
    together = float(np.var(gains))
    # As if one more document had changed sides in all of them: few changes do not tell independence.
    size = min(max(n * (apart + 1 / n) / (together + 1 / n), n), most)
    return better * size, worse * size, size


def _change(parts: Sequence[Part], confidence: float) -> Change:
    """Return the weighted mean of tasks' differences, with its interval.

    Documents of different tasks are independent.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, such as 0.95; got {confidence}")
    mean = math.fsum(p.share * p.mean for p in parts)
    found = reach(parts, confidence)
    if found is None:
        return Change(mean, None, confidence=confidence, parts=tuple(parts))
    stderr, below, above = found
    return Change(mean, stderr, *possible(mean - below, mean + above, parts), confidence, tuple(parts))


def reach(parts: Sequence[Part], confidence: float) -> tuple[float, float, float] | None:
    """Return a sum's standard error, and the distances to its limits.

    None if a part has fewer than two documents. Without parts all are 0.
    """
    known = [s for p in parts if (s := _Spread.of(p))]
    if len(known) < len(parts):
        return None
    level, pairs = (1 + confidence) / 2, list(zip(parts, known, strict=True))
    each = [_answer_limits(p, s, level) for p, s in pairs if p.answers]
    below, above = zip(*each, _limits([s for p, s in pairs if not p.answers], level), strict=True)
    return math.sqrt(math.fsum(s.variance for s in known)), math.hypot(*below), math.hypot(*above)


def possible(low: float, high: float, parts: Sequence[Part]) -> tuple[float, float]:
    """Cut an interval at the range of the parts' sum."""
    if not parts:
        return low, high
    least, most = (math.fsum(p.share * p.bounds[side] for p in parts if p.share) for side in (0, 1))
    return min(max(low, least), most), min(max(high, least), most)


@dataclass(frozen=True)
class _Spread:
    """Sampling variation of a part: variance, third cumulant and degrees of freedom."""

    variance: float
    third: float
    freedom: float
    """Degrees of freedom of the variance."""

    @classmethod
    def of(cls, part: Part) -> _Spread | None:
        """Estimate the variation of share * sum(gains) / sum(weights) by jackknife.

        None for fewer than two documents.
        """
        weights, gains = np.array(part.weights), np.array(part.gains)
        gains, weights = gains[weights > 0], weights[weights > 0]
        n, total = len(weights), weights.sum()
        if n < 2:
            return None
        h = weights / total
        without = (gains - part.mean * weights) / total / (1 - h)  # drop of the ratio without this document
        variance = (n - 1) / n * float(without @ without)
        centred = without - without.mean()
        second = float(np.mean(centred**2))
        skewness = float(np.mean(centred**3)) / second**1.5 if second else 0.0
        third = skewness / math.sqrt(n) * variance**1.5
        return cls(part.share**2 * variance, part.share**3 * third, _freedom(h))


def _freedom(h: np.ndarray) -> float:
    """Return Satterthwaite's degrees of freedom of the jackknife variance.

    n - 1 for equal weights. The variance is a quadratic form y'My of the documents' differences y. Their variances are
    assumed proportional to their weights `h` (summing to 1): trace(MV)^2 / trace(MVMV), where M = diag(a) - 1b' - b1' +
    s11', without building M.
    """
    a = 1 / (1 - h) ** 2
    b = a * h
    s = float(b @ h)
    own = a - 2 * b + s
    apart = s**2 + 2 * float(b**2 @ h) + 2 * float(b @ h) ** 2 - 4 * s * float(b @ h)  # sum over all i, j of M_ij^2 V V
    itself = float(((own**2 - (s - 2 * b) ** 2) * h**2).sum())  # diagonal entries differ
    return float(own @ h) ** 2 / (apart + itself)


def _limits(spreads: Sequence[_Spread], level: float) -> tuple[float, float]:
    """Return the distances from a sum's estimate to its limits.

    The lower comes first. `level` is one-sided, such as 0.975.
    """
    variance = math.fsum(s.variance for s in spreads)
    if variance == 0:
        return 0.0, 0.0
    from scipy.special import stdtrit  # slow to import; most commands need no interval

    freedom = variance**2 / math.fsum(s.variance**2 / s.freedom for s in spreads)
    t = float(stdtrit(freedom, level))
    lean = math.fsum(s.third for s in spreads) / (6 * variance) * (1 + 2 * t * t)
    return t * math.sqrt(variance) + max(-lean, 0.0), t * math.sqrt(variance) + max(lean, 0.0)


def _answer_limits(part: Part, spread: _Spread, level: float) -> tuple[float, float]:
    """Return the same distances for paired answers, times the part's share."""
    assert part.answers
    z = NormalDist().inv_cdf(level)
    better, worse, of = part.answers
    if part.counts:
        closer, farther = _one_way_limits(part, spread, level, z)
        return (closer, farther) if part.counts > 0 else (farther, closer)
    mean = (better - worse) / of
    below, above = mean + _score_limit(worse, better, of, z), _score_limit(better, worse, of, z) - mean
    return part.share * below, part.share * above


def _one_way_limits(part: Part, spread: _Spread, level: float, z: float) -> tuple[float, float]:
    """Return the same distances for changes in one direction.

    The one towards 0 comes first. Chance may take off more changes than there were, for certain: guesses were not
    independent then, and none of these changes need have been one.
    """
    assert part.answers
    better, worse, of = part.answers
    closer, farther = (part.share * x for x in _proportion_limits(better + worse, of, z))
    if not part.guessed:
        return closer, farther
    below, above = _limits([spread], level)[:: part.counts]
    size, most = part.share * part.counts * part.mean, part.share * (better + worse) / of + farther
    closer, farther = max(closer, below), max(farther, above)
    return closer, (farther if size + farther >= 0 else most - size)


def _proportion_limits(count: float, n: float, z: float) -> tuple[float, float]:
    """Return the distances from a proportion to its limits (Wilson 1927)."""
    middle = (count + z * z / 2) / (n + z * z)
    reach = z * math.sqrt(count * (n - count) / n + z * z / 4) / (n + z * z)
    return count / n - max(middle - reach, 0.0), min(middle + reach, 1.0) - count / n


def _score_limit(better: float, worse: float, n: float, z: float) -> float:
    """Return the upper score limit of a paired difference (Tango 1998).

    It solves better - worse - n*d = -z * sqrt(n * (2q + d(1 - d))) for d, where q is the most likely share of answers
    turned wrong, given d. Bisection works because left minus right falls with d.
    """

    def allowed(d: float) -> bool:
        linear, constant = -better - worse + (2 * n - better + worse) * d, -worse * d * (1 - d)
        q = (math.sqrt(linear * linear - 8 * n * constant) - linear) / (4 * n)
        return better - worse - n * d >= -z * math.sqrt(max(n * (2 * q + d * (1 - d)), 0.0))

    low, high = (better - worse) / n, 1.0
    if allowed(high):
        return high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low
