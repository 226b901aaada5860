"""The metrics against numbers worked out by hand, and the standard errors against brute force and simulation."""

import math
import random
import statistics

import pytest

from hf_contmerge.forgetting import Line, ScoreMatrix, general_delta
from hf_contmerge.recipe import Stage
from hf_contmerge.task_scores import Sample, TaskScore
from hf_contmerge.uncertainty import paired_difference

TWO = ScoreMatrix(("a", "b"), ((0.2, 0.3), (0.98, 0.5), (0.5, 0.98)))


def score(utility: float, block: str = "perplexity") -> TaskScore:
    value = math.exp(-utility) if block == "perplexity" else utility
    return TaskScore(block, "m", value, utility, None, (utility,), (1.0,), {})  # pyright: ignore[reportArgumentType]


def test_two_stages_by_hand():
    assert TWO.metrics() == {
        "acc": pytest.approx(0.74),
        "la": pytest.approx(0.98),
        "bwt": pytest.approx(-0.48),
        "forgetting": pytest.approx(0.48),
        "fwt": pytest.approx(0.5 - 0.3),
    }
    assert TWO.average(1) == pytest.approx(0.98)


def test_three_stages_by_hand():
    m = ScoreMatrix(("a", "b", "c"), ((0, 1, 2), (6, 2, 2), (7, 8, 5), (4, 7, 9)))
    assert m.average() == pytest.approx((4 + 7 + 9) / 3)
    assert m.learning_score() == pytest.approx((6 + 8 + 9) / 3)
    assert m.backward_transfer() == pytest.approx(((4 - 6) + (7 - 8)) / 2)
    assert m.forgetting() == pytest.approx(((7 - 4) + (8 - 7)) / 2), "the best was reached after stage 2, not 1"
    assert m.forward_transfer() == pytest.approx(((2 - 1) + (5 - 2)) / 2)


def test_forgetting_does_not_count_the_base_as_the_best():
    assert ScoreMatrix(("a", "b"), ((9, 0), (5, 0), (4, 1))).forgetting() == pytest.approx(1)


def test_one_stage_has_nothing_to_forget():
    m = ScoreMatrix(("a",), ((0.2,), (0.9,))).metrics()
    assert (m["acc"], m["la"]) == (0.9, 0.9)
    assert (m["bwt"], m["forgetting"], m["fwt"]) == (None, None, None)


def test_what_was_not_measured_is_none_and_never_zero():
    lower = ScoreMatrix(("a", "b"), ((0.2, 0.3), (0.98, None), (0.5, 0.98)))
    assert lower.forward_transfer() is None, "needs the stages to come"
    assert lower.backward_transfer() == pytest.approx(-0.48)
    alone = ScoreMatrix(("a", "b"), ((0.2, 0.3), (0.98, None), (None, 0.9)))
    assert alone.metrics() == {"acc": None, "la": pytest.approx(0.94), "bwt": None, "forgetting": None, "fwt": None}


def test_only_the_base_measured():
    assert set(ScoreMatrix(("a", "b"), ((0.2, 0.3),)).metrics().values()) == {None}


def test_a_stage_without_a_task_of_this_kind_is_left_out():
    m = ScoreMatrix(("a", "x", "b"), ((0.2, None, 0.3), (0.98, None, 0.4), (0.8, None, 0.5), (0.5, None, 0.98)))
    assert m.average() == pytest.approx(0.74)
    assert m.learning_score() == pytest.approx(0.98)
    assert m.backward_transfer() == pytest.approx(-0.48)
    assert m.forward_transfer() == pytest.approx(0.5 - 0.3)


@pytest.mark.parametrize("rows", [(), ((1.0,),), ((1.0, 2.0), (1.0,))])
def test_ragged_rows_are_refused(rows):
    with pytest.raises(ValueError, match="one value per stage"):
        ScoreMatrix(("a", "b"), rows)


def test_general_delta():
    assert general_delta([0.5, 0.7], [0.4, 0.9]) == pytest.approx(0.05)
    assert general_delta([0.5, None], [0.4, 0.9]) is None
    assert general_delta([], []) is None


def test_a_line_keeps_accuracy_and_perplexity_apart():
    stages = [Stage.model_validate({"name": "a", "dataset": "a.jsonl", "tasks": ["quiz", "exam"]})]
    base = {"a_heldout": score(-3), "quiz": score(0.2, "accuracy"), "exam": score(0.4, "accuracy"), "g": score(-1)}
    after = {"a_heldout": score(-2), "quiz": score(0.6, "accuracy"), "exam": score(0.8, "accuracy"), "g": score(-1.5)}
    line = Line("magmax", (base, after))
    assert line.matrix(stages, "perplexity").rows == ((-3,), (-2,))
    assert line.matrix(stages, "accuracy").rows == ((pytest.approx(0.3),), (pytest.approx(0.7),))
    assert line.metrics(stages, ["g"], "perplexity")["general_delta"] == pytest.approx(-0.5)
    assert line.metrics(stages, ["g"], "accuracy")["general_delta"] is None
    assert line.general(["g"], "accuracy") is None


def test_a_score_survives_its_record():
    before = score(-2.5)
    assert TaskScore.from_json(before.to_json()) == before


def test_utility_and_stderr_of_a_sample():
    hits = [1.0, 0, 1, 1, 0, 1, 0, 1, 1, 1]
    sample = Sample(tuple(hits), (1.0,) * 10)
    assert sample.utility == pytest.approx(0.7)
    assert sample.stderr() == pytest.approx(statistics.stdev(hits) / math.sqrt(10)), "equal weights: the textbook's"
    assert Sample((1.0,), (1.0,)).stderr() is None


def test_stderr_with_unequal_weights_is_that_of_simulated_samples():
    rng = random.Random(1)

    def draw() -> Sample:
        words = [float(rng.randint(20, 200)) for _ in range(60)]
        return Sample(tuple(w * rng.gauss(-3, 0.4) for w in words), tuple(words))

    samples = [draw() for _ in range(400)]
    errors = [e for s in samples if (e := s.stderr()) is not None]
    spread = statistics.stdev(s.utility for s in samples)
    assert statistics.mean(errors) == pytest.approx(spread, rel=0.12)


def test_paired_difference_by_brute_force():
    words = (3.0, 5.0, 10.0)
    new, old = Sample((-6.0, -11.0, -28.0), words), Sample((-7.0, -11.5, -27.0), words)
    mean = ((-6 - 11 - 28) - (-7 - 11.5 - 27)) / 18
    residuals = [(-6 + 7) - mean * 3, (-11 + 11.5) - mean * 5, (-28 + 27) - mean * 10]
    by_hand = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 18
    assert paired_difference(new, old) == (pytest.approx(mean), pytest.approx(by_hand))
    assert paired_difference(old, old) == (0.0, 0.0)
    assert paired_difference(Sample((1.0,), (1.0,)), Sample((0.0,), (1.0,))) == (1.0, None)


def test_pairing_finds_a_change_that_two_errors_would_hide():
    rng = random.Random(2)
    words = tuple(float(rng.randint(50, 150)) for _ in range(40))
    hardness = [rng.gauss(-3, 0.5) for _ in words]

    def measure(shift: float) -> Sample:
        gains = [w * (h + shift + rng.gauss(0, 0.02)) for w, h in zip(words, hardness, strict=True)]
        return Sample(tuple(gains), words)

    old, new = measure(0.0), measure(0.05)
    difference, paired = paired_difference(new, old)
    apart = math.hypot(new.stderr() or 0, old.stderr() or 0)
    assert paired is not None
    assert paired < apart / 10
    assert difference > 2 * paired
    assert difference < 2 * apart
    assert difference == pytest.approx(0.05, abs=4 * paired)


def test_other_documents_are_refused():
    with pytest.raises(ValueError, match="not measured on the same documents"):
        paired_difference(Sample((1.0, 2.0), (1.0, 1.0)), Sample((1.0, 2.0), (1.0, 2.0)))
