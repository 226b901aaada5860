"""`contmerge score`: models of every kind, bad input, the cache, several ranks."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.loras import lora
from toys.models import TEXT

from hf_contmerge.commands.main import main
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.runtime.records import seal_yaml
from hf_contmerge.scoring.files import write_choice_task, write_perplexity_task
from hf_contmerge.scoring.score import score_model

ROWS = [{"query": f"the {a}", "choices": ["fox", "dog"], "gold": 0} for a in ("quick", "lazy", "red", "brown")]
LIGHT = ("torch", "transformers", "lm_eval", "datasets", "pyarrow")
Score = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_perplexity_task(folder, "texts", TEXT.strip().splitlines())
    write_choice_task(folder, "choice", ROWS)
    return folder


@pytest.fixture(scope="module")
def model(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the base that looks as if it had been there for a minute."""
    folder = shutil.copytree(base_folder, tmp_path_factory.mktemp("model") / "base")
    then = time.time() - 60
    for path in folder.iterdir():
        os.utime(path, (then, then))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_CONTMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as --cpu sets it, for good
    return tmp_path / "cache"


@pytest.fixture
def score(tasks: Path, cache: Path, tmp_path: Path) -> Score:
    """Return a function that runs the command and returns what it writes as JSON."""

    def score(model: Path | str, *words: str, names: str = "texts,choice") -> dict[str, Any]:
        out = tmp_path / "out.json"
        command = ["score", str(model), "--tasks", names, "--include-path", str(tasks), "--cpu", "--json", str(out)]
        assert main([*command, *words]) == 0
        return json.loads(out.read_text())

    return score


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Return the message of a command that must end with exit code 2 and one line."""
    assert main(["score", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("Error: ")
    assert message.count("\n") == 1
    return message.removeprefix("Error: ").strip()


def test_scores_are_those_of_score_model(model: Path, tasks: Path, score: Score) -> None:
    found = score(model)["tasks"]
    wanted = score_model(
        model, [Task(name="texts"), Task(name="choice")], task_folder=tasks, evaluate=Evaluate(),
        ranks=OneRank(),
    )[1]  # fmt: skip
    assert {name: task["value"] for name, task in found.items()} == {n: s.value for n, s in wanted.items()}
    assert found["choice"]["value_stderr"] == wanted["choice"].stderr
    assert found["texts"]["value_stderr"] == pytest.approx(wanted["texts"].value * (wanted["texts"].stderr or 0))
    assert (found["texts"]["documents"], found["choice"]["documents"]) == (5, 4)


def test_second_time_comes_from_the_cache(model: Path, score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    first = score(model, names="texts")
    assert not first["tasks"]["texts"]["cached"]
    assert "from the cache" not in capsys.readouterr().out
    second = score(model)  # one task is known, the other is not
    assert [second["tasks"][n]["cached"] for n in ("texts", "choice")] == [True, False]
    assert capsys.readouterr().out.count("from the cache") == 1
    third = score(model)
    assert all(task["cached"] for task in third["tasks"].values())
    assert third["tasks"]["choice"]["value"] == second["tasks"]["choice"]["value"]
    assert score(model, "--limit", "2")["tasks"]["texts"]["documents"] == 2
    again = score(model, "--no-cache")
    assert not any(task["cached"] for task in again["tasks"].values())


def test_answer_from_the_cache_loads_nothing_heavy(model: Path, tasks: Path, score: Score) -> None:
    score(model)
    words = ["score", str(model), "--tasks", "texts,choice", "--include-path", str(tasks), "--cpu"]
    code = (
        "import sys; from hf_contmerge.commands.main import main; code = main(sys.argv[1:]); "
        f"print(code, sorted(set({LIGHT!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.count("from the cache") == 2
    assert done.stdout.splitlines()[-1] == "0 []"


def test_adapter(model: Path, score: Score, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its base is the one that it names, or the one that is given."""
    adapter = lora(model, tmp_path / "adapter", seed=1)
    alone = score(model, names="texts")["tasks"]["texts"]["value"]
    named = score(adapter, names="texts")["tasks"]["texts"]
    assert named["value"] != alone
    assert score(adapter, "--base", str(model), names="texts")["tasks"]["texts"]["cached"]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    capsys.readouterr()
    assert refused(capsys, adapter, "--tasks", "arc_easy") == (
        f"{adapter} is an adapter without a base model in its config. Give --base."
    )


def test_run_gives_tasks_and_settings(model: Path, tasks: Path, cache: Path, tmp_path: Path) -> None:
    """A run's folder as far as it is needed: its recipe and its tasks."""
    run, out = tmp_path / "run", tmp_path / "out.json"
    shutil.copytree(tasks, run / "tasks")
    for path in (run / "tasks").glob("*.yaml"):
        path.write_text(path.read_text().replace(str(tasks), str(run / "tasks")))
    recipe = {
        "name": "x", "base_model": str(model), "stages": [{"name": "a", "expert": str(model), "tasks": ["texts"]}],
        "merge": ["average"],
        "evaluate": {"limit": 3, "general_tasks": [{"name": "choice", "num_fewshot": 1}]},
    }  # fmt: skip
    (run / "recipe.yml").write_text(seal_yaml(yaml.safe_dump(recipe)))
    assert main(["score", str(model), "--run", str(run), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {name: task["documents"] for name, task in found["tasks"].items()} == {"texts": 3, "choice": 3}
    words = ["--tasks", "texts", "--include-path", str(tasks), "--limit", "3"]
    assert main(["score", str(model), *words, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["tasks"]["texts"]["cached"]
    assert main(["score", str(model), *words, "--num-fewshot", "1", "--json", str(out)]) == 0
    assert not json.loads(out.read_text())["tasks"]["texts"]["cached"]


WRONG: dict[str, tuple[Sequence[str], str]] = {
    "no task": ((), "Nothing to measure: give --tasks (one name, or several with commas), or --run."),
    "commas": (("--tasks", ","), "--tasks ',' names no task. Give one name, or several with commas."),
    "a blank": (("--tasks", "a b"), "--tasks: 'a b' is not a task name. Use commas between names, no blanks."),
    "no run": (("--run", "nowhere"), "nowhere holds no run (no recipe.yml)."),
    "no folder of tasks": (("--tasks", "x", "--include-path", "nowhere"), "--include-path nowhere: no such folder."),
    "no folder for JSON": (("--tasks", "x", "--json", "nowhere/x"), "--json nowhere/x: give a file in an existing"),
    "a base of a whole model": (("--tasks", "x", "--base", "y"), " is a whole model; --base is for adapters"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input(
    what: str, model: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    words, start = WRONG[what]
    assert start in refused(capsys, model, *words)
    assert not cache.exists()


def test_unknown_model_and_task(model: Path, tasks: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--include-path", tasks, "--tasks"]
    assert refused(capsys, "no model", *words, "texts").startswith("There is no model at no model.")
    assert refused(capsys, tasks, *words, "texts").startswith(f"{tasks} holds no *.safetensors")


@pytest.mark.slow
def test_misspelt_task(model: Path, tasks: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow, as all tasks of lm-eval are listed to say what may have been meant."""
    message = refused(capsys, model, "--tasks", "tects", "--include-path", tasks)
    assert message.startswith("Unknown task 'tects'.")
    assert "texts" in message


@pytest.mark.parametrize("words", [("--limit", "0"), ("--limit", "x"), ("--dtype", "int8"), ("--batch-size", "-1")])
def test_words_that_the_parser_refuses(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["score", "model", "--tasks", "x", *words])
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks(model: Path, tasks: Path, score: Score, tmp_path: Path) -> None:
    """They measure what one process does; only the first prints and writes."""
    alone = score(model, "--no-cache")
    out = tmp_path / "two.json"
    command = [
        Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2",
        "-m", "hf_contmerge.commands.main", "score", model,
        "--tasks", "texts,choice", "--include-path", tasks, "--cpu", "--json", out,
    ]  # fmt: skip
    for cached in (False, True):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"word_perplexity", done.stdout)) == 1
        found = json.loads(out.read_text())
        for name, task in found["tasks"].items():
            assert task["cached"] == cached
            assert task["value"] == pytest.approx(alone["tasks"][name]["value"], rel=1e-6)
