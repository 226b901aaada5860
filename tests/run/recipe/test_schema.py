"""The recipe: every one that we ship is read, every mistake is answered with where it is and what to write."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys import ROOT

from hf_contmerge.errors import ContmergeError, RecipeError
from hf_contmerge.run.recipe.parts import Dataset, Task
from hf_contmerge.run.recipe.schema import Merge, Recipe
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe, recipe_yaml

SHIPPED = sorted((ROOT / "recipes").glob("*.yml"))
Data = dict[str, Any]


def smallest() -> Data:
    return {
        "name": "law",
        "base_model": "owner/base",
        "stages": [{"name": "law", "dataset": {"path": "law.jsonl"}}],
        "merge": [{"rule": "magmax"}],
    }


def refusal(data: Any) -> str:
    with pytest.raises(RecipeError) as error:
        parse_recipe(data, where="my.yml")
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "law.yml"
    path.write_text(yaml.safe_dump(smallest()))
    return path


# What we ship


def test_there_are_recipes() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_recipe_is_read(path: Path) -> None:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "merge_method" in data:
        from mergekit.config import MergeConfiguration  # seconds to load, and only these need it

        assert MergeConfiguration.model_validate(data).merge_method == data["merge_method"]
    else:
        recipe = load_recipe(path)
        assert recipe.stages
        assert parse_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe


# What a recipe says


def test_the_defaults_of_the_smallest_recipe() -> None:
    recipe = parse_recipe(smallest())
    assert recipe.seed == 0
    assert recipe.train.strategy == ("full",)
    assert recipe.merge == (Merge(name="magmax", rule="magmax"),)
    assert recipe.run_folder() == Path("runs/law")
    assert recipe.stages[0].task_names() == ("law_heldout",)


def test_a_string_stands_for_the_mapping_with_its_main_field() -> None:
    data = smallest() | {
        "stages": [{"name": "law", "dataset": "law.jsonl", "tasks": ["mmlu_law"]}],
        "merge": ["magmax", "opcm"],
        "evaluate": {"general_tasks": ["hellaswag"]},
    }
    recipe = parse_recipe(data)
    assert recipe.stages[0].dataset == Dataset(path="law.jsonl")
    assert recipe.stages[0].tasks == (Task(name="mmlu_law"),)
    assert [(m.name, m.rule) for m in recipe.merge] == [("magmax", "magmax"), ("opcm", "opcm")]
    assert recipe.evaluate.general_tasks == (Task(name="hellaswag"),)


def test_train_takes_the_fields_of_sft_config_by_their_own_names() -> None:
    train = parse_recipe(smallest() | {"train": {"strategy": "lora", "max_steps": 5, "packing": True}}).train
    assert train.strategy == ("lora",)
    assert train.sft_fields == {"max_steps": 5, "packing": True}


def test_what_is_measured_after_which_stage() -> None:
    stages = [
        {"name": "law", "dataset": "law.jsonl", "tasks": ["bar_exam"]},
        {"name": "code", "dataset": {"path": "code.jsonl", "heldout": 0}, "tasks": ["humaneval"]},
        {"name": "chat", "expert": "owner/chat"},
    ]
    recipe = parse_recipe(smallest() | {"stages": stages, "evaluate": {"general_tasks": ["hellaswag"]}})
    assert [t.name for t in recipe.measured([1])] == ["law_heldout", "bar_exam", "hellaswag"]
    assert [t.name for t in recipe.measured([2, 3], general=False)] == ["humaneval"]
    assert [t.name for t in recipe.tasks()] == ["bar_exam", "humaneval", "hellaswag"]


def test_a_recipe_written_with_all_defaults_is_the_same_recipe() -> None:
    data = smallest() | {
        "seed": 7,
        "stages": [
            {"name": "law", "dataset": {"path": "gesetz§.jsonl", "text": "{question}\n{answer}", "heldout": 0}},
            {"name": "chat", "expert": "owner/chat", "minus": "owner/base", "tasks": [
                {"name": "quiz", "kind": "multiple_choice", "dataset": "quiz.jsonl", "num_fewshot": 2},
            ]},
        ],
        "train": {"strategy": "lora", "parameters": {"r": 8}, "learning_rate": 1.0e-5, "packing": False},
        "merge": [{"rule": "opcm", "parameters": {"alpha": 0.4, "variant": "paper"}}, {"name": "two", "rule": "opcm"}],
        "evaluate": {"batch_size": "auto", "matrix": "full", "limit": 3},
        "publish": {"repo_id": "me/law", "merge": "two"},
    }  # fmt: skip
    recipe = parse_recipe(data)
    text = recipe_yaml(recipe)
    assert "gesetz§.jsonl" in text
    assert "heldout_chars: 4000" in text
    assert parse_recipe(yaml.safe_load(text)) == recipe


# --set


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=3", lambda r: r.seed == 3),
        ("train.learning_rate=1.0e-4", lambda r: r.train.sft_fields == {"learning_rate": 1e-4}),
        ("merge.0.rule=opcm", lambda r: r.merge[0].rule == "opcm"),
        ("merge.0.parameters.lambda=0.7", lambda r: r.merge[0].parameters == {"lambda": 0.7}),
        ("merge=[opcm, {rule: ema, parameters: {beta: 0.9}}]", lambda r: [m.name for m in r.merge] == ["opcm", "ema"]),
        ("evaluate.general_tasks=[hellaswag]", lambda r: [t.name for t in r.tasks()] == ["hellaswag"]),
        ('stages.0.dataset.text="{a}={b}"', lambda r: r.stages[0].dataset.text == "{a}={b}"),
        ("stages.0.dataset=other.jsonl", lambda r: r.stages[0].dataset.path == "other.jsonl"),
        ("publish.repo_id=me/law", lambda r: r.publish.repo_id == "me/law"),
        ("output=null", lambda r: r.output is None),
    ],
)
def test_set_changes_one_place(file: Path, override: str, read: Any) -> None:
    assert read(load_recipe(file, [override]))


def test_later_overrides_win(file: Path) -> None:
    assert load_recipe(file, ["seed=3", "seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("seed", "--set expects path=value, such as merge.0.rule=opcm; got 'seed'"),
        ("merge..rule=opcm", "--set expects path=value"),
        ("merge.1.rule=opcm", "--set merge.1.rule=opcm: the recipe has no path 'merge.1.rule'"),
        ("merge.first.rule=opcm", "has no path 'merge.first.rule'"),
        ("base_model.path=x", "base_model is 'owner/base'; write it as a mapping first"),
        ("merge=[opcm", "--set merge=[opcm: '[opcm' is not a YAML value; put it in double quotes"),
        ("stages.0.dataset.text={a}{b}", "'{a}{b}' is not a YAML value; put it in double quotes"),
        ("sed=3", "Unknown field 'sed' in the recipe. Did you mean 'seed'?"),
    ],
)
def test_an_override_without_a_place_is_refused(file: Path, override: str, text: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(file, [override])
    assert text in str(error.value)


# Mistakes


def test_recipe_errors_are_value_errors_that_end_the_program_with_2() -> None:
    assert issubclass(RecipeError, ValueError)
    assert issubclass(RecipeError, ContmergeError)
    assert RecipeError.exit_code == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stagse": []}, "my.yml: Unknown field 'stagse' in the recipe. Did you mean 'stages'? Known: base_model, "),
        (
            {"stages": [{"name": "law", "dataset": {"path": "law.jsonl", "max_example": 3}}]},
            "Unknown field 'max_example' in stages.0.dataset. Did you mean 'max_examples'",
        ),
        (
            {"stages": [{"name": "law", "datasets": "law.jsonl"}]},
            "my.yml: Unknown field 'datasets' in stages.0. Did you mean 'dataset' or 'tasks'?",
        ),
        (
            {"merge": [{"rule": "opcm", "alpha": 0.5}]},
            "Unknown field 'alpha' in merge.0. Known: dtype, layers, name, parameters, rounding, rule, shard_size, "
            "start_from, tokenizer_from, weights.",
        ),
        ({"evaluate": {"general_task": []}}, "Unknown field 'general_task' in evaluate. Did you mean 'general_tasks'?"),
        (
            {"evaluate": {"general_tasks": [{"name": "a", "fewshot": 1}]}},
            "Unknown field 'fewshot' in evaluate.general_tasks.0. Did you mean 'num_fewshot'?",
        ),
        ({"publish": {"repo": "me/law"}}, "Unknown field 'repo' in publish. Did you mean 'repo_id'?"),
        (
            {"evaluate": {"same_within": {"points": 1}}},
            "Unknown field 'points' in evaluate.same_within. Known: accuracy, perplexity.",
        ),
        (
            {"train": {"statistics": {"rows": 9}}},
            "Unknown field 'rows' in train.statistics. Known: batch_size, examples, kinds, max_length.",
        ),
        (
            {"merge": [{"rule": "opcm", "layers": {"middle": 1}}]},
            "Unknown field 'middle' in merge.0.layers. Known: first, last.",
        ),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_one(change: Data, text: str) -> None:
    assert text in refusal(smallest() | change)


@pytest.mark.parametrize("field", ["name", "base_model", "stages", "merge"])
def test_a_missing_field_is_named(field: str) -> None:
    data = smallest()
    del data[field]
    assert refusal(data) == f"my.yml: {field} is missing."


def test_a_missing_field_further_in_is_named_with_its_place() -> None:
    assert refusal(smallest() | {"publish": {}}) == "my.yml: publish.repo_id is missing."
    assert refusal(smallest() | {"merge": ["magmax", {"parameters": {}}]}) == "my.yml: merge.1.rule is missing."


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": "seven"}, "my.yml: seed: Input should be a valid integer"),
        ({"seed": "seven"}, "(got 'seven')"),
        ({"seed": -1}, "my.yml: seed: Input should be greater than or equal to 0 (got -1)"),
        ({"seed": 2**32}, "my.yml: seed: Input should be less than or equal to 4294967295 (got 4294967296)"),
        ({"train": {"data_seed": -1}}, "data_seed"),
        ({"name": "law/../.."}, "name: String should match pattern"),
        ({"stages": []}, "stages: Tuple should have at least 1 item"),
        ({"stages": "law.jsonl"}, "stages: Input should be a valid tuple (got 'law.jsonl')"),
        ({"stages": [{"name": "law", "dataset": {"path": "a", "heldout": -1}}]}, "stages.0.dataset.heldout: Input"),
        ({"merge": [{"rule": "opcm", "start_from": "init"}]}, "'base', 'previous' or 'merged' (got 'init')"),
        ({"evaluate": {"batch_size": "automatic"}}, "evaluate.batch_size"),
        ({"evaluate": {"same_within": {"perplexity": float("inf")}}}, "perplexity: Input should be a finite number"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_shown_with_what_would_be_right(change: Data, text: str) -> None:
    assert text in refusal(smallest() | change)


def test_all_mistakes_are_told_at_once() -> None:
    told = refusal(smallest() | {"seed": "seven", "stagse": [], "publish": {}})
    assert all(text in told for text in ("seed: ", "'stagse'", "publish.repo_id is missing"))


STAGE_LAW = {"name": "law", "dataset": "law.jsonl"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stages": [STAGE_LAW, STAGE_LAW]}, "two stages are named law; give each a different `name`"),
        ({"merge": ["opcm", {"rule": "opcm", "parameters": {"alpha": 0.4}}]}, "two merge entries are named opcm; give"),
        (
            {"stages": [STAGE_LAW | {"tasks": ["quiz"]}], "evaluate": {"general_tasks": ["quiz"]}},
            "two tasks are named quiz",
        ),
        ({"evaluate": {"general_tasks": ["law_heldout"]}}, "two tasks are named law_heldout"),
    ],
)
def test_a_name_can_be_given_once(change: Data, text: str) -> None:
    assert text in refusal(smallest() | change)


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ({}, "a stage needs either `dataset` (to train on) or `expert` (a trained model)"),
        ({"dataset": "law.jsonl", "expert": "owner/law"}, "a stage needs either `dataset`"),
        ({"dataset": "law.jsonl", "minus": "owner/base"}, "`minus` needs `expert`"),
        ({"expert": "owner/law", "tasks": [{"name": "quiz", "dataset": "quiz.jsonl"}]}, "both `dataset` and `kind`"),
        ({"expert": "owner/law", "tasks": [{"name": "quiz", "kind": "perplexity"}]}, "both `dataset` and `kind`"),
    ],
)
def test_a_stage_has_one_source_and_a_task_is_whole(stage: Data, text: str) -> None:
    told = refusal(smallest() | {"stages": [{"name": "law", **stage}]})
    assert "stages.0" in told
    assert text in told


def test_a_mix_is_written_in_the_place_of_a_path() -> None:
    mix = [{"path": "a.jsonl", "share": 0.7}, {"path": "owner/b", "share": 0.3, "split": "test", "text": "body"}]
    recipe = parse_recipe(smallest() | {"stages": [{"name": "law", "dataset": {"mix": mix, "max_examples": 9}}]})
    dataset = recipe.stages[0].dataset
    assert dataset
    assert [(s.path, s.split, s.text) for s in dataset.sources()] == [
        ("a.jsonl", "train", None),
        ("owner/b", "test", "body"),
    ]
    assert dataset.shares() == (0.7, 0.3)
    assert recipe.stages[0].heldout_task == "law_heldout"
    assert parse_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe  # as it is frozen, with every default


A, B = {"path": "a.jsonl", "share": 0.7}, {"path": "b.jsonl", "share": 0.3}


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ({}, "stages.0.dataset: a dataset needs either `path` or `mix` (a list of datasets with their shares)"),
        ({"path": "c.jsonl", "mix": [A, B]}, "stages.0.dataset: a dataset needs either `path` or `mix`"),
        ({"mix": [A, A]}, "stages.0.dataset: the shares of a mix must sum to 1; 0.7 + 0.7 = 1.4"),
        ({"mix": [A, {**B, "share": 0}]}, "stages.0.dataset.mix.1.share: Input should be greater than 0 (got 0)"),
        ({"mix": [A, {"path": "b.jsonl"}]}, "stages.0.dataset.mix.1.share is missing."),
        ({"mix": [A, {**B, "spilt": "x"}]}, "Unknown field 'spilt' in stages.0.dataset.mix.1. Did you mean 'split'?"),
        (
            {"mix": [A, {**B, "heldout": 3}]},
            "Unknown field 'heldout' in stages.0.dataset.mix.1. Did you mean 'heldout_s",
        ),
        (
            {"mix": [A, B], "split": "test"},
            "stages.0.dataset: `split` belongs to each dataset of the mix; write it there",
        ),
        (
            {"mix": [A, B], "text": "body"},
            "stages.0.dataset: `text` belongs to each dataset of the mix; write it there",
        ),
        (
            {"mix": [A, {**B, "streaming": True}]},
            "stages.0.dataset.mix.1: `streaming` needs `max_examples`: where to st",
        ),
        (
            {"mix": [A, {**B, "streaming": True, "max_examples": 9, "heldout_split": "test"}], "heldout": 0},
            "stages.0.dataset: `heldout: 0` means all of `heldout_split`, which a stream has no end of; give a number",
        ),
    ],
)
def test_a_mix_that_cannot_be(dataset: Data, text: str) -> None:
    assert text in refusal(smallest() | {"stages": [{"name": "law", "dataset": dataset}]})


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ({"mix": [A, B]}, "a task scores one dataset; make a task of each part of the mix"),
        (
            {"path": "a.jsonl", "heldout_split": "test"},
            "a task scores the `split` of its dataset; write `split`, not `heldout_split`",
        ),
    ],
)
def test_what_the_dataset_of_a_task_cannot_have(dataset: Data, text: str) -> None:
    task = {"name": "quiz", "kind": "perplexity", "dataset": dataset}
    told = refusal(smallest() | {"evaluate": {"general_tasks": [task]}})
    assert f"evaluate.general_tasks.0: {text}" in told


def test_a_mergekit_recipe_is_sent_to_mergekit() -> None:
    told = refusal({"merge_method": "opcm", "models": [{"model": "a"}], "base_model": "b"})
    assert told.startswith(
        "my.yml is a mergekit recipe (it has `merge_method`). Run it with `mergekit-yaml my.yml OUT`"
    )


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_mapping_is_refused(data: Any) -> None:
    assert "my.yml must hold a mapping with name, base_model, stages and merge; got" in refusal(data)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"name: [law", "is not YAML: "),
        (b"name: \xff\xfe\x00", "is not YAML: "),
        (b"", "must hold a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_its_path(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "law.yml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path} {text}")


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    for path, why in [(tmp_path / "law.yml", "No such file or directory"), (tmp_path, "Is a directory")]:
        with pytest.raises(RecipeError) as error:
            load_recipe(path)
        assert str(error.value) == f"Cannot read the recipe {path}: {why}. Give the path of a YAML file."


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(smallest())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(recipe, Recipe)


def test_recipe_and_run_folder_load_no_torch() -> None:
    code = """
import sys
import hf_contmerge.run.recipe.text, hf_contmerge.run.folder
print([m for m in ("torch", "transformers", "datasets", "lm_eval", "mergekit") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
