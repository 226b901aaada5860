"""Published streams: orders and prompts, as a recipe's stages, from the Hub and from local files, and in studies."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.models import write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import DataError, RecipeError
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.streams import stream_names, stream_orders, stream_stages, with_stream
from hf_contmerge.run.recipe.study import load_study, study_cells
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe, recipe_yaml
from hf_contmerge.training._forms import rows_of
from hf_contmerge.training.data import load_stage_data, task_rows

TEXTS = [{"text": f"Text: a goal in minute {i}", "label": ("Sports", "World")[i % 2]} for i in range(8)]
LONG = {
    4: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst2 dbpedia ag_news multirc yahoo",
    5: "multirc boolqa wic mnli cb copa qqp rte imdb sst2 dbpedia ag_news yelp amazon yahoo",
    6: "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia ag_news yahoo multirc boolqa wic",
}


def recipe(**stages: Any) -> Recipe:
    return parse_recipe({"name": "x", "base_model": "a/b", "merge": ["magmax"], "stages": stages})


def local(home: Path, suite: str, rows: list[dict[str, Any]], *, splits: str = "train test") -> Path:
    """Write a stream's files with the same rows for each stage."""
    for stage in stream_stages(suite):
        (home / stage.name).mkdir(parents=True)
        for split in splits.split():
            write_jsonl(home / stage.name / f"{split}.jsonl", rows)
    return home


@pytest.mark.parametrize("suite", stream_names())
def test_each_order_has_every_stage_once(suite: str) -> None:
    orders = stream_orders(suite)
    first = next(iter(orders.values()))
    for number, order in orders.items():
        assert sorted(order) == sorted(first)
        assert len(set(order)) == len(order)
        assert [stage.name for stage in stream_stages(suite, number)] == list(order)
    assert [stage.name for stage in stream_stages(suite)] == list(first)


def test_orders_of_the_long_sequence() -> None:
    """Orders 4 to 6 of O-LoRA."""
    assert {number: " ".join(order) for number, order in stream_orders("long-sequence").items()} == LONG


def test_words_are_those_of_the_prompt() -> None:
    for stage in (stage for suite in ("cl-standard", "long-sequence") for stage in stream_stages(suite)):
        assert sorted(stage.options or stage.words) == sorted(stage.words)
        question = stage.question("{text}")
        assert question.endswith("{text}\nAnswer:")
        assert ("Option: " + ", ".join(stage.options or stage.words) in question) == bool(stage.instruction)


def test_a_prompt_as_o_lora_writes_it() -> None:
    (stage,) = (stage for stage in stream_stages("long-sequence") if stage.name == "wic")
    assert stage.question("word: bane\nOne.\nTwo.") == (
        "Given a word and two sentences, whether the word is used with the same sense in both sentence? Choose one "
        "from the option.\nOption: True, False \nword: bane\nOne.\nTwo.\nAnswer:"
    )


@pytest.mark.parametrize("order", [4, 6, None])
def test_a_stream_of_the_hub_becomes_stages(order: int | None) -> None:
    found = recipe(suite="long-sequence", max_examples=30, test_examples=20, **({"order": order} if order else {}))
    assert [s.name for s in found.stages] == LONG[order or 4].split()
    mnli = next(s for s in found.stages if s.name == "mnli")
    (task,) = mnli.tasks
    assert mnli.dataset
    assert task.dataset
    assert (mnli.dataset.path, mnli.dataset.config, mnli.dataset.max_examples) == ("nyu-mll/glue", "mnli", 30)
    assert (task.dataset.split, task.dataset.config, task.dataset.max_examples) == ("validation_matched", "mnli", 20)
    assert task.choices == mnli.dataset.labels["label"] == ("entailment", "neutral", "contradiction")
    assert parse_recipe(yaml.safe_load(recipe_yaml(found))) == found, "a run keeps the stages one by one"


def test_local_classes_are_read_by_their_words(tmp_path: Path) -> None:
    home = local(tmp_path / "stream_classes", "cl-standard", TEXTS)
    stage = next(s for s in recipe(suite="cl-standard", data=str(home)).stages if s.name == "ag_news")
    assert stage.dataset
    texts = sorted(str(row["text"]) for row in rows_of(load_stage_data(stage.dataset, seed=0).train))
    question = (
        "What is the topic of the following paragraph? Choose one from the option.\nOption: World, Sports, Business, "
        "Science or Technology \n{}\nAnswer:"
    )
    assert texts == sorted(f"{question.format(row['text'])} {row['label']}" for row in TEXTS)
    asked = task_rows(stage.tasks[0])
    assert [row["gold"] for row in asked] == [("World", "Sports").index(row["label"]) for row in TEXTS]
    assert asked[0]["query"] == question.format(TEXTS[0]["text"])
    assert asked[0]["choices"] == ["World", "Sports", "Business", "Science or Technology"]


def test_the_authors_own_files_are_read_as_they_lie(tmp_path: Path) -> None:
    """O-LoRA's CL_Benchmark: arrays in TC/agnews/train.json, with `sentence` and `label`."""
    for stage in stream_stages("cl-standard"):
        folder = tmp_path / "authors" / stage.folder
        folder.mkdir(parents=True)
        rows = [{"label": stage.words[i % 2], "sentence": f"Text: {i}"} for i in range(4)]
        for split in ("train", "test"):
            (folder / f"{split}.json").write_text(json.dumps(rows))
    found = recipe(suite="cl-standard", order=3, data=str(tmp_path / "authors"))
    assert [s.name for s in found.stages] == ["yahoo", "amazon", "ag_news", "dbpedia"]
    for stage in found.stages:
        assert stage.dataset
        assert len(load_stage_data(stage.dataset, seed=0).train) == 4
        assert [row["gold"] for row in task_rows(stage.tasks[0])] == [0, 1, 0, 1]


def test_answers_come_from_local_files(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1 =", "answer": f"{i + 1}"} for i in range(12)]
    home = local(tmp_path / "stream_trace", "trace", rows)
    found = recipe(suite="trace", data=str(home), test_examples=3)
    exact = [s.name for s in found.stages if s.tasks]
    assert exact == ["C-STANCE", "FOMC", "NumGLUE-cm", "NumGLUE-ds"]
    stage = found.stages[0]
    assert stage.dataset
    assert stage.heldout_task
    data = load_stage_data(stage.dataset, seed=0)
    assert len(data.heldout) == 3
    assert {row["text"] for row in rows_of(data.train)} <= {f"{r['prompt']} {r['answer']}" for r in rows}
    assert sorted(task_rows(stage.tasks[0])[0]) == ["gold", "query"]


def test_superni_has_its_authors_prompt(tmp_path: Path) -> None:
    rows = [{"definition": "Say a thing.", "input": f"{i}", "output": "POS"} for i in range(5)]
    home = local(tmp_path / "stream_ni", "superni", rows)
    stage = recipe(suite="superni", order=2, data=str(home), test_examples=2).stages[7]
    assert stage.name == "task363_sst2_polarity_classification"
    assert task_rows(stage.tasks[0])[0]["query"].startswith(
        "Definition: Say a thing.\n\nNow complete the following example -\nInput: "
    )


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"suite": "cl-standrad"}, "Unknown stream 'cl-standrad'. Did you mean 'cl-standard'?"),
        ({"suite": "general"}, "general is a suite of tasks"),
        ({"suite": "cl-standard", "order": 4}, "Unknown order '4' in cl-standard. Known: 1, 2, 3."),
        ({"suite": "cl-standard", "oder": 1}, "Unknown field 'oder' in stages. Did you mean 'order'?"),
        ({"suite": "cl-standard", "max_examples": 0}, "stages.max_examples: Input should be greater than or equal"),
        ({"order": 1}, "stages.suite: Field required"),
        ({"suite": "trace"}, "The stream trace is read from local files: its authors' are at https://github.com/Bey"),
        ({"suite": "superni"}, "(columns: definition, input and output)"),
        ({"suite": "mergebench", "data": "x"}, "mergebench is made of trained experts and reads no files"),
        ({"suite": "cl-standard", "data": "x" * 70_000}, "stages.data is too long for a path"),
        ({"suite": "cl-standard", "data": "no\0path"}, "lacks the files of dbpedia, amazon, yahoo, ag_news"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(stages: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(**stages)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_tasks_are_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = local(tmp_path / "stream_holes", "cl-standard", TEXTS)
    (home / "yahoo/test.jsonl").unlink()
    (home / "amazon/train.jsonl").unlink()
    fields = {
        "name": "x",
        "base_model": "a/b",
        "merge": ["magmax"],
        "stages": {"suite": "cl-standard", "data": str(home)},
    }
    (tmp_path / "r.yml").write_text(yaml.safe_dump(fields))
    assert main(["run", str(tmp_path / "r.yml"), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"{home} lacks the files of amazon, yahoo. Each stage of cl-standard needs `train` and `test`" in said
    assert "with the columns text and label (one of the words)" in said
    assert not (tmp_path / "run").exists()


def test_words_that_are_no_choice_are_named(tmp_path: Path) -> None:
    rows = [{"q": "x", "label": "Sport"}, {"q": "y", "label": "Sports"}]
    task = Task.model_validate({
        "name": "t", "kind": "multiple_choice", "question": "q", "choices": ["World", "Sports"], "answer": "label",
        "dataset": str(write_jsonl(tmp_path / "no_choice.jsonl", rows)),
    })  # fmt: skip
    with pytest.raises(DataError, match="label must be the right choice or its index; got 'Sport' for 2 choices"):
        task_rows(task)


def test_overrides_reach_a_streams_stages(tmp_path: Path) -> None:
    fields = {"name": "x", "base_model": "a/b", "merge": ["magmax"], "stages": {"suite": "cl-standard"}}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(fields))
    found = load_recipe(tmp_path / "r.yml", ["stages.order=3", "stages.0.dataset.max_examples=7"])
    assert [s.name for s in found.stages] == ["yahoo", "amazon", "ag_news", "dbpedia"]
    assert [s.dataset.max_examples for s in found.stages if s.dataset] == [7, 1000, 1000, 1000]


def test_a_study_over_published_orders(tmp_path: Path) -> None:
    study = {
        "name": "s", "orders": "cl-standard", "seeds": [0, 1],
        "recipe": {"name": "r", "base_model": "a/b", "merge": ["magmax"], "stages": {"suite": "cl-standard"}},
        "vary": {"train.learning_rate": [1e-5, 1e-4], "stages.0.train.max_steps": [3]},
    }  # fmt: skip
    (tmp_path / "s.yml").write_text(yaml.safe_dump(study))
    cells = study_cells(load_study(tmp_path / "s.yml"))
    assert len(cells) == 3 * 2 * 2
    orders = stream_orders("cl-standard")
    assert all(tuple(s.name for s in cell.recipe.stages) == orders[cell.order] for cell in cells)
    assert all(s.train.get("max_steps") == (3 if s.name == "dbpedia" else None) for c in cells for s in c.recipe.stages)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"orders": "al"}, "Unknown value of `orders` 'al'. Did you mean 'all'?"),
        ({"orders": "long-sequence"}, "names boolqa, cb, copa"),
        ({"orders": "all", "vary": {"stages.order": [1, 2]}}, "stages.order cannot vary here: `orders` sets it"),
    ],
)
def test_wrong_orders_are_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    recipe = {"name": "r", "base_model": "a/b", "merge": ["magmax"], "stages": {"suite": "cl-standard"}}
    (tmp_path / "s.yml").write_text(yaml.safe_dump({"name": "s", "recipe": recipe, **fields}))
    with pytest.raises(RecipeError) as error:
        study_cells(load_study(tmp_path / "s.yml"))
    assert said in str(error.value)


def test_new_writes_a_stream_of_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local(tmp_path / "stream_new", "trace", [{"prompt": "a", "answer": "b"}])
    monkeypatch.chdir(tmp_path)
    words = ["new", "r.yml", "--base", "a/b", "--suite", "trace", "--data", "stream_new", "--gpus", "0"]
    assert main(words) == 0
    found = load_recipe("r.yml")
    assert [s.name for s in found.stages] == list(stream_orders("trace")[1])
    assert max(map(len, Path("r.yml").read_text().splitlines())) <= 120


def test_other_recipes_are_left_alone() -> None:
    fields = {"stages": [{"name": "a"}]}
    assert with_stream(fields) is fields
