"""Routers on made-up features, and scores made of their picks."""

import pytest
import torch

from hf_contmerge.errors import RunError
from hf_contmerge.run.scores import Sample, TaskScore
from hf_contmerge.scoring.routing import BASE, Router, confusion, routed_score


def score(*gains: float, key: str = "a", documents: tuple[str, ...] = ()) -> TaskScore:
    sample = Sample(gains, (1.0,) * len(gains))
    return TaskScore(
        "accuracy", "acc", sample.utility, sample.utility, sample.stderr(), gains, sample.weights,
        {"key": key, "metrics": {"acc": sample.utility}, "chance": 0.25}, documents,
    )  # fmt: skip


def clouds(*means: float, size: int = 8) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(100, size, dtype=torch.float64, generator=made) + mean for mean in means]


def test_the_nearest_mean_is_picked():
    first, second = clouds(0, 4)
    router = Router.fit([first[:50], second[:50]])
    assert router.pick(first[50:]) == [0] * 50
    assert router.pick(second[50:]) == [1] * 50


def test_scales_of_features_do_not_matter():
    first, second = clouds(0, 1)
    scale = 10.0 ** torch.arange(-4, 4)
    plain = Router.fit([first[:50], second[:50]])
    scaled = Router.fit([first[:50] * scale, second[:50] * scale])
    assert plain.pick(first[50:]) == scaled.pick(first[50:] * scale)


def test_a_constant_feature_is_no_obstacle():
    first, second = (torch.cat([x, torch.ones(100, 1)], 1) for x in clouds(0, 4))
    assert Router.fit([first, second]).pick(second) == [1] * 100


def test_far_prompts_go_to_the_base_if_it_is_a_choice():
    first, second = clouds(0, 4)
    router = Router.fit([first, second])
    far = first[:3] + 100
    assert router.pick(far, or_base=True) == [BASE] * 3
    assert BASE not in router.pick(far)
    assert sum(pick == BASE for pick in router.pick(first, or_base=True)) <= 2, "1 % of training prompts"


def test_one_stage_answers_everything():
    (only,) = clouds(0)
    assert Router.fit([only]).pick(only + 50) == [0] * 100


def test_a_routed_score_has_each_pick_s_answers():
    choices = {BASE: score(0, 0, 0, 1), 0: score(1, 0, 0, 0), 1: score(0, 1, 0, 0)}
    routed = routed_score(choices, [0, 1, 0, BASE])
    assert routed.gains == (1, 1, 0, 1)
    assert routed.utility == routed.value == 0.75
    assert routed.details == {"chance": 0.25}, "a key would have the cache take it for a model's score"
    for stage, expert in choices.items():
        assert routed_score(choices, [stage] * 4).gains == expert.gains


def test_other_documents_are_refused():
    with pytest.raises(RunError, match="other documents"):
        routed_score({0: score(1, 0, documents=("a", "b")), 1: score(1, 0, documents=("a", "c"))}, [0, 1])


def test_confusion_counts_documents():
    assert confusion(["a", "b"], {"a": [0, 0, 1], "general": [BASE, 1]}) == {
        "a": {"base": 0, "a": 2, "b": 1},
        "general": {"base": 1, "a": 0, "b": 1},
    }
