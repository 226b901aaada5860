"""Rewards without code: what each gives, and that all of them obey the contract."""

from typing import Any

import pytest

from hf_contmerge.errors import DataError, RecipeError
from hf_contmerge.training.rewards import Answers, Reward, checked_scores, get_reward, reward_names

CASES: list[tuple[str, dict[str, Any], str, str, float | None]] = [
    ("exact_match", {}, " Paris\n", "Paris", 1.0),
    ("exact_match", {}, "paris", "Paris", 0.0),
    ("exact_match", {"ignore_case": True}, "paris", "PARIS", 1.0),
    ("exact_match", {}, "It is Paris", "Paris", 0.0),
    ("last_number", {}, "First 3, then 1,234.50.", "#### 1234.5", 1.0),
    ("last_number", {}, "so it is -7", "-7", 1.0),
    ("last_number", {}, "7 and then 8", "7", 0.0),
    ("last_number", {}, "no number", "7", 0.0),
    ("last_number", {}, "7", "none", None),
    ("think_format", {}, "<think>\nwell\n</think>\nfour", "", 1.0),
    ("think_format", {}, "four", "", 0.0),
    ("overlong", {"most": 8, "margin": 4}, "abcd", "", 0.0),
    ("overlong", {"most": 8, "margin": 4}, "abcdef", "", -0.5),
    ("overlong", {"most": 8, "margin": 4}, "abcdefghi", "", -1.0),
    ("repetition", {"n": 1}, "abcd", "", 0.0),
    ("repetition", {"n": 1}, "aaaa", "", -0.75),
    ("repetition", {"n": 2, "penalty": -2.0}, "abab", "", -2 / 3),
    ("accuracy", {}, r"so \boxed{\frac{1}{2}}", r"$\frac12$", 1.0),
    ("accuracy", {}, r"\boxed{0.5}", "0.5", 1.0),
    ("accuracy", {"column": "answer"}, r"\boxed{3}", "$4$", 0.0),
    ("accuracy", {}, "I do not know", "$4$", 0.0),
    ("accuracy", {}, r"\boxed{3}", "none", None),
]


def answers(text: str, right: str) -> Answers:
    columns = {"answer": [right], "solution": [right]}
    return Answers(["say"], [text], [[ord(letter) for letter in text]], columns)


@pytest.mark.parametrize(("name", "parameters", "text", "right", "score"), CASES)
def test_score(name: str, parameters: dict[str, Any], text: str, right: str, score: float | None) -> None:
    reward = get_reward(name, **parameters)
    assert checked_scores(name, reward, answers(text, right)) == [score if score is None else pytest.approx(score)]
    assert {*reward.columns()} <= {"answer", "solution"}


def test_every_reward_of_ours_has_a_case() -> None:
    assert {name for name, *_ in CASES} == {*reward_names()}


def test_no_answers_at_all() -> None:
    empty = Answers([], [], [], {"answer": [], "solution": []})
    for name in reward_names():
        assert checked_scores(name, get_reward(name), empty) == []


@pytest.mark.parametrize("found", [[], [1.0, 2.0], [float("nan")], ["1"], [[1.0]]])
def test_what_is_no_number_each_is_refused(found: Any) -> None:
    class Odd(Reward):
        def score(self, answers: Answers) -> Any:
            return found

    with pytest.raises(DataError, match=r"^The reward odd gives "):
        checked_scores("odd", Odd(), answers("x", "y"))


def test_unknown_rewards_and_parameters() -> None:
    with pytest.raises(RecipeError, match="Unknown reward 'lenght' in rewards"):
        get_reward("lenght")
    with pytest.raises(ValueError, match=r"exact_match's column must be a valid string; got 3"):
        get_reward("exact_match", column=3)
