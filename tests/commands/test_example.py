"""`contmerge example` and `contmerge schema`: from the checkout, and from a built wheel."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from toys import ROOT

from hf_contmerge.commands.main import main
from hf_contmerge.run.recipe.json_schema import recipe_schema
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.text import load_recipe, read_yaml
from hf_contmerge.runtime.examples import examples, launcher_file

Captured = pytest.CaptureFixture[str]


def test_every_recipe_is_listed_with_a_sentence(capsys: Captured) -> None:
    assert main(["example", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    files = {str(path) for path in (ROOT / "recipes").rglob("*.y*ml")}
    assert {example["file"] for example in listed} == files
    assert all(len(example["about"].split()) > 3 for example in listed)
    assert main(["example", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(files)
    assert max(map(len, lines)) <= 80


def test_a_copy_is_the_file_and_says_what_is_next(tmp_path: Path, capsys: Captured) -> None:
    for name, file, following in (
        ("finance", "finance.yml", "contmerge plan"),
        ("accelerate/fsdp2", "fsdp2.yaml", "--config-file"),
        ("recipes/magmax.yml", "magmax.yml", "contmerge merge from-recipe"),
    ):
        assert main(["example", "copy", name, str(tmp_path / "new")]) == 0
        copy = tmp_path / "new" / file
        said = capsys.readouterr().out
        assert said.startswith(f"Wrote {copy}. Next: ")
        assert following in said
        assert copy.read_bytes() in [path.read_bytes() for path in (ROOT / "recipes").rglob(file)]
    assert load_recipe(tmp_path / "new" / "finance.yml").name == "finance"
    assert main(["example", "copy", "finance", str(tmp_path / "new")]) == 2
    assert "finance.yml exists. Choose another folder, or overwrite it with --force." in capsys.readouterr().err
    assert main(["example", "copy", "finance", str(tmp_path / "new"), "--force"]) == 0


def test_misspelt_names_are_suggested(capsys: Captured) -> None:
    assert main(["example", "copy", "finanse"]) == 2
    assert capsys.readouterr().err.startswith("Error: Unknown example 'finanse'. Did you mean 'finance'?")
    assert main(["run", str(ROOT / "recipes/finance.yml"), "--config-file", "fsdp3"]) == 2
    assert "Unknown accelerate configuration 'fsdp3'. Did you mean 'fsdp2'" in capsys.readouterr().err
    assert launcher_file("fsdp2") == ROOT / "recipes/accelerate/fsdp2.yaml"


# The schema


SCHEMA = recipe_schema(ROOT / "docs" / "recipe.md")
SMALLEST = {"name": "x", "base_model": "b", "stages": [{"name": "s", "dataset": "s.jsonl"}], "merge": ["magmax"]}


def mistakes(recipe: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [error.json_path for error in validator.iter_errors(json.loads(json.dumps(recipe)))]


@pytest.mark.parametrize("example", [e for e in examples().values() if e.kind == "recipe"], ids=lambda e: e.name)
def test_recipes_fit_the_schema(example: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert mistakes(read_yaml(example.text())) == []


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({}, None),
        ({"train": {"strategy": "lora", "statistics": ["fisher"], "learning_rate": 1e-5}}, None),
        ({"guard": {"on": "stages", "ladder": ["shrink", {"rule": "ema"}, {"do": "earlier"}]}}, None),
        ({"evaluate": {"general_tasks": ["general", {"name": "sciq"}]}, "baselines": "joint"}, None),
        ({"merge": [{"rule": "magmax", "parameters": {"lambda": "auto"}}]}, None),
        ({"sead": 1}, "$"),
        ({"merge": []}, "$.merge"),
        ({"stages": [{"name": "s s", "dataset": "x"}]}, "$.stages[0].name"),
        ({"evaluate": {"matrix": "whole"}}, "$.evaluate.matrix"),
        ({"evaluate": {"limit": 0}}, "$.evaluate.limit"),
    ],
)
def test_the_schema_accepts_short_forms_and_finds_mistakes(more: dict[str, Any], place: str | None) -> None:
    """What it accepts, the reader of recipes accepts too, and the reverse."""
    assert mistakes({**SMALLEST, **more}) == ([place] if place else [])
    if place is None:
        assert Recipe.model_validate({**SMALLEST, **more})


def test_each_field_has_the_meaning_of_the_page(tmp_path: Path, capsys: Captured) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert main(["schema", "--out", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == SCHEMA
    assert main(["schema", "--out", str(tmp_path)]) == 2
    for model in (SCHEMA, *SCHEMA["$defs"].values()):
        assert all(len(field["description"]) > 5 for field in model["properties"].values())
    assert SCHEMA["properties"]["base_model"]["description"].startswith("The pretrained model: a Hub id")
    assert "](" not in json.dumps(SCHEMA)


# The wheel


@pytest.mark.slow
def test_an_installed_wheel_has_its_examples_and_schema(tmp_path: Path) -> None:
    """In an environment that sees the libraries of this one, but not the checkout."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hf_contmerge/recipes/finance.yml", "hf_contmerge/docs/recipe.md", "hf_contmerge/py.typed"} <= set(names)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Author: " in metadata
    assert "Classifier: Typing :: Typed" in metadata
    venv.create(tmp_path / "env", with_pip=False)
    place = next((tmp_path / "env").glob("lib/python*/site-packages"))
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(wheel)]
    subprocess.run(words, check=True, capture_output=True)
    libraries = next(p for p in map(Path, sys.path) if (p / "pydantic").is_dir())
    (place / "libraries.pth").write_text(f"{libraries}\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def contmerge(*args: str) -> str:
        command = [str(tmp_path / "env/bin/python"), "-m", "hf_contmerge.commands.main", *args]
        return subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout

    listed = json.loads(contmerge("example", "list", "--json"))
    assert [example["name"] for example in listed] == list(examples())
    assert all(str(tmp_path) in example["file"] for example in listed)
    contmerge("example", "copy", "finance")
    assert load_recipe(tmp_path / "finance.yml").name == "finance"
    assert json.loads(contmerge("schema")) == SCHEMA
