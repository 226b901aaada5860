"""`contmerge study`, as its users run it, on toys."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from toys.models import TEXT, toy_llama, write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.streams import stream_orders, stream_stages
from hf_contmerge.run.recipe.study import Study, study_cells
from hf_contmerge.run.scores import load_scores

STAGES = ("study_law", "study_code")
STUDY = {"name": "toys", "recipe": "recipe.yml", "orders": [STAGES, STAGES[::-1]], "seeds": [0, 1]}


def study_home(home: Path, **fields: Any) -> Path:
    """Write a study of two orders and two seeds; return its file."""
    toy_llama(home / "base", seed=0)
    dice, words = random.Random(0), TEXT.split()
    for i, name in enumerate(STAGES):
        rows = [{"text": " ".join(dice.choices(words[i::2], k=14))} for _ in range(24)]
        write_jsonl(home / f"{name}.jsonl", rows)
    recipe = {
        "name": "r", "base_model": str(home / "base"), "merge": [{"rule": "average", "start_from": "base"}],
        "stages": [{"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 6}} for n in STAGES],
        "train": {"max_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4, "report_to": "none"},
        "evaluate": {"batch_size": 8, "cache": False},
    }  # fmt: skip
    (home / "recipe.yml").write_text(yaml.safe_dump(recipe))
    (home / "study.yml").write_text(yaml.safe_dump({**json.loads(json.dumps(STUDY)), **fields}))
    return home / "study.yml"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    home = tmp_path_factory.mktemp("study")
    assert main(["study", str(study_home(home)), "--out", str(home / "out")]) == 0
    return home


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(folder.glob("runs/*/stages/*/experts/*/train.json"))]


@pytest.mark.slow
def test_equal_experts_are_trained_once(done: Path) -> None:
    found = records(done / "out")
    assert len(found) == 8
    assert sum("shared" not in record for record in found) == 4
    assert len({record["model_sha256"] for record in found}) == 4
    assert len(list((done / "out/experts").iterdir())) == 4
    inodes = {p.stat().st_ino for p in (done / "out").rglob("expert/model.safetensors")}
    assert len(inodes) == 4


@pytest.mark.slow
def test_scores_alone_are_kept(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The findings are those of a study that keeps all, and every run passes the check of its files."""
    fields = yaml.safe_load((done / "study.yml").read_text())
    (tmp_path / "lean.yml").write_text(yaml.safe_dump({**fields, "recipe": str(done / "recipe.yml"), "keep": "scores"}))
    command = ["study", str(tmp_path / "lean.yml"), "--out", str(tmp_path / "lean")]
    assert main([*command, "--part", "1/4"]) == 0
    first = Run.load(tmp_path / "lean/runs/plain_order-1_seed-0")
    assert not list(first.folder.glob("stages/*/merges/**/*.safetensors"))
    assert list(first.folder.rglob("expert/model.safetensors"))  # for the other runs
    assert main(["redo", str(first.folder), "merge"]) == main(["run", str(first.folder / "recipe.yml"), "--run",
        str(first.folder)]) == 0  # fmt: skip
    assert main(command) == 0
    assert not list((tmp_path / "lean").rglob("*.safetensors"))
    wanted, found = (json.loads((f / "report/study.json").read_text()) for f in (done / "out", tmp_path / "lean"))
    assert found["findings"] == wanted["findings"]
    assert main(command) == 0
    for run in (tmp_path / "lean/runs").iterdir():
        assert main(["verify", str(run)]) == 0
    assert main(["push", str(first.folder), "--repo-id", "me/x"]) == 2
    assert "went missing" in capsys.readouterr().err
    (first.folder / "released.json").unlink()
    assert main(["verify", str(first.folder)]) != 0
    assert "is missing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_is_the_run_that_it_stands_for(done: Path, tmp_path: Path) -> None:
    cell = Run.load(done / "out/runs/plain_order-2_seed-1")
    assert cell.is_complete()
    assert [s.name for s in cell.recipe.stages] == list(STAGES[::-1])
    assert main(["run", str(cell.folder / "recipe.yml"), "--run", str(tmp_path / "run")]) == 0
    alone = Run.load(tmp_path / "run")
    for run in (cell, alone):
        assert run.merged(2, run.recipe.merge[0]).model.is_dir()
    entry = cell.recipe.merge[0]
    assert weights_sha256(cell.merged(2, entry).model) == weights_sha256(alone.merged(2, entry).model)


@pytest.mark.slow
def test_a_cell_of_a_published_stream_runs_from_local_files(tmp_path: Path) -> None:
    """The last order of cl-standard, with both baselines, from files of a few rows."""
    toy_llama(tmp_path / "base", seed=0)
    for stage in stream_stages("cl-standard"):
        (tmp_path / "cl_files" / stage.name).mkdir(parents=True)
        rows = [{"text": f"Text: a goal {i}", "label": stage.words[i % 2]} for i in range(6)]
        for split in ("train", "test"):
            write_jsonl(tmp_path / "cl_files" / stage.name / f"{split}.jsonl", rows[split == "test" :: 2])
    recipe = {
        "name": "r", "base_model": str(tmp_path / "base"), "merge": [{"rule": "average", "start_from": "base"}],
        "stages": {"suite": "cl-standard", "data": str(tmp_path / "cl_files"), "test_examples": 2},
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 64, "report_to": "none"},
        "evaluate": {"batch_size": 8, "shots": 1}, "baselines": ["joint", "in_context"],
    }  # fmt: skip
    cell = study_cells(Study.model_validate({"name": "s", "recipe": recipe, "orders": "cl-standard"}))[-1]
    run = run_recipe(cell.recipe, tmp_path / "run", until="score")
    assert tuple(stage.name for stage in run.recipe.stages) == stream_orders("cl-standard")[3]
    tasks = {f"{stage.name}_class" for stage in run.recipe.stages}
    assert tasks == set(load_scores(run.joint)) == set(load_scores(run.baseline("in_context")))


def test_report(done: Path) -> None:
    report = done / "out/report"
    assert {p.name for p in report.iterdir()} == {
        "index.html", "study.md", "study.tex", "study.csv", "study.json", "study.png",
    }  # fmt: skip
    found = json.loads((report / "study.json").read_text())
    assert found["reference"] == "plain: average"
    assert len((report / "study.csv").read_text().splitlines()) == 1 + 4
    tex = (report / "study.tex").read_text()
    assert r"\begin{tabular}{lrrrrr}" in tex
    assert "&amp;" not in tex
    [line] = found["lines"]
    utilities = [
        json.loads((run / "report/summary.json").read_text())["merges"]["average"]["metrics"]["perplexity"]["acc"]
        for run in (done / "out/runs").iterdir()
    ]
    assert line["mean"]["acc"] == pytest.approx(sum(utilities) / 4)


def test_a_finished_study_answers_at_once(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (done / "out").rglob("*") if p.is_file()}
    assert main(["study", str(done / "study.yml"), "--out", str(done / "out")]) == 0
    assert "out is complete." in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (done / "out").rglob("*") if p.is_file()}


def test_a_report_that_is_removed_or_damaged_is_written_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, report = ["study", str(done / "study.yml"), "--out", str(done / "out")], done / "out/report"
    before = (report / "study.md").read_bytes()
    (report / "study.json").write_text("{}")
    assert main(words) == 2
    assert f"Remove {report}, and give the command again." in capsys.readouterr().err
    shutil.rmtree(report)
    assert main(words) == 0
    assert (report / "study.md").read_bytes() == before


@pytest.mark.slow
def test_another_seed_only_adds_its_cells(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "out", tmp_path / "out")
    more = {**json.loads(json.dumps(STUDY)), "seeds": [0, 1, 2], "recipe": str(done / "recipe.yml")}
    (tmp_path / "more.yml").write_text(yaml.safe_dump(more))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/runs").rglob("*.json")}
    assert main(["study", str(tmp_path / "more.yml"), "--out", str(tmp_path / "out"), "--part", "3/3"]) == 0
    assert len(records(tmp_path / "out")) == 12
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slurm", "-3"], "must be a whole number from 1 on; got '-3'"),
        (["--slurm", "0"], "must be a whole number from 1 on; got '0'"),
        (["--jobs", "0"], "must be a whole number from 1 on; got '0'"),
        (["--jobs", "2", "--part", "1/2"], "Argument --part: not allowed with argument --jobs"),
        (["--plan", "--slurm", "2"], "Argument --slurm: not allowed with argument --plan"),
    ],
)
def test_numbers_and_pairs_of_options_that_cannot_be(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["study", "s.yml", *words])
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_parts_cover_the_grid_and_report_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(study_home(tmp_path, seeds=[0]))
    assert main(["study", study, "--out", str(tmp_path / "out"), "--part", "2/2"]) == 0
    assert "1 of 2 runs" in capsys.readouterr().out
    assert not (tmp_path / "out/report").exists()
    assert main(["study", study, "--out", str(tmp_path / "out"), "--part", "2/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cells": 2, "left": ["plain_order-1_seed-0"]}
    assert main(["study", study, "--out", str(tmp_path / "out"), "--part", "1/2"]) == 0
    assert (tmp_path / "out/report/index.html").is_file()
    for part in ("0/2", "3/2", "x"):
        assert main(["study", study, "--out", str(tmp_path / "out"), "--part", part]) == 2


@pytest.mark.slow
def test_a_training_that_another_run_has_done_leaves_no_checkpoints(done: Path, tmp_path: Path) -> None:
    """It was stopped halfway; meanwhile, a run of another part trained the same expert."""
    shutil.copytree(done / "out", tmp_path / "out", symlinks=True)
    run = Run.load(tmp_path / "out/runs/plain_order-2_seed-1")
    assert main(["redo", str(run.folder), "train"]) == 0
    stopped = run.expert(1, "base").checkpoints / "checkpoint-1"
    stopped.mkdir(parents=True)
    (stopped / "optimizer.pt").write_bytes(b"half")
    assert main(["study", str(done / "study.yml"), "--out", str(tmp_path / "out")]) == 0
    assert run.expert(1, "base").record("train")["shared"]
    assert not list(run.folder.rglob("checkpoints"))


@pytest.mark.slow
def test_a_cell_that_stops_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Something lies in the place of one; one sentence says so, the others are done."""
    study, runs = str(study_home(tmp_path)), tmp_path / "out/runs"
    (runs / "plain_order-2_seed-0").mkdir(parents=True)
    (runs / "plain_order-2_seed-0/note.txt").write_text("mine")
    assert main(["study", study, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "1 of 4 cells" in said
    assert "plain_order-2_seed-0 is not empty and holds no run" in said
    assert "Traceback" not in said
    assert "take the settings of those that will stop again out of the study's file" in said
    assert all(Run.load(runs / f"plain_order-{n}_seed-{s}").is_complete() for n, s in ((1, 0), (1, 1), (2, 1)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"settings": [{"name": "good", "set": {}}, {"name": "bad", "set": {"evaluate.general_tasks": ["no_such"]}}]},
         "setting bad: Unknown task 'no_such'"),
        ({"settings": [{"name": "good", "set": {}}, {"name": "bad", "set": {"base_model": "missing"}}]},
         "setting bad: There is no model"),
        ({"vary": {"stages.0.dataset.heldout": [5, 6]}},
         "setting heldout-6: The task study_law_heldout has other documents than in setting heldout-5"),
        ({"reference": "fine tuning alone"},
         "Unknown line 'fine tuning alone' in `reference`. Known: average, plain: average"),
    ],
)  # fmt: skip
def test_all_settings_are_checked_before_the_first_run(
    fields: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = str(study_home(tmp_path, seeds=[0], **fields))
    for words in ([], ["--plan"]):
        assert main(["study", study, "--out", str(tmp_path / "out"), *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_changed_data_are_not_mixed_with_the_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = str(study_home(tmp_path, seeds=[0])), tmp_path / "out"
    assert main(["study", study, "--out", str(out), "--part", "1/2"]) == 0
    capsys.readouterr()
    file = tmp_path / f"{STAGES[1]}.jsonl"
    before = file.read_text()
    file.write_text(before.replace("a", "o"))
    for words in ([], ["--plan"]):
        assert main(["study", study, "--out", str(out), *words]) == 2
        told = capsys.readouterr().err
        assert f"The data of stage {STAGES[1]} have changed since {out / 'runs/plain_order-1_seed-0'} was made" in told
    assert not (out / "runs/plain_order-2_seed-0").exists()
    (out / "runs/plain_order-1_seed-0/report.json").unlink()  # as if it had been stopped
    assert main(["study", study, "--out", str(out)]) == 2
    assert "have changed since" in capsys.readouterr().err
    file.write_text(before)
    assert main(["study", study, "--out", str(out)]) == 0


@pytest.mark.slow
def test_changed_models_are_not_mixed_with_the_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = str(study_home(tmp_path, seeds=[0], orders="all")), tmp_path / "out"
    recipe = yaml.safe_load((tmp_path / "recipe.yml").read_text())
    recipe["stages"][1] = {"name": "given", "expert": str(toy_llama(tmp_path / "given", seed=7))}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert main(["study", study, "--out", str(out), "--part", "1/2"]) == 0
    first = out / "runs/plain_order-1_seed-0"
    for name, what in (("base", "base model"), ("given", "expert")):
        weights = tmp_path / name / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        for words in ([], ["--plan"]):
            capsys.readouterr()
            assert main(["study", study, "--out", str(out), *words]) == 2
            assert f"The {what} {tmp_path / name} has changed since {first} was made" in capsys.readouterr().err
        weights.write_bytes(before)
    assert not (out / "runs/plain_order-2_seed-0").exists()
    assert main(["study", study, "--out", str(out)]) == 0


@pytest.mark.slow
def test_the_report_follows_its_runs(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(done / "out", tmp_path / "out", symlinks=True)
    words, run = ["study", str(done / "study.yml"), "--out", str(tmp_path / "out")], tmp_path / "out/runs"
    first, table = str(run / "plain_order-1_seed-0"), tmp_path / "out/report/study.csv"
    table.write_text("old")
    assert main(words) == 0
    assert table.read_text() == "old"  # the runs are those that it was written of
    assert main(["redo", first, "score"]) == main(["run", f"{first}/recipe.yml", "--run", first]) == 0
    capsys.readouterr()
    assert main(words) == 0
    assert "is complete" not in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == 1 + 4
    assert main(words) == 0
    assert "is complete" in capsys.readouterr().out


@pytest.mark.slow
def test_two_jobs_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = str(study_home(tmp_path, seeds=[0]))
    assert main(["study", study, "--out", str(tmp_path / "out"), "--jobs", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["study"] == "toys"
    assert (tmp_path / "out/report/index.html").is_file()
    assert sum("shared" not in record for record in records(tmp_path / "out")) == 2


@pytest.mark.slow
def test_jobs_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    """A scheduler's SIGTERM reaches the command alone; jobs that went on would keep the runs."""
    words = ["study", str(study_home(tmp_path, seeds=[0])), "--out", str(tmp_path / "out"), "--jobs", "2"]
    command = subprocess.Popen([sys.executable, "-m", "hf_contmerge.commands.main", *words])
    jobs = list[psutil.Process]()
    until = time.monotonic() + 120
    while len(jobs) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        jobs = psutil.Process(command.pid).children()
    command.terminate()
    assert command.wait(120) == 128 + signal.SIGTERM
    assert len(jobs) == 2
    assert not [job for job in jobs if job.is_running()]


def test_plan_counts_shared_training_once(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(done / "study.yml"), "--out", str(done / "planned"), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "4 runs; 4 trainings instead of 8" in said
    assert not (done / "planned").exists()


def test_plan_counts_what_is_left(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One cell is missing and one has lost its scores; all experts are there."""
    shutil.copytree(done / "out", tmp_path / "out", symlinks=True)
    runs, words = tmp_path / "out/runs", ["study", str(done / "study.yml"), "--out", str(tmp_path / "out"), "--plan"]
    shutil.rmtree(runs / "plain_order-2_seed-1")
    assert main(["redo", str(runs / "plain_order-1_seed-0"), "score"]) == 0
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["left"], found["trainings"], found["trained"]) == (2, 2, 0)
    assert found["seconds"]["train"] == 0
    assert found["disk_bytes"] > 0
    assert main(["redo", str(runs / "plain_order-1_seed-0"), "train"]) == 0
    shutil.rmtree(runs / "plain_order-2_seed-0")  # the other run with these experts
    assert main(words) == 0
    assert "3 of 4 runs are left; 2 trainings instead of 6" in capsys.readouterr().out


def test_plan_trains_no_given_expert(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load((done / "recipe.yml").read_text())
    recipe["stages"][1] = {"name": "given", "expert": str(toy_llama(tmp_path / "given", seed=7))}
    (tmp_path / "s.yml").write_text(yaml.safe_dump({"name": "s", "recipe": recipe, "orders": "all"}))
    assert main(["study", str(tmp_path / "s.yml"), "--out", str(tmp_path / "out"), "--plan"]) == 0
    assert "2 runs; 1 training instead of 2" in capsys.readouterr().out


def test_plan_counts_equal_experts_as_a_study_trains_them(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first stage's expert is another one where it keeps examples; what each stage sets itself does not vary."""
    study = yaml.safe_load((done / "study.yml").read_text()) | {"seeds": [0]}
    command = ["study", str(done / "more.yml"), "--out", str(done / "planned"), "--plan"]
    (done / "more.yml").write_text(yaml.safe_dump(study | {"vary": {"train.strategy": [["full", "replay"]]}}))
    assert main(command) == 0
    assert "2 runs; 4 trainings" in capsys.readouterr().out
    recipe = yaml.safe_load((done / "recipe.yml").read_text())
    for stage in recipe["stages"]:
        stage["train"] = {"learning_rate": 0.02}
    varied = {"recipe": recipe, "vary": {"train.learning_rate": [0.01, 0.03]}}
    (done / "more.yml").write_text(yaml.safe_dump(study | varied))
    assert main(command) == 0
    assert "4 runs; 2 trainings instead of 8" in capsys.readouterr().out


def test_plan_says_once_what_settings_share(
    done: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    study = yaml.safe_load((done / "study.yml").read_text()) | {"vary": {"train.learning_rate": [0.01, 0.02]}}
    for name in STAGES:
        rows = [json.loads(line) | {"number": 1} for line in (done / f"{name}.jsonl").read_text().splitlines()]
        write_jsonl(done / f"{name}_numbered.jsonl", rows)
    recipe = yaml.safe_load((done / "recipe.yml").read_text())
    for stage in recipe["stages"]:
        stage["dataset"]["path"] = str(done / f"{stage['name']}_numbered.jsonl")
    (done / "numbered.yml").write_text(yaml.safe_dump(recipe))
    (done / "two.yml").write_text(yaml.safe_dump(study | {"recipe": "numbered.yml"}))
    assert main(["study", str(done / "two.yml"), "--out", str(done / "planned"), "--plan"]) == 0
    assert "8 runs; 8 trainings instead of 16" in capsys.readouterr().out
    said = [line for line in caplog.messages if "columns are not used" in line]
    assert len(said) == len(set(said)) == 2


def test_slurm_script(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(done / "study.yml"), "--slurm", "9"]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=1-4\n" in said
    assert f'contmerge study {done / "study.yml"} --part "$SLURM_ARRAY_TASK_ID/4"' in said
