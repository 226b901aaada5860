"""`lambda: auto` finds what was planted; line searches with few tries; where `auto` is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
from toys.guarded import make_home, moved, recipe
from toys.models import perturbed
from toys.reports import make_score

from hf_contmerge.errors import RecipeError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.merging.rules import make_rule
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import load_scores
from hf_contmerge.scoring.forgetting.search import (
    Kept,
    allowed,
    best_point,
    best_weights,
    front,
    gain_kept,
    largest_that_holds,
    objective,
    spread,
)

Data = dict[str, Any]
AUTO = [{"rule": "task_arithmetic", "parameters": {"lambda": "auto"}}]
PLANTED = 0.625


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that was moved away from what knows the text, and an expert that overshoots the way back."""
    home = make_home(tmp_path_factory.mktemp("tuned"))
    (home / "base").rename(home / "knows")
    perturbed(home / "knows", home / "base", seed=5, size=0.06)
    moved(home / "base", home / "overshoots", home / "knows", by=1 / PLANTED)
    return home


@pytest.mark.slow
def test_auto_finds_a_planted_optimum(home: Path, tmp_path: Path) -> None:
    run = run_recipe(parse_recipe(recipe(home, "overshoots", merge=AUTO)), tmp_path / "run", until="score")
    place = run.merged(1, run.recipe.merge[0])
    record = place.record("merge")
    found = record["parameters"]["lambda"]
    assert abs(found - PLANTED) <= 1 / 16  # the distance of the last tries
    assert record["scale"] == found
    assert f"lambda: {found}" in place.mergekit_recipe.read_text()
    tries = record["tries"]
    assert len(tries) <= 8
    assert {t["what"] for t in tries} == {"auto"}
    best = max(tries, key=lambda t: t["objective"])
    assert best["taken"]
    assert best["parameters"]["lambda"] == found
    assert best["objective"] > 1  # more than the expert itself, which overshoots
    assert "guard" not in record
    result, chosen = load_scores(place)["own"], load_scores(place.validation)["own"]
    assert not set(result.documents) & set(chosen.documents)
    assert len(result.documents) + len(chosen.documents) == 24


# Searches


def kept(holds: bool) -> Kept:
    return Kept({"general": -1.0 * (not holds)}, frozenset() if holds else frozenset({"general"}))


def searched(best: float, default: float, allowed: float = 9.0) -> tuple[float, list[float]]:
    tried: list[float] = []

    def attempt(value: float) -> tuple[Kept, float]:
        tried.append(value)
        return kept(value <= allowed), -((value - best) ** 2)

    return best_point(lambda point: attempt(*point), [max(1.0, 2 * default)])[0], tried


@pytest.mark.parametrize("default", [0.3, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("share", [0.07, 0.2, 0.4375, 0.625, 0.97])
def test_the_best_of_a_single_peak_is_found_in_eight_tries(default: float, share: float) -> None:
    top = max(1.0, 2 * default)
    found, tried = searched(share * top, default)
    assert abs(found - share * top) <= top / 16 + 1e-9
    assert len(tried) <= 8
    assert len(set(tried)) == len(tried)


def test_what_costs_general_abilities_is_not_taken() -> None:
    found, tried = searched(0.9, 0.5, allowed=0.4)
    assert found == max(v for v in tried if v <= 0.4)
    assert searched(0.9, 0.5, allowed=0.0)[0] == pytest.approx(0.9, abs=1 / 16)  # none is allowed: the best of all


def test_a_loss_that_few_documents_do_not_prove_is_none_that_is_kept() -> None:
    """Not even 20 nats are proven of two documents that differ; a smaller loss, in which they agree, is."""

    def attempt(point: tuple[float, ...]) -> tuple[Kept, float]:
        proven = frozenset({"general perplexity"}) if 0.2 < point[0] < 0.9 else frozenset()
        return Kept({"general perplexity": -20 * point[0], "general accuracy": 0.0}, proven), -point[0]

    assert best_point(attempt, [1.0])[0] <= 0.2
    losses = [Kept({"a": -1.0, "b": 0.1}, frozenset("a")), Kept({"a": -1.5, "b": 0.0}), Kept({"a": -0.5, "b": -9.0})]
    assert allowed(losses) == [False, False, True]
    assert allowed(losses[1:]) == [True, True]


@pytest.mark.parametrize("limit", [0.13, 0.3, 0.5, 0.7, 0.99])
def test_the_largest_factor_that_holds(limit: float) -> None:
    tried: list[float] = []

    def attempt(factor: float) -> tuple[bool, float]:
        tried.append(factor)
        return factor <= limit, factor

    found = largest_that_holds(attempt)
    assert found is not None
    assert found <= limit
    assert limit - found <= max(0.125, limit / 4)
    assert len(tried) <= 5
    assert found in tried


def test_shrinking_ends_where_it_loses_more() -> None:
    """Half of a merge has forgotten its stages already: an eighth of it would know even less."""
    tried: list[float] = []

    def attempt(factor: float) -> tuple[bool, float]:
        tried.append(factor)
        return False, 1 - factor

    assert largest_that_holds(attempt) is None
    assert tried == [0.5, 0.25]


def test_the_objective_is_what_the_merge_has_of_each_experts_gain() -> None:
    def scores(**utilities: float) -> Data:
        return {n: make_score(u, "accuracy" if n == "quiz" else "perplexity", seed=n) for n, u in utilities.items()}

    base, now = scores(a=-4.0, quiz=0.25), scores(a=-3.5, quiz=0.5)
    alone = {"one": scores(a=-3.0), "two": scores(quiz=0.75)}
    tasks = {"one": ["a"], "two": ["quiz"]}
    assert objective(now, base, alone, tasks) == pytest.approx((0.5 + 0.5) / 2)
    assert objective(base, base, alone, tasks) == 0
    assert objective({**alone["one"], **alone["two"]}, base, alone, tasks) == pytest.approx(1)


# Where `auto` may stand


def test_auto_is_refused_where_nothing_is_measured() -> None:
    with pytest.raises(RecipeError, match=r"`lambda: auto` needs scores .* measured only by `contmerge run`"):
        make_rule("magmax", {"lambda": "auto"})
    data = {"name": "x", "base_model": "b", "stages": [{"name": "s", "expert": "e"}], "merge": AUTO}
    with pytest.raises(RecipeError, match="needs measured stages"):
        parse_recipe(data)


@pytest.mark.parametrize(
    ("rule", "word", "known"),
    [("opcm", "alpha", "opcm has no parameter for `auto`"), ("ties", "density", "`auto` is for lambda")],
)
def test_auto_is_refused_for_what_changes_the_state(
    home: Path, tmp_path: Path, rule: str, word: str, known: str
) -> None:
    data = recipe(home, "quiet", merge=[{"rule": rule, "parameters": {word: "auto"}}])
    with pytest.raises(RecipeError, match=f"merge entry {rule}: {word} of {rule} cannot be `auto`; {known}"):
        run_recipe(parse_recipe(data), tmp_path / "run")


@pytest.mark.parametrize("best", [(0.4, 0.9), (0.95, 0.15), (0.6, 0.6)])
def test_two_coefficients_are_searched_together(best: tuple[float, float]) -> None:
    tried: list[tuple[float, ...]] = []

    def attempt(point: tuple[float, ...]) -> tuple[Kept, float]:
        tried.append(point)
        return kept(True), -math.dist(point, best)

    found = best_point(attempt, [1.0, 1.0])
    assert math.dist(found, best) < 0.2
    assert len(tried) == len(set(tried)) <= 17
    assert all(value > 0 for point in tried for value in point)


# Weights of stages


@pytest.mark.parametrize(("best", "tries"), [((0.4, 0.0, 0.9), 64), ((1.0, 1.0, 1.0, 1.0), 64), ((0.3,), 12)])
def test_weights_of_any_number_of_stages_are_found(best: tuple[float, ...], tries: int) -> None:
    tried: list[tuple[float, ...]] = []

    def attempt(point: tuple[float, ...]) -> tuple[Kept, float]:
        tried.append(point)
        return kept(True), -math.dist(point, best)

    tops = [2.0] * len(best)
    found = best_weights(attempt, tops, [(1.5,) * len(best), (3.0,) * len(best)], tries)
    assert math.dist(found, best) < 0.35
    assert tried[0] == (1.5,) * len(best)
    assert len(tried) == len(set(tried)) <= tries
    assert all(0 <= value <= 2 for point in tried for value in point)
    assert (0.0,) * len(best) not in tried  # the base needs no attempt


def test_only_allowed_weights_are_chosen_if_any_is() -> None:
    def attempt(point: tuple[float, ...]) -> tuple[Kept, float]:
        return kept(point[0] <= 0.5), point[0]

    assert best_weights(attempt, [1.0], [(1.0,)], 16)[0] == pytest.approx(0.5, abs=0.05)
    assert best_weights(lambda p: (kept(False), p[0]), [1.0], [(1.0,)], 8) == (1.0,)


def test_the_largest_weights_are_tried() -> None:
    """Also where their six digits are more than they."""
    tried: list[tuple[float, ...]] = []

    def attempt(point: tuple[float, ...]) -> tuple[Kept, float]:
        tried.append(point)
        return kept(True), sum(point)

    tops = [2.4789178, 2 - 2e-9]
    best_weights(attempt, tops, [(tops[0], 0.0), (0.0, tops[1])], 3)
    assert tried[:2] == [(2.47892, 0.0), (0.0, 2.0)]


def test_points_spread_evenly() -> None:
    points = spread(2, 64)
    cells = {(int(4 * x), int(4 * y)) for x, y in points}
    assert len(cells) == 16
    assert all(0 <= value < 1 for point in points for value in point)


def test_the_front_is_what_no_other_exceeds() -> None:
    values = [(0.5, 0.0), (0.9, -0.2), (0.4, -0.1), (0.9, -0.3), (0.1, 0.1), (0.5, 0.0)]
    chosen = front(values)
    assert chosen[0] == 1
    assert {values[i] for i in chosen} == {(0.9, -0.2), (0.5, 0.0), (0.1, 0.1)}
    assert front([]) == []


def test_the_gain_is_weighted_by_what_is_wanted_and_has_an_interval() -> None:
    def scores(**utilities: float) -> Data:
        return {n: make_score(u, "perplexity", seed=n) for n, u in utilities.items()}

    base, now = scores(a=-4.0, bb=-2.0), scores(a=-3.5, bb=-2.0)
    alone, tasks = {"one": scores(a=-3.0), "two": scores(bb=-1.0)}, {"one": ["a"], "two": ["bb"]}
    even, first = (gain_kept(now, base, alone, tasks, wanted) for wanted in ({}, {"one": 3.0, "two": 1.0}))
    assert even
    assert first
    assert even.mean == pytest.approx(0.25)
    assert first.mean == pytest.approx(0.375)
    assert first.low is not None
    assert first.high is not None
    assert first.low <= 0.375 <= first.high
    assert gain_kept(now, base, alone, {"one": []}) is None
