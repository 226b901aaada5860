"""The metrics against numbers worked out by hand and laws that hold for every matrix; the error of a single score."""

import math
import random
import statistics

import pytest

from hf_contmerge.run.recipe.schema import Stage
from hf_contmerge.run.scores import Sample, TaskScore
from hf_contmerge.scoring.forgetting.lines import Line
from hf_contmerge.scoring.forgetting.matrix import ScoreMatrix, facts, general_delta, ratio

TWO = ScoreMatrix(("a", "b"), ((0.2, 0.3), (0.98, 0.5), (0.5, 0.98)))


def score(utility: float, block: str = "perplexity") -> TaskScore:
    value = math.exp(-utility) if block == "perplexity" else utility
    return TaskScore(block, "m", value, utility, None, (utility,), (1.0,), {})  # pyright: ignore[reportArgumentType]


def test_two_stages_by_hand():
    assert TWO.metrics((0.99, 1.0)) == {
        "acc": pytest.approx(0.74),
        "aia": pytest.approx((0.98 + 0.74) / 2),
        "la": pytest.approx(0.98),
        "bwt": pytest.approx(-0.48),
        "bwt_per_stage": pytest.approx(-0.24),
        "forgetting": pytest.approx(0.48),
        "fwt": pytest.approx(0.5 - 0.3),
        "intransigence": None,
        "against_alone": pytest.approx((0.01 + 0.02) / 2),
        "normalised": pytest.approx((0.3 + 0.68) / (0.79 + 0.7)),
        "joint_kept": None,
    }
    assert TWO.average(1) == pytest.approx(0.98)


def test_three_stages_by_hand():
    m = ScoreMatrix(("a", "b", "c"), ((0, 1, 2), (6, 2, 2), (7, 8, 5), (4, 7, 9)))
    assert m.average() == pytest.approx((4 + 7 + 9) / 3)
    assert m.learning_score() == pytest.approx((6 + 8 + 9) / 3)
    assert m.backward_transfer() == pytest.approx(((4 - 6) + (7 - 8)) / 2)
    assert m.forgetting() == pytest.approx(((7 - 4) + (8 - 7)) / 2), "the best was reached after stage 2, not 1"
    assert m.forward_transfer() == pytest.approx(((2 - 1) + (5 - 2)) / 2)
    assert m.average_incremental() == pytest.approx((6 + (7 + 8) / 2 + (4 + 7 + 9) / 3) / 3)
    assert m.backward_transfer_per_stage() == pytest.approx(((4 - 6) + (7 - 8)) / 3), "TRACE's denominator"
    assert m.against_alone((8, 8, 10)) == pytest.approx((2 + 0 + 1) / 3)
    assert m.normalised((8, 9, 12)) == pytest.approx((4 + 6 + 7) / (8 + 8 + 10))
    assert m.normalised((8, 9, 12), floor=(2, 3, 4)) == pytest.approx((2 + 4 + 5) / (6 + 6 + 8))


def test_forgetting_does_not_count_the_base_as_the_best():
    assert ScoreMatrix(("a", "b"), ((9, 0), (5, 0), (4, 1))).forgetting() == pytest.approx(1)


def test_one_stage_has_nothing_to_forget():
    m = ScoreMatrix(("a",), ((0.2,), (0.9,))).metrics()
    assert (m["acc"], m["la"]) == (0.9, 0.9)
    assert (m["bwt"], m["bwt_per_stage"], m["forgetting"], m["fwt"]) == (None, None, None, None)


def test_what_was_not_measured_is_none_and_never_zero():
    lower = ScoreMatrix(("a", "b"), ((0.2, 0.3), (0.98, None), (0.5, 0.98)))
    assert lower.forward_transfer() is None, "needs the stages to come"
    assert lower.backward_transfer() == pytest.approx(-0.48)
    alone = ScoreMatrix(("a", "b"), ((0.2, 0.3), (0.98, None), (None, 0.9)))
    assert {name for name, value in alone.metrics().items() if value is not None} == {"la"}
    assert alone.learning_score() == pytest.approx(0.94)
    assert lower.against_alone((0.99, None)) is None, "one of the experts was not measured"
    assert lower.normalised((0.99, None)) is None
    assert lower.normalised((0.2, 0.3)) is None, "experts that gained nothing are no measure"


def test_only_the_base_measured():
    assert set(ScoreMatrix(("a", "b"), ((0.2, 0.3),)).metrics().values()) == {None}


def test_a_stage_without_a_task_of_this_kind_is_left_out():
    m = ScoreMatrix(("a", "x", "b"), ((0.2, None, 0.3), (0.98, None, 0.4), (0.8, None, 0.5), (0.5, None, 0.98)))
    assert m.average() == pytest.approx(0.74)
    assert m.learning_score() == pytest.approx(0.98)
    assert m.backward_transfer() == pytest.approx(-0.48)
    assert m.forward_transfer() == pytest.approx(0.5 - 0.3)
    assert m.average_incremental() == pytest.approx((0.98 + 0.8 + 0.74) / 3), "after the middle stage a counts alone"
    assert m.backward_transfer_per_stage() == pytest.approx(-0.24)
    assert m.against_alone((0.99, None, 1.0)) == pytest.approx(0.015)


def test_laws_of_the_metrics():
    """For every full matrix: what follows from the definitions alone."""
    rng = random.Random(0)
    for _ in range(200):
        t = rng.randint(2, 6)
        rows = tuple(tuple(rng.uniform(-4, 1) for _ in range(t)) for _ in range(t + 1))
        m = ScoreMatrix(tuple("abcdef"[:t]), rows)
        found = {name: value for name, value in m.metrics([9.0] * t).items() if value is not None}
        assert len(found) == 9
        assert found["forgetting"] >= -found["bwt"] - 1e-12, "the best is at least what was learnt"
        assert found["bwt_per_stage"] == pytest.approx((t - 1) / t * found["bwt"])
        assert found["acc"] == pytest.approx(found["la"] + found["bwt_per_stage"])
        assert found["against_alone"] == pytest.approx(9 - found["la"])
        assert found["normalised"] < 1


def test_where_nothing_improves_bwt_is_forgetting():
    rng = random.Random(1)
    for _ in range(100):
        t, row = rng.randint(2, 6), [rng.random() for _ in range(6)]
        rows = [tuple(row[:t])]
        for _ in range(t):
            row = [x - rng.random() for x in row]
            rows.append(tuple(row[:t]))
        m = ScoreMatrix(tuple("abcdef"[:t]), tuple(rows))
        found = m.backward_transfer()
        assert found is not None
        assert found <= 0
        worst = [max(rows[i][j] for i in range(1, t)) - rows[t][j] for j in range(t - 1)]
        assert m.forgetting() == pytest.approx(statistics.mean(worst))


def test_a_shift_of_all_utilities_changes_no_difference():
    moved = ScoreMatrix(TWO.stages, tuple(tuple(x - 3 for x in row if x is not None) for row in TWO.rows))
    before, after = TWO.metrics((0.99, 1.0)), moved.metrics((-2.01, -2.0))
    for name in ("bwt", "bwt_per_stage", "forgetting", "fwt", "against_alone", "normalised"):
        assert before[name] == pytest.approx(after[name])


@pytest.mark.parametrize("rows", [(), ((1.0,),), ((1.0, 2.0), (1.0,))])
def test_ragged_rows_are_refused(rows):
    with pytest.raises(ValueError, match="one value per stage"):
        ScoreMatrix(("a", "b"), rows)


def test_general_delta():
    assert general_delta([0.5, 0.7], [0.4, 0.9]) == pytest.approx(0.05)
    assert general_delta([0.5, None], [0.4, 0.9]) is None
    assert general_delta([], []) is None


def answers(marks: str) -> TaskScore:
    gains = tuple(map(float, marks))
    return TaskScore("accuracy", "acc", 0.0, sum(gains) / len(gains), None, gains, (1.0,) * len(gains), {})


def test_facts_forgotten_for_each_acquired():
    pairs = [("11110", "11000"), ("1100", "0011"), ("00", "11")]  # 2 lost; 2 lost and 2 others won; 2 won
    lost = [(answers(a).sample, answers(b).sample) for a, b in pairs]
    learnt = [(answers("00000").sample, answers("11110").sample)]
    assert ratio(facts(lost, learnt)) == pytest.approx(2 / 4)
    assert ratio(facts(learnt, lost)) == 0, "nothing was lost of it, and 2 of the others won"
    assert ratio(facts(lost, lost[:1])) is None, "nothing was acquired"
    assert ratio(facts([(Sample((0.5,), (1.0,)),) * 2], learnt)) is None, "half a mark is neither right nor wrong"


def test_fuar_of_a_line_by_hand():
    """Stage a wins 3 answers and loses 1 of them later, b wins 2, general knowledge loses 1: 2 lost for 5 won."""
    stages = [Stage.model_validate({"name": n, "dataset": "a.jsonl", "tasks": [f"quiz_{n}"]}) for n in "ab"]
    base = {"quiz_a": answers("0000"), "quiz_b": answers("0001"), "trivia": answers("1110")}
    first = {"quiz_a": answers("1110"), "trivia": answers("1111")}
    second = {"quiz_a": answers("1001"), "quiz_b": answers("0111"), "trivia": answers("1100")}
    line = Line("magmax", (base, first, second), ({"quiz_a": answers("1111")}, {"quiz_b": answers("1111")}))
    found = line.metrics(stages, ["trivia"], "accuracy")
    assert found["fuar"] == pytest.approx(2 / 5)
    assert found["against_alone"] == pytest.approx((0.25 + 0.25) / 2)
    assert found["normalised"] == pytest.approx((0.5 + 0.5) / (1 + 0.75))
    assert line.metrics(stages, ["trivia"], "perplexity")["fuar"] is None
    assert Line("x", (base, first)).metrics(stages, [], "accuracy")["fuar"] is None, "there is nothing to forget"
    gap = Line("x", (base, first, {"quiz_b": answers("0111")}))
    assert gap.metrics(stages, ["trivia"], "accuracy")["fuar"] is None, "quiz_a was not measured again"


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


def test_against_the_joint_model():
    """Chaudhry's intransigence is about the last stage; the share kept is about all."""
    found = TWO.metrics(joint=(0.8, 0.9))
    assert found["intransigence"] == pytest.approx(0.9 - 0.98)
    assert found["joint_kept"] == pytest.approx((0.3 + 0.68) / (0.6 + 0.6))
    assert TWO.metrics(joint=(None, 0.9))["joint_kept"] is None
    assert TWO.metrics(joint=TWO.rows[0])["joint_kept"] is None, "a joint model that gained nothing is no measure"
