"""The table of fields: every field has a row, and those that it is easy to get wrong have the right one."""

import pytest
from toys import ROOT

from hf_contmerge.run.recipe.changes import changes, flat_fields
from hf_contmerge.run.recipe.parts import Evaluate
from hf_contmerge.run.recipe.phases import use_of
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe

ROWS = {
    "name": (None, False, False),
    "publish.repo_id": (None, False, False),
    "guard.max_forgetting": ("merge", False, False),
    "guard.ladder": ("merge", False, False),
    "merge.magmax.parameters.lambda": ("merge", True, False),
    "merge.magmax.dtype": ("merge", True, False),
    "seed": ("train", True, False),
    "base_model": ("train", True, False),
    "train.learning_rate": ("train", True, False),
    "train.report_to": ("train", False, False),
    "stages.2.train.report_to": ("train", False, False),
    "stages.1.dataset.path": ("train", True, False),
    "stages.1.tasks.quiz.dataset.path": ("score", True, False),
    "stages.1.tasks.quiz.suite": (None, False, False),
    "evaluate.general_tasks.arc_easy.num_fewshot": ("score", True, False),
    "evaluate.validation": ("merge", True, True),
    "evaluate.batch_size": ("score", False, False),
    "evaluate.limit": ("score", True, True),
    "evaluate.a_field_of_tomorrow": ("score", True, True),  # the safe side
}


@pytest.mark.parametrize("field", ROWS)
def test_rows(field: str) -> None:
    use = use_of(field)
    assert (use.phase, use.undoes, use.compares) == ROWS[field]


def test_every_field_of_every_recipe_has_a_row() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yml"))
    ours = [load_recipe(path) for path in recipes if "merge_method:" not in path.read_text()]
    assert len(ours) >= 4
    for recipe in ours:
        assert all(use_of(field) for field, _ in flat_fields(recipe.model_dump(mode="json")))


def test_scores_are_compared_by_what_they_depend_on() -> None:
    known = {"limit", "max_length", "dtype", "chat_template", "validation", "backend"}
    assert set(Evaluate().measured_by()) == known


def test_a_bar_in_one_stage_undoes_nothing() -> None:
    fields = {"name": "x", "base_model": "b", "merge": ["magmax"]}
    before, after = (
        parse_recipe({**fields, "stages": [{"name": "s", "dataset": "s.jsonl", "train": {"disable_tqdm": off}}]})
        for off in (True, False)
    )
    assert list(changes(before, after)) == []
