"""Paired intervals: against brute force, published examples, and simulated documents whose true change is known."""

import math
import random
import statistics

import numpy as np
import pytest

from hf_contmerge.errors import RunError
from hf_contmerge.run.scores import Sample, TaskScore
from hf_contmerge.scoring.forgetting.paired import Change, exceeds, mean_change, paired_change, same_documents


def answers(new: str, old: str) -> tuple[Sample, Sample]:
    """Return samples from strings of 0 and 1."""
    return Sample(tuple(map(float, new)), (1.0,) * len(new)), Sample(tuple(map(float, old)), (1.0,) * len(old))


def flipped(better: int, worse: int, n: int) -> tuple[Sample, Sample]:
    rest = "1" * (n - better - worse)
    return answers("1" * better + "0" * worse + rest, "0" * better + "1" * worse + rest)


def texts(rng: np.random.Generator, change: np.ndarray, *, unequal: float = 0.5) -> tuple[Sample, Sample]:
    """Return samples of texts of unequal length, whose log-likelihood per word changes by this much in each."""
    words = np.round(rng.lognormal(4.5, unequal, len(change))) + 1
    old = words * rng.normal(-3, 0.5, len(change))
    weights = tuple(words.tolist())
    return Sample(tuple((old + words * change).tolist()), weights), Sample(tuple(old.tolist()), weights)


def score(sample: Sample, block: str = "perplexity", **more) -> TaskScore:
    return TaskScore(block, "m", 0.0, sample.utility, None, sample.gains, sample.weights, {}, **more)  # pyright: ignore


def jackknife(new: Sample, old: Sample) -> float:
    """Leave out each document in turn and look at the ratio."""
    gains, n = [a - b for a, b in zip(new.gains, old.gains, strict=True)], len(new.gains)
    mean, total = sum(gains) / sum(new.weights), sum(new.weights)
    left = [(sum(gains) - g) / (total - w) for g, w in zip(gains, new.weights, strict=True)]
    return math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in left))


def test_a_paired_change_by_brute_force():
    words = (3.0, 5.0, 10.0)
    new, old = Sample((-6.0, -11.0, -28.0), words), Sample((-7.0, -11.5, -27.0), words)
    found = paired_change(new, old)
    assert found.mean == pytest.approx(((-6 - 11 - 28) - (-7 - 11.5 - 27)) / 18)
    assert found.stderr == pytest.approx(jackknife(new, old))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.mean < found.high


def test_equal_weights_give_the_textbooks_t():
    gains = (0.3, -0.1, 0.25, 0.15, 0.05, -0.2, 0.4, 0.2)
    symmetric = tuple(statistics.mean(gains) + s * (g - statistics.mean(gains)) for g in gains for s in (1, -1))
    found = paired_change(Sample(symmetric, (2.0,) * 16), Sample((0.0,) * 16, (2.0,) * 16))
    error = statistics.stdev(g / 2 for g in symmetric) / 4
    assert found.stderr == pytest.approx(error)
    assert found.low == pytest.approx(found.mean - 2.131450 * error), "the 0.975 quantile of t with 15 degrees"
    assert found.high == pytest.approx(found.mean + 2.131450 * error)
    assert found.at(0.90).high == pytest.approx(found.mean + 1.753050 * error)


def test_skewness_widens_one_side_only():
    rng = np.random.default_rng(0)
    found = paired_change(*texts(rng, -rng.gamma(0.7, 0.1, 40), unequal=0.01))
    assert found.low is not None
    assert found.high is not None
    assert found.mean - found.low > 1.2 * (found.high - found.mean), "a few large drops: the truth may be larger still"


@pytest.mark.parametrize(
    ("better", "worse", "n", "low", "high"), [(12, 2, 50, 0.0611, 0.3447), (0, 0, 20, -0.1611, 0.1611)]
)
def test_answers_have_tangos_score_interval(better, worse, n, low, high):
    """Tango's own example, 12 and 2 of 50; and z^2 / (n + z^2) where no answer changed, for z = 1.96."""
    found = paired_change(*flipped(better, worse, n))
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)


def test_tangos_limits_solve_their_equation():
    rng = random.Random(0)
    for _ in range(15):
        n = rng.randint(2, 60)
        better = rng.randint(0, n)
        worse = rng.randint(0, n - better)
        found = paired_change(*flipped(better, worse, n))
        mirrored = paired_change(*flipped(worse, better, n))
        assert found.low == pytest.approx(-mirrored.high, abs=1e-8)
        assert -1 <= found.low <= found.mean + 1e-9
        assert found.high <= 1
        if found.high < 1 - 1e-6:
            assert abs(score_statistic(better, worse, n, found.high)) == pytest.approx(1.959964, abs=2e-3)


def score_statistic(better: int, worse: int, n: int, d: float) -> float:
    """Return (b - c - nd) / its deviation where the share q of losses is the most likely one, found by a fine grid."""
    rest = n - better - worse
    q = np.linspace(max(0.0, -d), (1 - d) / 2, 20_001)[1:-1]
    with np.errstate(divide="ignore"):
        terms = [(better, q + d), (worse, q), (rest, 1 - 2 * q - d)]
        likely = sum(count * np.log(np.maximum(share, 1e-300)) for count, share in terms if count)
    best = q[np.argmax(likely)] if better + worse + rest else 0.0
    return (better - worse - n * d) / math.sqrt(n * (2 * best + d * (1 - d)))


def test_too_few_documents_say_nothing():
    one = paired_change(Sample((1.0,), (1.0,)), Sample((0.0,), (1.0,)))
    assert (one, one.sign, one.detectable) == (Change(1.0, None), 0, None)
    empty = Sample((-5.0, 0.0), (3.0, 0.0))
    assert paired_change(empty, Sample((-4.0, 0.0), (3.0, 0.0))).stderr is None, "a text without words is no document"
    with pytest.raises(ValueError, match="between 0 and 1"):
        one.at(1.0)


def test_the_same_model_twice_shows_no_change():
    rng = np.random.default_rng(1)
    old, _ = texts(rng, np.zeros(20))
    same = paired_change(old, old)
    assert (same.mean, same.low, same.high, same.sign, same.detectable) == (0.0, 0.0, 0.0, 0, None)
    assert not exceeds([same], 0.0)


def test_pairing_finds_a_change_that_two_errors_would_hide():
    rng = np.random.default_rng(2)
    new, old = texts(rng, 0.05 + rng.normal(0, 0.03, 40))
    found, apart = paired_change(new, old), math.hypot(new.stderr() or 0, old.stderr() or 0)
    assert found.stderr is not None
    assert found.stderr < apart / 5
    assert found.sign == 1
    assert found.mean < 2 * apart


def test_other_documents_are_refused():
    with pytest.raises(ValueError, match="have different documents"):
        paired_change(Sample((1.0, 2.0), (1.0, 1.0)), Sample((1.0, 2.0), (1.0, 2.0)))
    sample = Sample((1.0, 2.0), (1.0, 1.0))
    old, new = score(sample, documents=("a", "b")), score(sample, documents=("a", "c"))
    assert same_documents(old, old)
    assert same_documents(old, score(sample)), "it was not kept which they were"
    assert not same_documents(old, new)
    with pytest.raises(RunError, match=r"of the task x: the old score has 2 documents.*contmerge redo RUN score"):
        mean_change([({"x": new}, {"x": old}, ["x"])], "perplexity")


@pytest.mark.parametrize("kind", ["texts", "answers"])
def test_what_is_detectable_is_detected_in_four_of_five(kind):
    """The difference that one sample calls detectable, put into many others, is seen in about 80 % of them."""
    rng = np.random.default_rng(3)

    def draw(change: float) -> Change:
        if kind == "texts":
            return paired_change(*texts(rng, change + rng.normal(0, 0.05, 60)))
        lot = rng.random(200)
        better, worse = int((lot < 0.1 + change / 2).sum()), int((lot > 0.9 + change / 2).sum())
        return paired_change(*flipped(better, worse, 200))

    detectable = statistics.median(d for _ in range(40) if (d := draw(0.0).detectable))
    seen = sum(draw(detectable).sign == 1 for _ in range(300))
    assert seen / 300 == pytest.approx(0.8, abs=0.09)


def test_a_mean_over_tasks_combines_their_intervals():
    rng = np.random.default_rng(4)
    drawn = {t: texts(rng, -0.1 + rng.normal(0, 0.05, 30)) for t in "abc"}
    new, old = ({t: score(pair[i]) for t, pair in drawn.items()} for i in (0, 1))
    each = {t: paired_change(*pair) for t, pair in drawn.items()}
    found = mean_change([(new, old, ["a", "b"]), (new, old, ["c"])], "perplexity")
    assert found
    assert found.mean == pytest.approx(each["a"].mean / 4 + each["b"].mean / 4 + each["c"].mean / 2)
    shares = {"a": 0.25, "b": 0.25, "c": 0.5}
    assert found.stderr == pytest.approx(math.hypot(*(share * (each[t].stderr or 0) for t, share in shares.items())))
    assert found.high is not None
    assert found.high - found.mean < 2.1 * (found.stderr or 0), "more documents, more degrees of freedom"


def test_answers_and_partial_marks_combine_by_their_distances():
    new_answers, old_answers = flipped(6, 1, 40)
    rng = np.random.default_rng(5)
    marks = Sample(tuple(rng.random(30).tolist()), (1.0,) * 30), Sample(tuple(rng.random(30).tolist()), (1.0,) * 30)
    new = {"quiz": score(new_answers, "accuracy"), "essay": score(marks[0], "accuracy")}
    old = {"quiz": score(old_answers, "accuracy"), "essay": score(marks[1], "accuracy")}
    found = mean_change([(new, old, ["quiz", "essay"])], "accuracy")
    quiz, essay = paired_change(new_answers, old_answers), paired_change(*marks)
    assert found
    assert found.high is not None
    assert quiz.high is not None
    assert essay.high is not None
    assert found.high - found.mean == pytest.approx(math.hypot(quiz.high - quiz.mean, essay.high - essay.mean) / 2)


def test_a_task_that_counts_twice_is_not_two_samples():
    rng = np.random.default_rng(6)
    new, old = ({"x": score(s)} for s in texts(rng, rng.normal(-0.1, 0.05, 20)))
    once = mean_change([(new, old, ["x"])], "perplexity")
    assert mean_change([(new, old, ["x"]), (new, old, ["x"])], "perplexity") == once


def test_a_guard_speaks_of_drops_beyond_what_is_allowed():
    rng = np.random.default_rng(7)
    dropped = paired_change(*texts(rng, -0.1 + rng.normal(0, 0.03, 30)))
    gained = paired_change(*texts(rng, 0.1 + rng.normal(0, 0.03, 30)))
    one = Change(-5.0, None)
    assert exceeds([dropped], 0.05)
    assert exceeds([gained, dropped, None], 0.05)
    assert not exceeds([dropped], -dropped.mean), "it may as well be less"
    assert not exceeds([gained], 0.0)
    assert not exceeds([one, None], 0.0), "one document proves nothing"
    assert not exceeds([], 0.0)
    assert one.at(0.9) == Change(-5.0, None, confidence=0.9)


def test_asking_for_many_changes_does_not_accuse_more_often():
    """A drop that stands just beyond what is allowed when asked for alone is not enough among twenty."""
    rng = np.random.default_rng(8)
    dropped = paired_change(*texts(rng, -0.1 + rng.normal(0, 0.05, 30)))
    harmless = [paired_change(*texts(rng, rng.normal(0, 0.05, 30))) for _ in range(19)]
    alone = dropped.at(0.9).high
    assert alone is not None
    assert exceeds([dropped], -alone - 1e-6)
    assert not exceeds([dropped, *harmless], -alone - 1e-6)


NOISES = {
    "normal": lambda rng, n: rng.normal(0, 0.05, n),
    "heavy tails": lambda rng, n: 0.035 * rng.standard_t(4, n),
    "a few lose much": lambda rng, n: 0.03 * (3 - rng.gamma(3, size=n)),
}


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("noise", NOISES)
def test_intervals_of_texts_hold_the_truth(noise, n):
    """500 stages whose true drop is 0.1 nats a word: 95 % intervals, within three deviations of 500 trials."""
    rng, held, wolf = np.random.default_rng([n, len(noise)]), 0, 0
    for _ in range(500):
        found = paired_change(*texts(rng, -0.1 + NOISES[noise](rng, n)))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= -0.1 <= found.high
        wolf += exceeds([found], 0.1 + 0.01)  # a drop of what is allowed, less 0.01
    assert 0.925 <= held / 500 <= 0.98
    assert wolf / 500 < 0.05


@pytest.mark.parametrize(("worse", "better", "n"), [(0.2, 0.05, 20), (0.2, 0.05, 50), (0.1, 0.1, 50)])
def test_intervals_of_answers_hold_the_truth(worse, better, n):
    """All that can happen to n answers, each with its probability: the coverage without a simulation."""
    sure, held, wolf = 1 - worse - better, 0.0, 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            log = math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(c + 1) - math.lgamma(n - b - c + 1)
            chance = math.exp(log + b * math.log(better) + c * math.log(worse) + (n - b - c) * math.log(sure))
            if chance > 1e-5:
                found = paired_change(*flipped(b, c, n))
                assert found.low is not None
                assert found.high is not None
                held += chance * (found.low <= better - worse <= found.high)
                wolf += chance * exceeds([found], worse - better + 0.01)
    assert 0.93 <= held <= 0.97
    assert wolf < 0.05
