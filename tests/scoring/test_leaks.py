"""Tasks that score what a stage of the same recipe is trained on, as a run notes them before it starts."""

import logging
from pathlib import Path
from typing import Any

import pytest
from toys.models import write_jsonl

from hf_contmerge.loop.plan.checks import Circumstances, Prepared, checks_of_data
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe

Row = dict[str, Any]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    for split, count in (("train", 12), ("test", 6)):
        rows = [
            {"text": f"{split} {i}: \u2028 the court", "query": f"{split} {i}?", "gold": "yes"} for i in range(count)
        ]
        write_jsonl(tmp_path / "folder" / f"{split}.jsonl", rows)
    write_jsonl(tmp_path / "copy.jsonl", [{"text": f"train {i}: \u2028 the court"} for i in range(9)])
    write_jsonl(tmp_path / "code.jsonl", [{"text": f"def f{i}(): ..."} for i in range(9)])
    return tmp_path


def notes(
    home: Path, base: Path, caplog: pytest.LogCaptureFixture, *, stages: list[Row], tasks: list[Row]
) -> list[str]:
    """Return what is noted of a recipe, with HOME for the folder of its data."""
    fields = {
        "name": "x", "base_model": str(base), "merge": ["average"], "evaluate": {"general_tasks": tasks},
        "stages": [{**stage, "dataset": {"heldout": 2, **stage["dataset"]}} for stage in stages],
    }  # fmt: skip
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        run = Run(home / "run", parse_recipe(fields))
        for check in checks_of_data(run.recipe, Prepared(base), Circumstances(run.tasks)):
            check()
    return [message.replace(str(home), "HOME") for message in caplog.messages]


def exam(path: Path, kind: str = "exact_match", **dataset: Any) -> Row:
    return {"name": "exam", "kind": kind, "dataset": {"path": str(path), **dataset}}


def test_a_task_may_score_another_split_of_a_stages_dataset(
    home: Path, base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = [{"name": "law", "dataset": {"path": str(home / "folder"), "text": "text"}}]
    same = (
        "Task exam scores the split train of HOME/folder, on which stage law is trained: it measures what was "
        "memorised. Score another split, `dataset: {path: HOME/folder, split: ...}`, or another dataset."
    )
    for kind in ("exact_match", "perplexity"):
        more = {"text": "text"} if kind == "perplexity" else {}
        ask = {"home": home, "base": base_folder, "caplog": caplog, "stages": stages}
        assert notes(**ask, tasks=[exam(home / "folder", kind, **more)]) == [same]
        assert notes(**ask, tasks=[exam(home / "folder", kind, split="test", **more)]) == []
        assert notes(**ask, tasks=[exam(home / "folder", kind, split="train[:3]", **more)])[0].startswith(
            "Task exam scores"
        )
    task = (home / "run" / "tasks" / "exam.jsonl").read_text(encoding="utf-8")
    assert "train 1" in task
    assert "test" not in task


def test_slices_of_one_split(home: Path, base_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of two different slices it is not known, by their names, whether they overlap."""
    stages = [{"name": "law", "dataset": {"path": str(home / "folder"), "text": "text", "split": "train[:6]"}}]
    for split, noted in (("train[6:]", 0), ("train[:6]", 1), ("train", 1)):
        found = notes(home, base_folder, caplog, stages=stages, tasks=[exam(home / "folder", split=split)])
        assert len(found) == noted, split


def test_documents_that_stand_in_a_stages_texts(
    home: Path, base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a copy of the file, in a part of a mix, and in the held-out texts of another stage; cut where those are."""
    stages: list[Row] = [{"name": "law", "dataset": {"path": str(home / "folder"), "text": "text", "heldout": 0}}]
    wanted = (
        "Stage {} is trained on {} of the {} documents that task {} scores: of these, it measures what was memorised. "
        "Remove them from one of the two datasets."
    )
    tasks = [exam(home / "copy.jsonl", "perplexity", heldout=4, heldout_chars=7)]
    assert notes(home, base_folder, caplog, stages=stages, tasks=tasks) == [wanted.format("law", 4, 4, "exam")]
    mix = [{"path": str(home / "code.jsonl"), "share": 0.5}, {"path": str(home / "copy.jsonl"), "share": 0.5}]
    both = [
        {"name": "mixed", "dataset": {"mix": mix, "heldout": 0}},
        {"name": "copy", "dataset": {"path": mix[1]["path"]}},
    ]
    assert notes(home, base_folder, caplog, stages=both, tasks=[]) == [wanted.format("mixed", 2, 2, "copy_heldout")]
    own = [exam(home / "copy.jsonl", text="text")]
    assert notes(home, base_folder, caplog, stages=both[:1], tasks=[{**own[0], "kind": "perplexity"}]) == [
        "Task exam scores the split train of HOME/copy.jsonl, on which stage mixed is trained: it measures what was "
        "memorised. Score another split, `dataset: {path: HOME/copy.jsonl, split: ...}`, or another dataset."
    ]
