"""The commands, as a user types them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.models import toy_llama, write_jsonl

from hf_contmerge.commands._launch import run_words
from hf_contmerge.commands.main import _parse, main
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe
from hf_contmerge.runtime.quickstart import quickstart_recipe

Data = dict[str, Any]
PACKAGE = Path(sys.modules["hf_contmerge"].__file__ or "").parent
BIN = Path(sys.executable).parent
ENV = {**os.environ, "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Data:
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("base", "expert")):
        toy_llama(home / name, seed=seed)
    rows = [{"text": f"the quick fox sings song {i} of law and code"} for i in range(20)]
    write_jsonl(home / "a.jsonl", rows)
    return {
        "name": "cli",
        "base_model": str(home / "base"),
        "stages": [
            {"name": "law", "dataset": {"path": str(home / "a.jsonl"), "heldout": 3}},
            {"name": "code", "expert": str(home / "expert")},
        ],
        "train": {"max_steps": 2, "per_device_train_batch_size": 1, "max_length": 32, "save_strategy": "no"},
        "merge": ["magmax"],
    }


@pytest.fixture(scope="module")
def run(recipe: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(parse_recipe(recipe), tmp_path_factory.mktemp("cli") / "run")


def shell(*words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], cwd=cwd, env={**ENV, **env}, capture_output=True, text=True)


def test_status_of_a_complete_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run.folder), "--watch"]) == 0  # complete: once
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "complete"
    assert [len(re.findall("✓", line)) for line in lines if "02-code" in line] == [2, 2]


def test_status_of_half_a_run_tells_how_to_go_on(
    recipe: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_recipe(parse_recipe(recipe), tmp_path / "run", until="train")
    assert main(["status", str(run.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == (
        "2 of 10 phases are done; next: score 00-base; at least < 1 s left; score and merge not timed yet"
    )
    resume = f"contmerge run {run.folder}/recipe.yml --run {run.folder}"
    assert lines[-1] == f"unfinished: `{resume}` resumes it"
    assert main([*resume.split()[1:], "--until", "merge"]) == 0
    assert run.merged(2, run.recipe.merge[0]).is_done("merge")


def test_time_left_is_that_of_finished_phases(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Run.load(shutil.copytree(run.folder, tmp_path / "runs" / "halved", symlinks=True))
    place = copy.merged(2, copy.recipe.merge[0])
    place.undo("score")
    place.undo("merge")
    copy.report.undo("report")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["status", "--json"]) == 0  # the only run under runs/
    told = json.loads(capsys.readouterr().out)
    assert (told["done"], told["phases"], told["complete"]) == (7, 10, False)
    assert told["next"] == {"phase": "merge", "stage": 2, "place": "02-code/merges/magmax"}
    scores = [s["seconds"] for s in told["steps"] if s["phase"] == "score" and s["done"]]  # of one task each
    merge = copy.merged(1, copy.recipe.merge[0]).record("merge")["seconds"]
    assert told["seconds_left"] == pytest.approx(merge + sum(scores) / len(scores), abs=0.1)
    assert told["not_timed_yet"] == []
    assert told["resume"] == "contmerge run runs/halved/recipe.yml --run runs/halved"
    assert main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((copy.folder / "report" / "summary.json").read_text())


@pytest.mark.parametrize("command", ["status", "report", "push"])
def test_the_only_run_need_not_be_named(
    command: str, recipe: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command]) == 2
    assert capsys.readouterr().err == (
        "Error: No run is named, and runs/ holds none here. Name the folder that `contmerge run` wrote.\n"
    )
    for name in ("b", "a"):
        Run.open(parse_recipe(recipe), Path("runs", name))
    assert main([command]) == 2
    assert "and runs/ holds several: runs/a, runs/b. Name" in capsys.readouterr().err


def test_facts_as_json(run: Run, recipe: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: object) -> Any:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return json.loads(capsys.readouterr().out)

    assert told("verify", run.folder, "--json")["damaged"] == []
    other = shutil.copytree(run.folder, tmp_path / "other", symlinks=True)
    compared = told("compare", run.folder, other, "--json")
    assert compared["runs"] == {"run": str(run.folder), "other": str(other)}
    assert {row["difference"] for row in compared["differences"]} == {0.0}
    score = told("score", recipe["base_model"], "--run", run.folder, "--json")
    assert score["tasks"]["law_heldout"]["documents"] == 3


def test_commands_in_messages_can_be_copied(run: Run, home_of_states: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a folder's name has spaces and brackets."""
    assert shlex.split(Run.load(home_of_states / "my run [1]").command)[-1] == str(home_of_states / "my run [1]")
    assert (
        main(["merge", "init", str(home_of_states / "my state"), "--rule", "ema", "--base", run.recipe.base_model]) == 0
    )
    command = capsys.readouterr().out.rstrip().split("Next: ")[1]
    assert shlex.split(command) == ["contmerge", "merge", "add", str(home_of_states / "my state"), "EXPERT"]
    assert main(["example", "copy", "finance", str(home_of_states / "my recipes")]) == 0
    command = capsys.readouterr().out.rstrip().split("Next: ")[1]
    assert shlex.split(command) == ["contmerge", "plan", str(home_of_states / "my recipes" / "finance.yml")]


@pytest.fixture
def home_of_states(run: Run, tmp_path: Path) -> Path:
    shutil.copytree(run.folder, tmp_path / "my run [1]", symlinks=True)
    return tmp_path


def test_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    page = run.folder / "report" / "index.html"
    page.unlink()
    assert main(["report", str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert page.is_file()
    assert f"Report:  {page}" in out
    assert f"Picture: {run.folder / 'report' / 'forgetting.png'}" in out
    assert "magmax" in out


def test_run_of_a_complete_run(run: Run, recipe: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cli.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main(["run", str(tmp_path / "cli.yml"), "--run", str(run.folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{run.folder} is complete.\n")


def test_redo(recipe: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_recipe(parse_recipe(recipe), tmp_path / "run", until="merge")
    capsys.readouterr()
    assert main(["redo", str(run.folder), "merge"]) == 0
    merges = {f"dropped merge of stages/{stage}/merges/magmax" for stage in ("01-law", "02-code")}
    assert set(capsys.readouterr().out.splitlines()) == merges
    assert not list(run.folder.rglob("merge.json"))
    assert not list(run.folder.rglob("merged"))
    assert run.expert(1, "base").is_done("train")
    assert main(["redo", str(run.folder), "merge"]) == 0
    assert capsys.readouterr().out == "nothing to drop\n"


def test_redo_of_a_stage_whose_state_is_pruned(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["redo", str(run.folder), "merge", "--stage", "code"]) == 2
    assert capsys.readouterr().err == (
        "Error: The running state after law was pruned for magmax when code was merged. Use "
        f"`contmerge redo {run.folder} merge` to redo all stages.\n"
    )
    assert main(["redo", str(run.folder), "merge", "--stage", "lore"]) == 2
    assert capsys.readouterr().err == "Error: Unknown stage 'lore'. Known: code, law.\n"
    assert run.is_complete()


def test_yaml_is_mergekit_with_our_methods(recipe: Data, tmp_path: Path) -> None:
    pytest.importorskip("hf_contmerge.merging.in_mergekit.plugin")
    models = {"base_model": recipe["base_model"], "models": [{"model": recipe["stages"][1]["expert"]}]}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump({"merge_method": "magmax", **models, "dtype": "float32"}))
    command = (BIN / "contmerge", "yaml", tmp_path / "merge.yml", tmp_path / "out0")
    done = shell(*command, cwd=tmp_path, HF_CONTMERGE_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.raises(SystemExit, match="0"):
        main(["yaml", str(tmp_path / "merge.yml"), str(tmp_path / "out1")])
    assert weights_sha256(tmp_path / "out0") == weights_sha256(tmp_path / "out1")
    models["models"] *= 2
    (tmp_path / "merge.yml").write_text(yaml.safe_dump({"merge_method": "magmax", **models, "dtype": "float32"}))
    done = shell(
        BIN / "contmerge", "yaml", tmp_path / "merge.yml", tmp_path / "out", cwd=tmp_path, HF_CONTMERGE_AUTOLOAD="0"
    )
    assert "is listed twice" in done.stderr  # by our guards, which the command sets up without autoload too


def test_quickstart_recipe_is_the_default() -> None:
    assert load_recipe(quickstart_recipe()).name == "quickstart"


# The script


def test_script_from_another_folder(tmp_path: Path) -> None:
    """Its own folder would come first on sys.path, and our modules would shadow others of the same name."""
    done = shell(sys.executable, PACKAGE / "train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: train.py")


def test_command_is_installed(tmp_path: Path) -> None:
    done = shell(BIN / "contmerge", "status", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: {tmp_path} holds no run")


OURS = re.compile(
    r"(phase \d+ of \d+(, [\w <]+ left)?: )?(train|merge|score) \S+( \.\.\.|: \d+ s)|  batch \d+/\d+, \S+ left|"
    r"  step \d+/\d+: loss \S+(, .*)?|Note: .*|Warning: .*|[\w./-]+ is complete\."
)


@pytest.mark.slow
def test_a_run_prints_our_lines_only(recipe: Data, tmp_path: Path) -> None:
    """Texts, conversations and pairs, with checkpoints of the same second: no library speaks up."""
    write_jsonl(tmp_path / "chat.jsonl", [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"law {i} and code"}]}
        for i in range(20)
    ])  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": f"say {i} law", "chosen": f" law {i} and code", "rejected": " no"} for i in range(20)
    ])  # fmt: skip
    stages = [
        *recipe["stages"],
        {"name": "chat", "dataset": {"path": "chat.jsonl", "heldout": 3}},
        {"name": "pairs", "dataset": {"path": "pairs.jsonl", "heldout": 3}},
    ]
    settings = {**recipe["train"], "save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": True}
    for strategy in ("full", "lora"):
        train = {**settings, "strategy": strategy}
        file = tmp_path / f"{strategy}.yml"
        file.write_text(yaml.safe_dump({**recipe, "name": strategy, "stages": stages, "train": train}))
        done = shell(BIN / "contmerge", "run", file, cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
        assert done.returncode == 0, done.stderr[-2000:]
        lines = done.stderr.splitlines()
        assert len(lines) > 20
        assert [line for line in lines if not OURS.fullmatch(line)] == []


# Ranks that the command starts itself


@pytest.mark.slow
def test_ranks_are_started_by_the_command(recipe: Data, tmp_path: Path) -> None:
    (tmp_path / "cli.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for number, words in enumerate((["--num-processes", "2"], ["--config-file", "cpu2"])):
        started = ("run", "cli.yml", "--run", f"run{number}", "--set", f"seed={number}", *words)
        done = shell(BIN / "contmerge", *started, cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
        assert done.returncode == 0, done.stderr[-2000:]
        run = Run.load(tmp_path / f"run{number}")
        assert run.is_complete()
        assert run.recipe.seed == number
        assert run.expert(1, "base").record("train")["processes"] == 2
        assert [line for line in done.stderr.splitlines() if not OURS.fullmatch(line)] == []
    done = shell(BIN / "contmerge", "run", "no.yml", "--num-processes", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == "Error: Cannot read the recipe no.yml: No such file or directory. Give the path of a YAML file.\n"
    )


def test_ranks_get_the_words_of_the_command() -> None:
    words = ["x.yml", "--run", "r", "--set", "a=1", "--set", "b=2", "--until", "merge", "--plugin", "p.py", "--open"]
    asked = _parse(["run", *words, "--trust-remote-code", "--num-processes", "2"])
    again = _parse(["run", *run_words(asked)])
    assert {**vars(asked), "num_processes": None} == vars(again)
    with pytest.raises(SystemExit):
        _parse(["run", "x.yml", "--num-processes", "0"])


@pytest.mark.slow  # with two ranks: tests/scenarios/test_ranks.py
def test_accelerate_launch(recipe: Data, tmp_path: Path) -> None:
    (tmp_path / "cli.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    launch = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = shell(*launch, PACKAGE / "train.py", "cli.yml", "--run", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Run.load(tmp_path / "run").is_complete()


def test_accelerate_launch_passes_the_exit_code_on(tmp_path: Path) -> None:
    done = shell(BIN / "accelerate", "launch", "--cpu", PACKAGE / "train.py", "no.yml", cwd=tmp_path)
    assert done.returncode != 0
    assert "Error: Cannot read the recipe no.yml: No such file or directory." in done.stderr


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [["example", "list"], ["example", "list", "--json"], ["completion", "bash"]])
def test_a_reader_that_has_ended_is_no_error(words: list[str], buffered: bool) -> None:
    """As `contmerge ... | head` does, at any time: here before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "hf_contmerge.commands.main", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
