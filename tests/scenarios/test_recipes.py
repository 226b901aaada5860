"""The recipes that are shipped: each says what it means to, passes the checks before a run, and runs with toys."""

from pathlib import Path

import pytest
from toys.recipes import RECIPES, toy_recipe

from hf_contmerge.loop.plan.checks import prepare
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.text import load_recipe
from hf_contmerge.runtime.ranks import find_ranks

MERGEKITS = {"magmax", "opcm"}
OURS = sorted(path.stem for path in RECIPES.glob("*.yml") if path.stem not in MERGEKITS)
SCALED = [name for name in OURS if name != "quickstart"]
"""Those with public models; the quickstart has tests of its own."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def carry_out(recipe: Recipe, folder: Path) -> Run:
    """Train and merge; then check that all of it is there. Scoring is the same for every recipe, and slow."""
    run = run_recipe(recipe, folder, until="merge")
    for entry in recipe.merge:
        for t in run.stage_numbers():
            assert run.merged(t, entry).is_done("merge")
        assert run.merged(run.stage_numbers()[-1], entry).model.is_dir()
    return run


def kinds(recipe: Recipe) -> set[str]:
    return {entry.start_from or get_rule(entry.rule).start_from for entry in recipe.merge}


def test_all_recipes_are_looked_at() -> None:
    names = "conpet continual-pretrain finance lora-stream magmax-llama opcm-llama quickstart"
    assert names.split() == OURS


@pytest.mark.parametrize("name", OURS)
def test_recipe_parses(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yml")
    assert recipe.name == name
    if recipe.publish and recipe.publish.merge:
        assert recipe.publish.merge in {entry.name for entry in recipe.merge}


@pytest.mark.parametrize("name", SCALED)
def test_recipe_passes_the_checks_before_a_run(name: str, home: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(name, home)
    run = Run.open(recipe, tmp_path / "run")
    prepared = prepare(run, find_ranks())
    assert {s.name for s in recipe.stages if s.dataset} == prepared.data.keys()


def test_what_the_recipes_are_for() -> None:
    recipe = {name: load_recipe(RECIPES / f"{name}.yml") for name in OURS}
    assert kinds(recipe["magmax-llama"]) == {"previous"}
    assert kinds(recipe["opcm-llama"]) == {"base"}
    assert len(recipe["lora-stream"].stages) == 15
    assert recipe["lora-stream"].train.parameters["keep"] is True
    assert all(s.dataset and s.dataset.streaming for s in recipe["continual-pretrain"].stages)
    finance = recipe["finance"]
    assert (finance.stages[1].minus, finance.merge[0].parameters) == (finance.base_model, {"lambda": 1.0})
    assert sum("mmlu" in task.name for task in finance.stages[0].tasks) == 3
    assert "ifeval" in {task.name for task in finance.evaluate.general_tasks}
    conpet = recipe["conpet"].train
    assert (conpet.strategy, conpet.parameters["replay"]["share"]) == (("lora", "replay"), 0.5)
    assert kinds(recipe["conpet"]) == {"previous"}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("magmax-llama", None),
        pytest.param("conpet", 2, marks=pytest.mark.slow),
        pytest.param("opcm-llama", None, marks=pytest.mark.slow),
        pytest.param("continual-pretrain", 2, marks=pytest.mark.slow),
        pytest.param("continual-pretrain", None, marks=pytest.mark.slow),
        pytest.param("lora-stream", None, marks=pytest.mark.slow),
        pytest.param("lora-stream", 2, marks=pytest.mark.slow),
    ],
)
def test_recipe_runs(name: str, stages: int | None, home: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(name, home, stages=stages)
    run = carry_out(recipe, tmp_path / "run")
    last = run.stage_numbers()[-1]
    if name == "lora-stream":
        assert is_adapter(run.expert(last, "base").model)
    if name == "opcm-llama":
        record = run.expert(last, "base").record("train")
        assert record["settings"]["beta"] == 0.1
        assert record["log"][0]["loss"] == pytest.approx(0.6931, abs=1e-2)
    if name == "continual-pretrain":
        assert (run.expert(1, "base").memory / "replay").is_dir()
