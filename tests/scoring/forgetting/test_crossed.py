"""Intervals over orders and seeds, against hand calculation and simulation."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy import stats

from hf_contmerge.run.scores import Sample, TaskScore
from hf_contmerge.scoring.forgetting.crossed import crossed_change
from hf_contmerge.scoring.forgetting.paired import Change, mean_change, mean_of_runs, paired_change

z2 = stats.norm.ppf(0.975) ** 2


def documents(gains: np.ndarray) -> Change:
    ones = (1.0,) * len(gains)
    return paired_change(Sample(tuple(gains), ones), Sample((0.0,) * len(gains), ones))


def drawn(*each: Change) -> Change:
    """Return the mean over runs that have other documents each."""
    sources = [("task", (str(i),)) for i in range(len(each))]
    return mean_of_runs([
        replace(change, parts=(replace(change.parts[0], source=source),))
        for change, source in zip(each, sources, strict=True)
    ])  # fmt: skip


def answers(*gains: float) -> Change:
    return documents(np.array(gains, float))


def test_seeds_alone_are_students_t() -> None:
    values = [0.1, 0.4, 0.2, 0.3]
    change = crossed_change({(1, s): v for s, v in enumerate(values)}, None)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (change.low, change.high) == pytest.approx(expected)


def test_one_run_has_the_documents_interval() -> None:
    gains = np.random.default_rng(0).normal(0.1, 1, 50)
    change = crossed_change({(1, 0): float(gains.mean())}, documents(gains))
    assert (change.low, change.high) == pytest.approx((documents(gains).low, documents(gains).high))
    symmetric = np.concatenate([gains, 0.2 - gains])
    change = crossed_change({(1, 0): 0.1}, documents(symmetric))
    expected = stats.t.interval(0.95, 99, loc=0.1, scale=stats.sem(symmetric))
    assert (change.low, change.high) == pytest.approx(expected)


def test_two_way_variance_by_hand() -> None:
    """Searle et al.: var(mean) = (MS_order + MS_seed - MS_rest) / (orders * seeds)."""
    grid = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 3.0, (1, 1): 5.0}  # MS: 6.25, 2.25, 0.25
    change = crossed_change(grid, None)
    assert change.mean == 2.75
    assert change.stderr == pytest.approx(math.sqrt((6.25 + 2.25 - 0.25) / 4))


def test_equal_runs_and_unknown_intervals() -> None:
    same = crossed_change({(0, 0): 0.5, (0, 1): 0.5}, None)
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)
    alone = crossed_change({(0, 0): 0.5}, None)
    assert (alone.mean, alone.low) == (0.5, None)


def test_documents_of_each_seed_are_not_counted_twice() -> None:
    grid = {(0, s): v for s, v in enumerate((0.1, 0.2, 0.4))}
    gains = documents(np.random.default_rng(0).normal(0, 1, 40))
    own = crossed_change(grid, drawn(gains, gains, gains))
    common = crossed_change(grid, gains)
    assert own.stderr is not None
    assert common.stderr is not None
    assert gains.stderr is not None
    assert common.stderr == pytest.approx(math.hypot(own.stderr, gains.stderr))


def test_drawn_documents_say_the_least_that_is_unknown() -> None:
    """Equal runs on 3 x 20 answers none of which changed are 60 answers, and no proof of equality."""
    still = answers(*[0] * 20)
    found = crossed_change({(0, s): 0.0 for s in range(3)}, drawn(still, still, still))
    each = z2 / (20 + z2) / 3
    assert (found.low, found.high) == pytest.approx((-each * math.sqrt(3), each * math.sqrt(3)))
    lone = documents(np.array([0.5]))
    assert crossed_change({(0, 0): 0.5, (0, 1): 0.5}, drawn(lone, lone)).low is None
    assert crossed_change({(0, 0): 0.5, (0, 1): 0.5}, mean_of_runs([lone, lone])).low is None


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("gains", [[0] * 20, [1] + [0] * 19, [-1] * 4 + [0] * 16])
def test_answers_keep_their_score_interval(gains: list[float], runs: int) -> None:
    """Equal runs on the same documents say what one of them says."""
    one = answers(*gains)
    found = crossed_change({(1, s): one.mean for s in range(runs)}, mean_of_runs([one] * runs))
    assert (found.low, found.high) == pytest.approx((one.low, one.high))
    assert found.seen == one.seen
    assert found.high is not None
    assert found.low is not None
    assert found.high - found.low > 0.3


def test_answers_of_runs_that_differ_are_worth_more() -> None:
    """Ten of 100 documents change in each run: the same ones, or others."""
    each = [answers(*([0] * 10 * s + [1] * 10 + [0] * (90 - 10 * s))) for s in range(3)]
    same, other = (mean_of_runs(changes) for changes in ([each[0]] * 3, each))
    assert (same.low, same.high) == pytest.approx((each[0].low, each[0].high))
    assert same.low is not None
    assert other.low is not None
    assert other.mean == pytest.approx(same.mean)
    assert other.mean - other.low < 0.8 * (same.mean - same.low)


def test_accuracies_end_at_100_points() -> None:
    ones = (1.0,) * 20
    new, old = ({"t": TaskScore("accuracy", "acc", x, x, 0, (x,) * 20, ones, {})} for x in (0.5, 0.25))
    change = mean_change([(new, old, ["t"])], "accuracy")
    assert change
    found = crossed_change({(0, 0): -0.5, (0, 1): 1.0}, change)
    assert (found.low, found.high) == (-1.0, 1.0)


def test_coverage_of_rare_changes() -> None:
    """Three seeds, 20 documents, 3 % of which become wrong: half of them in all runs."""
    dice, held = np.random.default_rng(0), 0
    for _ in range(200):
        common, own = dice.random(20) < 0.015, dice.random((3, 20)) < 0.015
        runs = [answers(*-(common | mine).astype(float)) for mine in own]
        found = crossed_change({(1, s): c.mean for s, c in enumerate(runs)}, mean_of_runs(runs))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= -(1 - 0.985**2) <= found.high
    assert held / 200 >= 0.95


def test_coverage_on_three_orders_and_three_seeds() -> None:
    dice, found = np.random.default_rng(0), []
    for _ in range(600):
        data = (
            dice.normal(0, 0.05, (3, 1, 1)) + dice.normal(0, 0.03, (1, 3, 1)) + dice.normal(0, 0.02, (3, 3, 1))
            + dice.normal(0, 0.3, (1, 1, 60)) + dice.normal(0, 0.1, (3, 3, 60))
        )  # fmt: skip
        grid = {(o, s): float(data[o, s].mean()) for o, s in product(range(3), range(3))}
        change = crossed_change(grid, documents(data.mean(axis=(0, 1))))
        assert change.low is not None
        assert change.high is not None
        found.append(change.low <= 0 <= change.high)
    assert 0.92 <= np.mean(found) <= 0.98
