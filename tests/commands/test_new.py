"""`contmerge new`: the recipe that it writes, for all that can be asked of it."""

import io
import itertools
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toys.models import toy_llama

from hf_contmerge.commands.main import main
from hf_contmerge.commands.new import parse_source
from hf_contmerge.errors import RecipeError
from hf_contmerge.run.recipe.text import load_recipe

BIN = Path(sys.executable).parent
DATA, MODEL = "law=data/law.jsonl", "code=model:me/coder"
STAGES = ([DATA], [MODEL], [DATA, MODEL, "chat=HuggingFaceH4/no_robots"])
ODD = ["a: b.jsonl", "x{y}.jsonl", "yes", "12", "it's #1.jsonl", "ä b.txt", 'q"q.csv', "a\\b"]


@pytest.mark.parametrize(
    ("stages", "gpus", "rules"),
    list(itertools.product(STAGES, (0, 1, 8), ([], ["opcm", "ema"]))),
)
def test_every_combination_can_be_read(
    stages: list[str], gpus: int, rules: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yml"
    flags = [word for flag, values in (("--stage", stages), ("--rule", rules)) for v in values for word in (flag, v)]
    assert main(["new", str(path), "--base", "Qwen/Qwen3-0.6B", *flags, "--gpus", str(gpus)]) == 0
    recipe = load_recipe(path)
    assert (recipe.name, recipe.base_model) == ("mine", "Qwen/Qwen3-0.6B")
    assert [s.name for s in recipe.stages] == [s.partition("=")[0] for s in stages]
    assert [s.expert or (s.dataset and s.dataset.path) for s in recipe.stages] == [
        s.partition("=")[2].removeprefix("model:") for s in stages
    ]
    trained = all(stage.expert is None for stage in recipe.stages)
    assert [m.rule for m in recipe.merge] == (rules or ["blend" if trained else "magmax"])
    if trained and not rules:  # the middle between the base and the last expert needs a chain of experts
        assert recipe.merge[0].start_from == "previous"
        assert recipe.merge[0].parameters == {"keep": 0, "take": 0.5}
    out = capsys.readouterr().out
    assert f"contmerge plan {path}" in out
    assert (f"contmerge run {path} --num-processes 8\n" in out) == (gpus == 8)


def test_the_comments_say_what_to_change(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    assert main(["new", str(path), "--base", "b/c", "--stage", DATA, "--gpus", "0"]) == 0
    lines = path.read_text().splitlines()
    for word in ("strategy:", "max_steps:", "per_device_train_batch_size:", "learning_rate:", "general_tasks:"):
        assert any(word in line and "#" in line for line in lines), word
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 120


@pytest.mark.parametrize(
    "path", ["a: b.jsonl", "x{y}.jsonl", "yes", "12", "it's #1.jsonl", "ä b.txt", 'q"q.csv', "a\\b"]
)
def test_names_that_mean_something_in_yaml(path: str, tmp_path: Path) -> None:
    assert main(["new", str(tmp_path / "1 odd: name.yml"), "--base", path, "--stage", f"no={path}", "--gpus", "0"]) == 0
    recipe = load_recipe(tmp_path / "1 odd: name.yml")
    assert recipe.base_model == path
    assert recipe.stages[0].name == "no"
    assert recipe.stages[0].dataset
    assert recipe.stages[0].dataset.path == path


def test_a_local_model_is_known_without_a_word(tmp_path: Path) -> None:
    toy_llama(tmp_path / "coder", seed=0)
    assert parse_source(f"code={tmp_path / 'coder'}").is_model
    assert not parse_source(f"code={tmp_path}").is_model


def test_a_file_is_overwritten_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("precious")
    words = ["new", str(path), "--base", "b/c", "--stage", DATA, "--gpus", "0"]
    assert main(words) == 2
    assert "mine.yml exists. Choose another file, or overwrite it with --force." in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert main([*words, "--force"]) == 0
    assert load_recipe(path).stages


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "law"], "A stage is NAME=SOURCE"),
        (["--stage", "la w=x"], "stages.0.name"),
        (["--stage", DATA, "--stage", DATA], "two stages are named law"),
        (["--stage", DATA, "--rule", "magmx"], "Did you mean 'magmax'?"),
        (["--stage", DATA, "--gpus", "-1"], "--gpus must be 0 or more"),
    ],
)
def test_wrong_words(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(tmp_path / "x.yml"), "--base", "b/c", "--gpus", "0", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.yml").exists()


def test_nobody_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["new", str(tmp_path / "x.yml"), "--base", "b/c"]) == 2
    assert "needs a terminal for its questions, or flags; missing: --stage." in capsys.readouterr().err


def test_three_questions_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    answers = f"b/c\nlaw\n{DATA}\n{MODEL}\n\ntwo\n0\n"  # two of them wrong
    os.write(ours, answers.encode())
    done = subprocess.run(
        [BIN / "contmerge", "new", "x.yml"], cwd=tmp_path, stdin=theirs, capture_output=True, text=True, timeout=120
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert "A stage is NAME=SOURCE" in done.stdout
    assert [s.name for s in load_recipe(tmp_path / "x.yml").stages] == ["law", "code"]
    assert yaml.safe_load((tmp_path / "x.yml").read_text())["train"]["max_steps"] == 50


def test_the_sources_of_an_error_are_named() -> None:
    with pytest.raises(RecipeError, match="got '=x'"):
        parse_source("=x")


@pytest.mark.parametrize(("gpus", "limit"), [(0, 200), (1, None)])
def test_general_abilities_are_measured_by_default(gpus: int, limit: int | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    assert main(["new", str(path), "--base", "b/c", "--stage", DATA, "--gpus", str(gpus)]) == 0
    evaluate = load_recipe(path).evaluate
    assert [task.name for task in evaluate.general_tasks] == ["arc_easy", "hellaswag", "piqa"]
    assert evaluate.limit == limit


@pytest.mark.parametrize("base", ["meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B@main", "models/Llama-3.2-3B/"])
def test_experts_of_mergebench_are_a_stream(base: str, tmp_path: Path) -> None:
    path = tmp_path / "experts.yml"
    assert main(["new", str(path), "--base", base, "--suite", "mergebench", "--gpus", "1"]) == 0
    recipe = load_recipe(path)
    assert [s.expert for s in recipe.stages] == [
        f"MergeBench/Llama-3.2-3B_{name}" for name in ("instruction", "math", "coding", "safety", "multilingual")
    ]
    assert [len(s.tasks) for s in recipe.stages] == [1, 1, 0, 0, 12]
    assert [m.rule for m in recipe.merge] == ["average", "task_arithmetic", "ties"]
    assert "unused: all stages are trained" in path.read_text()
