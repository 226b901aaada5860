"""Documents that changed sides, beyond guessing; differences that are too small to matter."""

import random
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from toys.reports import make_score

from hf_contmerge.report._findings import fate, outcome
from hf_contmerge.report._results import Results
from hf_contmerge.report._tables import MISSING, change_cell, sides_tables
from hf_contmerge.run.recipe.parts import Guard
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import Sample, TaskScore
from hf_contmerge.scoring.forgetting.budget import judge
from hf_contmerge.scoring.forgetting.lines import Line
from hf_contmerge.scoring.forgetting.paired import Change, flips, mean_change

To = Literal["wrong", "right"]
RECIPE = {
    "name": "x", "base_model": "b", "merge": ["magmax"], "stages": [{"name": n, "dataset": "a.jsonl"} for n in "ab"],
}  # fmt: skip


def scored(gains: Any, *, choices: int = 0, metric: str = "acc") -> TaskScore:
    """Return a score; `choices`: of each question, 0 for written answers."""
    c = 1 / choices if choices else 0.0
    sample = Sample(tuple(float(g) for g in gains), (1.0,) * len(gains))
    details = {"chance": c, "chance_variance": c * (1 - c)}
    return TaskScore("accuracy", metric, 0.0, sample.utility, None, sample.gains, sample.weights, details)


def flip(new: TaskScore, old: TaskScore, to: To, confidence: float = 0.95) -> Change:
    change = flips([({"t": new}, {"t": old}, ["t"])], to, confidence)
    assert change
    assert change.low is not None
    return change


def test_shares_of_written_answers_are_counted() -> None:
    old, new = scored("1111100000"), scored("1110000001")
    lost, gained = (flip(new, old, to) for to in ("wrong", "right"))
    assert (lost.mean, gained.mean) == (pytest.approx(-0.2), pytest.approx(0.1))
    assert (lost.low, lost.high) == (pytest.approx(-0.5098, abs=1e-4), pytest.approx(-0.0567, abs=1e-4))  # Wilson
    assert lost.sign == -1
    same = scored("1111100000")
    assert (flip(same, old, "wrong").high, flip(same, old, "right").low) == (0.0, 0.0)
    assert flip(same, old, "wrong").low == pytest.approx(-0.2775, abs=1e-4)  # the rule of three's


def test_guesses_are_taken_off_as_the_formula_has_it() -> None:
    """Half of 400 questions with four choices known, and the others guessed anew: nothing was forgotten."""
    old = scored([1] * 200 + [1, 1, 0, 0, 0, 0, 0, 0] * 25, choices=4)
    new = scored([1] * 200 + [0, 0, 1, 1, 0, 0, 0, 0] * 25, choices=4)
    lost = flip(new, old, "wrong")
    known = (250 / 400 - 1 / 4) / (3 / 4)
    assert lost.mean == pytest.approx(-(50 / 400 - (1 - known) ** 2 * 3 / 16))
    assert lost.mean + flip(new, old, "right").mean == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1" * 20, "1" * 19 + "0"),  # no guess is left to take off
        ("1" * 20, "1" * 20),
        ("0" * 20, "0" * 20),  # fewer flips than guessing has
        ("0" * 20, "0" * 19 + "1"),
        ("1" * 10 + "0" * 10, "1" * 10 + "0" * 10),
        ("1" * 10 + "0" * 10, "1" * 9 + "0" * 10 + "1"),
    ],
)
def test_the_interval_of_one_direction_keeps_its_sign(before: str, after: str) -> None:
    for choices in (0, 2, 4):
        new, old = scored(after, choices=choices), scored(before, choices=choices)
        twice = [({"t": new}, {"t": old}, ["t"]), ({"t": old}, {"t": old}, ["t"])]
        for groups in (twice[:1], twice):
            lost, gained = (flips(groups, to) for to in ("wrong", "right"))
            assert lost
            assert gained
            assert lost.low is not None
            assert gained.high is not None
            assert lost.high is not None
            assert gained.low is not None
            assert -1 <= lost.low <= lost.high <= 0 <= gained.low <= gained.high <= 1
            assert lost.sign <= 0 <= gained.sign
            assert lost.high - lost.low > 0.04, "20 documents"
            assert gained.high - gained.low > 0.04
    one = flip(scored("1" * 19 + "0", choices=4), scored("1" * 20, choices=4), "wrong")
    assert (one.low, one.high) == pytest.approx((-0.2361, -0.0089), abs=1e-4)  # Wilson
    none = flip(scored("0" * 20, choices=4), scored("0" * 20, choices=4), "wrong")
    assert (none.mean, none.low, none.high) == pytest.approx((0.1875, -0.1611, 0.0), abs=1e-4)


def test_both_add_up_to_the_change_of_the_accuracy() -> None:
    draw = random.Random(1)
    old, new = ([draw.randrange(2) for _ in range(300)] for _ in range(2))
    for choices in (0, 2, 4):
        pair = {"t": scored(new, choices=choices)}, {"t": scored(old, choices=choices)}, ["t"]
        change = mean_change([pair], "accuracy")
        assert change
        assert sum(flip(pair[0]["t"], pair[1]["t"], to).mean for to in ("wrong", "right")) == pytest.approx(change.mean)


def simulated(rng: np.random.Generator, *, choices: int, n: int, kept: float) -> tuple[TaskScore, TaskScore]:
    """Half is known at first, `kept` of it still; a tenth of the rest is learnt. Others are guessed, each time anew."""
    known = rng.random(n) < 0.5
    later = np.where(known, rng.random(n) < kept, rng.random(n) < 0.1)
    right = [k | (rng.random(n) < (1 / choices if choices else 0)) for k in (known, later)]
    return scored(right[1], choices=choices), scored(right[0], choices=choices)


@pytest.mark.parametrize("choices", [0, 2, 4])
def test_intervals_hold_the_truth(choices: int) -> None:
    """Known, then forgotten and not guessed; by the formula's assumption that guesses are independent of knowledge."""
    c = 1 / choices if choices else 0.0
    rng, inside = np.random.default_rng(0), 0
    q = (0.5, 0.5 * 0.8 + 0.5 * 0.1)
    both = 0.5 * 0.2 * (1 - c) + 0.5 * 0.9 * c * (1 - c)  # wrong now: forgotten, or guessed right before
    truth = -(both - (1 - q[0]) * (1 - q[1]) * c * (1 - c))
    for _ in range(400):
        lost = flip(*simulated(rng, choices=choices, n=200, kept=0.8), "wrong")
        assert lost.low is not None
        assert lost.high is not None
        inside += lost.low <= truth <= lost.high
    assert 0.92 <= inside / 400 <= 0.98


def test_what_is_not_simply_right_or_wrong_is_not_counted() -> None:
    old = scored("1100")
    half = TaskScore("accuracy", "f1", 0, 0.5, None, (0.5,) * 4, (1.0,) * 4, old.details)
    silent = TaskScore("accuracy", "acc", 0, 0.5, None, old.gains, old.weights, {})  # scored by an earlier version
    text = make_score(-3.0)
    for new in (half, silent, text):
        assert flips([({"t": new}, {"t": old if new is not text else new}, ["t"])], "wrong") is None
    assert flips([({}, {"t": old}, ["t"])], "wrong") is None


def test_metrics_of_a_line() -> None:
    recipe = parse_recipe(RECIPE)
    a, quiz = "a_heldout", "quiz"
    rows = (
        {quiz: scored("1111100000")},
        {a: scored("1111100000"), quiz: scored("1111000000")},
        {a: scored("1110000001"), quiz: scored("1110000011"), "b_heldout": scored("1000000000")},
    )
    found = Line("x", rows).metrics(recipe.stages, [quiz], "accuracy")
    sides = {word: found[word] for word in ("lost", "regained", "general_lost", "general_gained")}
    assert sides == pytest.approx({"lost": -0.2, "regained": 0.1, "general_lost": -0.2, "general_gained": 0.2})
    assert found["bwt"] == pytest.approx(-0.1)
    assert Line("x", rows).metrics(recipe.stages, [quiz], "perplexity")["lost"] is None
    assert Line("x", rows[:1]).metrics(recipe.stages, [quiz], "accuracy")["general_lost"] is None


def test_the_reports_table_of_both_sides() -> None:
    recipe = parse_recipe(RECIPE)
    rows = (
        {"quiz": scored("1111100000" * 30)},
        {"a_heldout": scored("1111100000" * 30), "quiz": scored("1111100000" * 30)},
        {"a_heldout": scored("1110000001" * 30), "quiz": scored("1111100001" * 30)},
    )
    results = Results(recipe.stages, ("quiz",), (), (Line("magmax", rows),), matters={"accuracy": 0.01})
    [table] = sides_tables(results)
    assert table.header == ("after", "a", "b")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["a_heldout", MISSING, "−20.0 / +10.0"], ["quiz", "0.0 / 0.0", "0.0 / +10.0"],
    ]  # fmt: skip
    assert [cell.way for cell in table.rows[1][1:]] == ["", "up"]


def test_a_guard_that_holds_lost_documents() -> None:
    """A tenth of the documents went wrong and a tenth right: the mean is as it was."""
    recipe = parse_recipe({**RECIPE, "evaluate": {"general_tasks": ["quiz"]}})
    base = {"quiz": scored([1] * 100 + [0] * 100)}
    now = {"quiz": scored([1] * 80 + [0] * 20 + [1] * 20 + [0] * 80)}
    judged = {
        measure: judge(now, base, {}, recipe, Guard(max_forgetting=0.05, on=("general",), measure=measure), ["a"])
        for measure in ("mean", "lost")
    }
    assert {measure: found.held for measure, found in judged.items()} == {"mean": True, "lost": False}
    assert judged["lost"].drop == pytest.approx(0.1)
    words = judged["lost"].in_words(Guard(measure="lost"))
    assert words.startswith("the general tasks lost 0.1 of accuracy, at least 0.0")


def test_a_guard_calls_answers_that_stayed_no_gain() -> None:
    """The chance of a guess takes off more documents than went wrong."""
    recipe = parse_recipe({**RECIPE, "evaluate": {"general_tasks": ["quiz"]}})
    same = {"quiz": scored([1] * 65 + [0] * 35, choices=2)}
    guard = Guard(max_forgetting=0.05, on=("general",), measure="lost")
    judged = judge(same, same, {}, recipe, guard, ["a"])
    assert judged.held
    assert judged.in_words(guard).startswith(
        "the general tasks lost no more right answers than guessing explains; a loss of 0.02634 of accuracy"
    )


def test_a_task_that_cannot_be_counted_keeps_its_mean_alone() -> None:
    """The other tasks of its group are counted as before, and it is said."""
    recipe = parse_recipe({**RECIPE, "evaluate": {"general_tasks": ["quiz", "essay"]}})
    half = scored([0.5] * 200)
    silent = replace(scored([1] * 100), details={})  # scored by an earlier version
    base = {"quiz": scored([1] * 100 + [0] * 100), "essay": half}
    now = {"quiz": scored([1] * 80 + [0] * 20 + [1] * 20 + [0] * 80), "essay": half}
    guard = Guard(max_forgetting=0.05, on=("general",), measure="lost")
    for other in (half, silent):
        judged = judge({**now, "essay": other}, {**base, "essay": other}, {}, recipe, guard, ["a"])
        assert not judged.held
        assert [(s.lost, s.tasks, s.change.mean) for s in judged.losses] == [
            (True, ("quiz",), pytest.approx(-0.1)), (False, ("essay",), 0.0),
        ]  # fmt: skip
        assert [s["lost"] for s in judged.to_json()["losses"]] == [True, False]
        assert "by the mean, because" in judged.in_words(guard)
        assert judged.in_words(guard).endswith(": essay")
    alone = judge({"quiz": now["quiz"]}, {"quiz": base["quiz"]}, {}, recipe, guard, ["a"])
    assert "by the mean" not in alone.in_words(guard)


# Differences that matter


def change(mean: float, reach: float, matters: float = 0.02) -> Change:
    return Change(mean, reach / 2, mean - reach, mean + reach, matters=matters)


@pytest.mark.parametrize(
    ("found", "sign", "seen"),
    [
        (change(-0.004, 0.001), 0, "the same"),  # certain, and too small
        (change(0.019, 0.018), 0, "the same"),
        (change(0.001, 0.005), 0, "the same"),  # certainly small
        (change(0.001, 0.05), 0, "no change seen"),
        (change(0.03, 0.05), 0, "no change seen"),
        (change(0.02, 0.001), 1, "better"),
        (change(-0.021, 0.018), -1, "worse"),
        (change(-0.004, 0.001, matters=0.0), -1, "worse"),
        (Change(0.001, None, matters=0.02), 0, "no change seen"),
    ],
)
def test_what_is_said_of_a_difference(found: Change, sign: int, seen: str) -> None:
    assert (found.sign, found.seen) == (sign, seen)
    assert found.same == (seen == "the same")


def test_what_is_the_same_is_not_forgotten() -> None:
    small, large = change(-0.004, 0.001), change(-0.05, 0.001)
    assert outcome(small, "perplexity", "it") == "is the same on it (perplexity × 1.00)"
    assert outcome(large, "perplexity", "it") == "forgot it (perplexity × 1.05)"
    assert fate(small, "perplexity") == "is the same (0.00 nats)"
    cells = [change_cell(c, "perplexity") for c in (small, large)]
    assert [cell.way for cell in cells] == ["", "down"]
    assert cells[0].hint.startswith("the same; detectable")


def test_another_confidence_has_the_same_size_that_matters() -> None:
    pair = {"t": scored("1111100000" * 40)}, {"t": scored("1111110000" * 40)}, ["t"]
    found = mean_change([pair], "accuracy")
    assert found
    assert found.sign == -1
    assert Change(-0.1, 0.01, -0.12, -0.08, parts=found.parts, matters=0.2).at(0.9).seen == "the same"
