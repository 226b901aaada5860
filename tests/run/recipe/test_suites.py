"""Suites of tasks and streams of stages: what the data file holds, how recipes take it, what `contmerge new` writes."""

from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from toys.models import write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import DataError, RecipeError
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.streams import stream_names, stream_stages
from hf_contmerge.run.recipe.suites import suite_names, suite_tasks
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe, recipe_yaml
from hf_contmerge.training._forms import rows_of
from hf_contmerge.training.data import load_stage_data

RECIPE: dict[str, Any] = {
    "name": "x", "base_model": "b", "stages": [{"name": "a", "dataset": "a.jsonl"}], "merge": ["magmax"],
}  # fmt: skip


def test_suites_are_tasks_of_lm_eval() -> None:
    """By their files: indexing them all takes seconds."""
    folder = Path(lm_eval.tasks.__file__).parent
    known = set()
    for path in folder.rglob("*.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key in ("task", "group", "tag"):
                known.add(value.strip().strip("\"'"))
            elif line.startswith(("- ", "  - ")):
                known.add(line.strip(" -"))
    known |= {
        line.split(":")[1].strip()
        for line in (folder / "tydiqa/_tydiqa_goldp_common_yaml").read_text().splitlines()[:1]
    }
    for suite in suite_names():
        tasks = suite_tasks(suite)
        assert len(set(tasks)) == len(tasks)
        assert set(tasks) <= known, set(tasks) - known


@pytest.mark.parametrize("given", ["general", ["general"]])
def test_a_suite_becomes_its_tasks(given: Any) -> None:
    recipe = parse_recipe({**RECIPE, "evaluate": {"general_tasks": given}})
    assert [t.name for t in recipe.evaluate.general_tasks] == list(suite_tasks("general"))
    assert {t.suite for t in recipe.evaluate.general_tasks} == {"general"}
    assert parse_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe


def test_suites_and_tasks_beside_each_other() -> None:
    mine = {"name": "mine", "kind": "perplexity", "dataset": "m.jsonl"}
    tasks = ["general", mine, "trace", {"name": "mergebench"}]
    recipe = parse_recipe({**RECIPE, "evaluate": {"general_tasks": tasks}})
    names = [t.name for t in recipe.evaluate.general_tasks]
    assert names[:9] == [*suite_tasks("general"), "mine"]
    assert names[9:] == [t for t in suite_tasks("trace") if t not in suite_tasks("general")] + ["mergebench"]
    stage = parse_recipe({**RECIPE, "stages": [{"name": "a", "dataset": "a.jsonl", "tasks": "trace"}]}).stages[0]
    assert [t.suite for t in stage.tasks] == ["trace"] * len(suite_tasks("trace"))


def test_a_task_that_is_there_twice() -> None:
    with pytest.raises(RecipeError, match="two tasks are named piqa"):
        parse_recipe({**RECIPE, "evaluate": {"general_tasks": ["general", "piqa"]}})


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_stream_becomes_a_recipe(order: int, tmp_path: Path) -> None:
    path = tmp_path / "bench.yml"
    words = ["new", str(path), "--base", "b/c", "--suite", "cl-standard", "--order", str(order), "--gpus", "0"]
    assert main(words) == 0
    recipe = load_recipe(path)
    stages = stream_stages("cl-standard", order)
    assert {s.name for s in stages} == {"ag_news", "amazon", "dbpedia", "yahoo"}
    for stage, made in zip(stages, recipe.stages, strict=True):
        (task,) = made.tasks
        assert made.dataset
        assert (made.name, made.dataset.path, made.dataset.labels) == (
            stage.name,
            stage.path,
            {stage.label: stage.words},
        )
        assert made.dataset.text == f"{stage.question(stage.document)} {{{stage.label}}}"
        assert task.dataset
        assert (task.kind, task.choices, task.dataset.split) == ("multiple_choice", stage.words, "test")


def test_orders_are_those_published() -> None:
    """Those of O-LoRA (2310.14152)."""
    names = [[s.name for s in stream_stages("cl-standard", order)] for order in (1, 2, 3)]
    assert names == [
        ["dbpedia", "amazon", "yahoo", "ag_news"],
        ["dbpedia", "amazon", "ag_news", "yahoo"],
        ["yahoo", "amazon", "ag_news", "dbpedia"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "cl-standrad"], "Unknown stream 'cl-standrad'. Did you mean 'cl-standard'?"),
        (["--suite", "general"], "general is a suite of tasks: name it in `general_tasks`."),
        (["--suite", "cl-standard", "--order", "4"], "Unknown order '4' in cl-standard. Known: 1, 2, 3."),
        (
            ["--suite", "cl-standard", "--stage", "a=b"],
            "`--suite` and `--stage` both define the stages; give only one of them.",
        ),
    ],
)
def test_wrong_words(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(tmp_path / "x.yml"), "--base", "b/c", "--gpus", "0", *words]) == 2
    assert message in capsys.readouterr().err
    assert stream_names() == ("cl-standard", "long-sequence", "superni", "trace", "mergebench")


def test_labels_become_words(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "n.jsonl", [{"text": f"news {i}", "label": i % 2} for i in range(6)])
    spec = Dataset(path=str(path), text="{text}: {label}", labels={"label": ("World", "Sports")}, heldout=0)
    found = sorted(row["text"] for row in rows_of(load_stage_data(spec, seed=0).train))
    assert found == [f"news {i}: {('World', 'Sports')[i % 2]}" for i in range(6)]
    with pytest.raises(DataError, match="the column label holds 1, and `labels` has words for the classes 0 to 0"):
        load_stage_data(spec.model_copy(update={"labels": {"label": ("World",)}}), seed=0)
    with pytest.raises(DataError, match="Unknown column 'lable'"):
        load_stage_data(spec.model_copy(update={"labels": {"lable": ("World",)}}), seed=0)
