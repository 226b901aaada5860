"""Intervals over orders and seeds, against hand calculation and simulation."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from hf_contmerge.run.scores import Sample
from hf_contmerge.scoring.forgetting.crossed import crossed_change
from hf_contmerge.scoring.forgetting.paired import Change, paired_change


def documents(gains: np.ndarray) -> Change:
    ones = (1.0,) * len(gains)
    return paired_change(Sample(tuple(gains), ones), Sample((0.0,) * len(gains), ones))


def test_seeds_alone_are_students_t() -> None:
    values = [0.1, 0.4, 0.2, 0.3]
    change = crossed_change({(1, s): v for s, v in enumerate(values)}, None, same_documents=True)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (change.low, change.high) == pytest.approx(expected)


def test_one_run_has_the_documents_interval() -> None:
    gains = np.random.default_rng(0).normal(0.1, 1, 50)
    change = crossed_change({(1, 0): float(gains.mean())}, documents(gains), same_documents=False)
    expected = stats.t.interval(0.95, 49, loc=gains.mean(), scale=stats.sem(gains))
    assert (change.low, change.high) == pytest.approx(expected)


def test_two_way_variance_by_hand() -> None:
    """Searle et al.: var(mean) = (MS_order + MS_seed - MS_rest) / (orders * seeds)."""
    grid = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 3.0, (1, 1): 5.0}  # MS: 6.25, 2.25, 0.25
    change = crossed_change(grid, None, same_documents=True)
    assert change.mean == 2.75
    assert change.stderr == pytest.approx(math.sqrt((6.25 + 2.25 - 0.25) / 4))


def test_equal_runs_and_unknown_intervals() -> None:
    same = crossed_change({(0, 0): 0.5, (0, 1): 0.5}, None, same_documents=True)
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)
    alone = crossed_change({(0, 0): 0.5}, None, same_documents=True)
    assert (alone.mean, alone.low) == (0.5, None)


def test_documents_of_each_seed_are_not_counted_twice() -> None:
    grid = {(0, s): v for s, v in enumerate((0.1, 0.2, 0.4))}
    gains = documents(np.random.default_rng(0).normal(0, 1, 40))
    own = crossed_change(grid, gains, same_documents=False)
    common = crossed_change(grid, gains, same_documents=True)
    assert own.stderr is not None
    assert common.stderr is not None
    assert gains.stderr is not None
    assert common.stderr == pytest.approx(math.hypot(own.stderr, gains.stderr))


def test_coverage_on_three_orders_and_three_seeds() -> None:
    dice, found = np.random.default_rng(0), []
    for _ in range(600):
        data = (
            dice.normal(0, 0.05, (3, 1, 1)) + dice.normal(0, 0.03, (1, 3, 1)) + dice.normal(0, 0.02, (3, 3, 1))
            + dice.normal(0, 0.3, (1, 1, 60)) + dice.normal(0, 0.1, (3, 3, 60))
        )  # fmt: skip
        grid = {(o, s): float(data[o, s].mean()) for o, s in product(range(3), range(3))}
        change = crossed_change(grid, documents(data.mean(axis=(0, 1))), same_documents=True)
        assert change.low is not None
        assert change.high is not None
        found.append(change.low <= 0 <= change.high)
    assert 0.92 <= np.mean(found) <= 0.98
