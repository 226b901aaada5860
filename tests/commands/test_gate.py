"""`contmerge gate`: three outcomes, exit codes, JSON, Markdown, the summary of a GitHub job."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys import ROOT
from toys.models import TEXT, perturbed

from hf_contmerge.commands.main import _parse, main
from hf_contmerge.merging.state import MergeState
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.scoring.files import write_choice_task, write_perplexity_task
from hf_contmerge.scoring.forgetting.gate import Gate, GatedTask, judge_tasks
from hf_contmerge.scoring.forgetting.paired import exceeds, paired_change

ROWS = [{"query": f"the {a}", "choices": ["fox", "dog"], "gold": 0} for a in ("quick", "lazy", "red", "brown")]


@pytest.fixture(scope="module")
def models(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gated")
    return {
        "base": base_folder,
        "twin": shutil.copytree(base_folder, folder / "twin"),
        "near": perturbed(base_folder, folder / "near", seed=1, size=1e-5),
        "broken": perturbed(base_folder, folder / "broken", seed=1, size=0.5),
    }


@pytest.fixture
def gate(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Return a function that runs the command, and returns its exit code and JSON."""
    tasks = tmp_path / "gate_tasks"
    tasks.mkdir()
    lines = TEXT.split()
    write_perplexity_task(tasks, "texts", [" ".join(lines[i : i + 6]) for i in range(0, len(lines), 6)])
    write_choice_task(tasks, "choice", ROWS)
    monkeypatch.setenv("HF_CONTMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def gate(candidate: str | Path, *words: str, names: str = "texts") -> tuple[int, dict[str, Any]]:
        out = tmp_path / "gate.json"
        given = str(models.get(str(candidate), candidate))
        command = ["gate", str(models["base"]), given, "--tasks", names, "--include-path", str(tasks), "--cpu"]
        code = main([*command, "--json", str(out), *words])
        return code, json.loads(out.read_text())

    return gate


Run = Callable[..., tuple[int, dict[str, Any]]]


def test_proven_loss(gate: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, facts = gate("broken", "--markdown", str(tmp_path / "gate.md"))
    printed = capsys.readouterr()
    assert (code, facts["verdict"], facts["tasks"]["texts"]["verdict"]) == (3, "proven loss", "proven loss")
    assert facts["tasks"]["texts"]["high"] < -0.01
    assert "texts lost" in printed.out
    assert "at least" in printed.out
    assert printed.err.count("Error: ") == 1
    assert printed.err.endswith("/broken lost more than 0.01 on texts: proven.\n")
    page = (tmp_path / "gate.md").read_text()
    assert page.startswith("## Gate: proven loss\n")
    assert page.count("| texts |") == 1


def test_passes_and_second_time_comes_from_the_cache(gate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = gate("near")
    assert (code, facts["verdict"], facts["same_model"]) == (0, "passes", False)
    assert facts["tasks"]["texts"]["low"] >= -0.01
    assert "Passes: no task lost more than is allowed (95 % confidence)." in capsys.readouterr().out
    assert gate("near")[1] == facts


def test_too_few_documents(gate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Four answers tell nothing about one point; with --strict that is an exit code of its own."""
    code, facts = gate("near", names="choice")
    assert (code, facts["verdict"]) == (0, "undecided")
    assert "Not enough documents to tell" in capsys.readouterr().out
    assert facts["tasks"]["choice"]["documents_to_decide"] > 4
    assert gate("near", "--strict", names="choice")[0] == 4
    assert "The documents do not tell" in capsys.readouterr().err


def test_a_loss_on_one_task_is_a_loss(gate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = gate("broken", names="texts,choice")
    assert (code, facts["verdict"]) == (3, "proven loss")
    out = capsys.readouterr().out
    assert "for all 2 tasks together" in out
    assert out.index("texts lost") < out.index("choice:")


def test_the_same_model_passes_however_few_documents(gate: Run) -> None:
    code, facts = gate("twin", "--strict", names="choice")
    assert (code, facts["verdict"], facts["same_model"]) == (0, "passes", True)


def test_summary_of_a_github_job_is_added_to(gate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("from another step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    gate("broken")
    assert summary.read_text().startswith("from another step\n## Gate: proven loss\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "nowhere" / "x"))
    assert gate("broken")[0] == 2


def test_a_merge_state_is_a_candidate(gate: Run, models: dict[str, Path], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="average").add(models["broken"])
    code, facts = gate(state.folder)
    assert (code, facts["candidate"]) == (3, str(state.folder))


@pytest.mark.parametrize("words", [("--max-loss", "-1"), ("--confidence", "0.5"), ("--confidence", "1"), ("--x",)])
def test_words_that_the_parser_refuses(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gate", "a", "b", "--tasks", "x", *words])
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gate", "--help"])
    assert "3 for a proven loss" in capsys.readouterr().out


# The verdicts, on scores


def scored(gains: list[float]) -> TaskScore:
    share, weights = sum(gains) / len(gains), tuple(1.0 for _ in gains)
    return TaskScore("accuracy", "acc", share, share, None, tuple(gains), weights, {})


def verdict(lost: int, n: int, max_loss: float = 0.01) -> GatedTask:
    (task,) = judge_tasks({"t": scored([1.0] * n)}, {"t": scored([0.0] * lost + [1.0] * (n - lost))}, max_loss)
    return task


@pytest.mark.parametrize(
    ("lost", "n", "wanted"),
    [(0, 50, "undecided"), (0, 1000, "passes"), (2, 100, "undecided"), (50, 1000, "proven loss"), (1, 1, "undecided")],
)
def test_verdicts(lost: int, n: int, wanted: str) -> None:
    assert verdict(lost, n).verdict == wanted


def test_verdict_is_the_guards() -> None:
    """A proven loss is what `exceeds` calls one, for any number of tasks."""
    for lost in range(0, 60, 3):
        for tasks in (1, 4):
            old = {f"t{i}": scored([1.0] * 500) for i in range(tasks)}
            new = {f"t{i}": scored([0.0] * (lost if i == 0 else 0) + [1.0] * (500 - (lost if i == 0 else 0)))
                   for i in range(tasks)}  # fmt: skip
            gate = Gate("a", "b", judge_tasks(old, new, 0.02), 0.02, 0.95)
            changes = [paired_change(new[t].sample, old[t].sample) for t in old]
            assert (gate.verdict == "proven loss") == exceeds(changes, 0.02)


def test_number_of_documents_that_would_decide() -> None:
    """So many documents with the same share of losses do decide; half as many do not."""
    task = verdict(3, 100)
    assert task.enough
    assert verdict(round(3 * task.enough / 100 * 1.3), round(task.enough * 1.3)).verdict == "proven loss"
    assert verdict(round(1.5 * task.enough / 100), task.enough // 2).verdict == "undecided"
    assert verdict(1, 100).enough is None  # as large as what is allowed: no number tells
    assert verdict(50, 1000).enough is None  # decided


# The workflow for other people's repositories


def test_the_action_is_valid_and_its_commands_parse() -> None:
    workflow = yaml.safe_load((ROOT / "docs" / "gate.yml").read_text())
    assert "pull_request" in workflow[True]  # YAML reads `on` as true
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    lines = [line for step in steps for line in step.get("run", "").replace("\\\n", "").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("contmerge ")]
    assert [words[0] for words in commands] == ["gate"]
    assert _parse(commands[0]).max_loss == 0.01
    assert all("uses" in step or "run" in step for step in steps)
    assert any(step.get("env", workflow.get("env", {})).get("HF_CONTMERGE_CACHE") for step in [*steps, workflow])
