"""A rule's trial: every rule folds a small weight, and what is cut is counted."""

import math
from dataclasses import replace

import pytest
import torch

from hf_contmerge.merge_rules import Weight, get_rule, rule_names
from hf_contmerge.merging.trial import trial_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(7,), (6, 9), (3, 5, 4), (2, 600, 300), (1, 4000)])
@pytest.mark.parametrize("name", rule_names())
def test_every_rule_is_tried(name: str, shape: tuple[int, ...]) -> None:
    matrix = len(shape) > 1
    for stage in (1, 2):
        trial = trial_of(get_rule(name), Weight("layers.0.weight", matrix, stage, shape, depth=0.5), CPU)
        assert torch.isfinite(trial.fold()).all()
        assert trial.times >= 1


@pytest.mark.parametrize(
    ("rule", "shape", "tried", "times"),
    [
        ("opcm", (1024, 512), (512, 256), 8),  # a decomposition: the third power
        ("opcm", (3, 1024, 512), (512, 256), 3 * 8),
        ("opcm", (512, 100), (512, 100), 1),
        ("covariance", (1024, 512), (512, 256), 8),
        ("covariance", (64, 9000), (29, 9000), 64 / 29),  # too wide for its moment: averaged
        ("input_space", (64, 9000), (29, 9000), 64 / 29),  # no whole statistic
        ("magmax", (2**10, 2**10), (2**8, 2**10), 4),  # elements
        ("magmax", (5, 2**10, 2**8), (1, 2**10, 2**8), 5),
        ("magmax", (4, 2**10), (4, 2**10), 1),
    ],
)
def test_what_is_cut_is_counted(rule: str, shape: tuple[int, ...], tried: tuple[int, ...], times: float) -> None:
    trial = trial_of(get_rule(rule), Weight("layers.0.weight", True, 1, shape, depth=0.5), CPU)
    assert (trial.fold().shape, trial.times) == (tried, pytest.approx(times))


def test_a_vocabulary_is_not_decomposed() -> None:
    weight = Weight("embed", False, 2, (2**14, 64))
    trial = trial_of(get_rule("opcm"), weight, CPU)
    assert trial.fold().shape == (2**12, 64)
    assert trial.times == math.prod(weight.shape) / math.prod(trial.fold().shape)
    assert trial_of(get_rule("opcm"), replace(weight, is_matrix=True), CPU).times > trial.times
