"""The grid of a study: its cells, orders and settings, and what is wrong with one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_contmerge.errors import RecipeError
from hf_contmerge.run.recipe.study import Study, load_study, study_cells, study_orders
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe

STAGES = ("law", "medicine", "code")


def study_of(**fields: Any) -> Study:
    recipe = {
        "name": "r", "base_model": "base", "merge": ["magmax"],
        "stages": [{"name": name, "dataset": f"{name}.jsonl"} for name in STAGES],
    }  # fmt: skip
    return Study.model_validate({"name": "s", "recipe": recipe, **fields})


def test_every_setting_meets_every_seed_and_order() -> None:
    study = study_of(orders=[STAGES, STAGES[::-1]], seeds=[0, 7], vary={"train.learning_rate": [1e-5, 1e-4]})
    cells = study_cells(study)
    assert len({cell.name for cell in cells}) == len(cells) == 8
    for cell in cells:
        names = [stage.name for stage in cell.recipe.stages]
        assert names == list(STAGES if cell.order == 1 else STAGES[::-1])
        assert cell.recipe.seed == cell.seed
        assert cell.setting == f"learning_rate-{cell.recipe.train.sft_fields['learning_rate']}"
        assert cell.recipe.name == cell.name


def test_named_settings_join_the_combinations() -> None:
    slow = {"name": "slow-lora", "set": {"train.strategy": "lora", "train.learning_rate": 1e-6}}
    cells = study_cells(study_of(vary={"train.strategy": ["full", ["lora", "replay"]]}, settings=[slow]))
    assert [cell.setting for cell in cells] == ["full", "lora-replay", "slow-lora"]
    assert cells[1].recipe.train.strategy == ("lora", "replay")
    assert [cell.setting for cell in study_cells(study_of(settings=[slow], seeds=[0, 1]))] == ["slow-lora"] * 2


def test_values_with_one_long_beginning_have_names_of_their_own() -> None:
    bases = [f"/data/projects/continual-merging/checkpoints/pretrained/qwen3-0.6b-base-{i}" for i in range(3)]
    names = [cell.setting for cell in study_cells(study_of(vary={"base_model": bases}))]
    assert len(set(names)) == 3
    assert all(len(name) <= 60 for name in names)
    assert names[0] == study_cells(study_of(vary={"base_model": bases[:1]}, seeds=[0, 1]))[0].setting
    assert names == [cell.setting for cell in study_cells(study_of(vary={"base_model": [*bases, "x"]}))][:3]


def test_the_runs_of_a_setting_with_a_long_name_have_names_that_a_run_may_have() -> None:
    settings = [
        {"name": 70 * "a" + end, "set": {"train.learning_rate": rate}} for end, rate in (("x", 1e-5), ("y", 1e-4))
    ]
    cells = study_cells(study_of(settings=settings, seeds=[0, 2**32 - 1]))
    assert len({cell.name for cell in cells}) == 4
    for cell in cells:
        assert cell.recipe.name == cell.name
        parse_recipe(cell.recipe.model_dump(mode="json"), where="the run's recipe.yml")


def test_the_share_for_choices_may_vary_where_nothing_is_chosen() -> None:
    assert len(study_cells(study_of(vary={"evaluate.validation": [0.2, 0.5]}))) == 2
    guarded = {"name": "g", "set": {"guard.max_forgetting": 0.1, "evaluate.validation": 0.2}}
    study = study_of(settings=[guarded, {"name": "h", "set": {"guard.max_forgetting": 0.1}}])
    with pytest.raises(RecipeError, match=r"evaluate\.validation of study s is 0\.2 in setting"):
        study_cells(study)


def test_a_stages_own_fields_stay_with_it_in_each_order() -> None:
    study = study_of(orders="all", vary={"stages.0.train.max_steps": [3]})
    steps = [{s.name: s.train.get("max_steps") for s in cell.recipe.stages} for cell in study_cells(study)]
    assert steps == [{"law": 3, "medicine": None, "code": None}] * 6


def test_random_orders_are_the_same_each_time() -> None:
    names = ["a", "b", "c", "d"]
    found = study_orders(study_of(orders=5), names)
    assert found[0] == tuple(names)
    assert len(set(found)) == 5
    assert found == study_orders(study_of(orders=5), names)
    assert len(study_orders(study_of(orders="all"), names)) == 24


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"orders": [["law", "code"], STAGES]}, r"orders: \[law, code\] misses medicine"),
        ({"orders": [["law", "code", "medicin"]]}, "misses medicine"),
        ({"orders": [[*STAGES, "poems"]]}, r"names poems, no stage of the recipe \(law, medicine, code\)"),
        ({"orders": [[*STAGES, "law"]]}, "names a stage twice"),
        ({"orders": [STAGES, STAGES]}, "one order is there twice"),
        ({"orders": 7}, "3 stages have 6 orders; got 7"),
        ({}, "nothing to vary"),
        ({"seeds": [3]}, "nothing to vary"),
        ({"seeds": [0, 1], "vary": {"train.parameters.x.y.z": [1]}, "recipe": {"stages": 3}}, "stages"),
        ({"seeds": [0, 1], "vary": {"merge.3.rule": ["opcm"]}}, "no path 'merge.3.rule'"),
        ({"seeds": [0, 1], "vary": {"evaluate.limt": [3]}}, "Unknown field 'limt'"),
        ({"vary": {"train.learning_rate": [0.1, "0.1"]}}, "Settings learning_rate-0.1 and .* are the same"),
        ({"settings": [{"name": "x", "set": {}}, {"name": "y", "set": {"train": {}}}]}, "Settings x and y"),
        ({"vary": {"evaluate.limit": [10, 20]}}, "is 10 in setting limit-10 and 20 in limit-20"),
        ({"settings": [{"name": "x", "set": {"stages.0.name": "zz"}}, {"name": "y", "set": {}}]},
         "Setting x of study s has the stages zz, medicine, code, and the recipe has law, medicine, code"),
        ({"seeds": [0, 1], "vary": {"stages.1": [{"name": "art", "dataset": "p.jsonl"}]}}, "the stages law, art, code"),
        ({"vary": {"guard.max_forgetting": [0.1, 0.2]}, "settings": [{"name": "free", "set": {}}]},
         "Setting max_forgetting-0.1 of study s has a guard or an `auto` parameter, and free has neither"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        study_cells(study_of(**fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seeds": [1, 1]}, "seeds: 1, 1 has one twice"),
        ({"vary": {"seed": [1, 2]}}, "seed cannot vary here: `seeds` sets it"),
        ({"vary": {"stages": [[], []]}}, "stages cannot vary here: `orders` sets it"),
        ({"settings": [{"name": "x", "set": {"output": "y"}}]}, "output cannot vary here"),
        ({"settings": [{"name": "x", "set": {}}, {"name": "x", "set": {"seed2": 1}}]}, "two settings are named x"),
        ({"order": 3}, "Unknown field 'order' in the study"),
        ({"settings": [{"name": "a", "set": {}, "at": 1}]}, "Unknown field 'at' in settings.0. Known: name, set."),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, -1]}, r"seeds\.1: Input should be greater than or equal to 0 \(got -1\)"),
        ({"seeds": [0, 2**40]}, r"seeds\.1: Input should be less than or equal to 4294967295"),
        ({"vary": {"train.max_steps": []}}, "vary"),
        ({"vary": {"train.max_steps": [3, 3]}}, "vary: train.max_steps has one value twice"),
        *(
            ({"orders": orders}, "orders: must be `all`, a number from 1 on, a stream, or lists of stage names")
            for orders in ([[1, 2]], [["a", "b"], "c"], ["a", "b"], [], 0, True, 1.5, None)
        ),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    (tmp_path / "study.yml").write_text(yaml.safe_dump({"name": "s", "recipe": {}, **fields}))
    with pytest.raises(RecipeError, match=said):
        load_study(tmp_path / "study.yml")


def test_the_recipe_is_found_next_to_the_study(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(yaml.safe_dump(study_of().recipe))
    (tmp_path / "s.yml").write_text("name: s\nrecipe: r.yml\norders: all\n")
    assert len(study_cells(load_study(tmp_path / "s.yml"))) == 6
    (tmp_path / "s.yml").write_text("name: s\nrecipe: other.yml\n")
    with pytest.raises(RecipeError, match=r"Cannot read the recipe .*other\.yml"):
        load_study(tmp_path / "s.yml")
    with pytest.raises(RecipeError, match="is a recipe, not a study"):
        load_study(tmp_path / "r.yml")
    with pytest.raises(RecipeError, match=r"s\.yml is a study, not a recipe\. Give it to `contmerge study`"):
        load_recipe(tmp_path / "s.yml")
