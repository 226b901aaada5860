"""The report of a study, on made-up runs."""

import csv
import json
from pathlib import Path

import pytest
from toys.reports import make_run

from hf_contmerge.report.study import findings, load_study_results, write_study_report
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.study import Study, study_cells


def test_general_tasks_of_another_kind_than_the_stages_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages have perplexities; the quiz, a general task, an accuracy."""
    monkeypatch.setattr(Run, "is_complete", lambda _: True)
    fields = {"name": "r", "base_model": "me/base", "merge": ["magmax", "average"],
              "stages": [{"name": f"s{i}", "dataset": "a.jsonl"} for i in (1, 2, 3)],
              "evaluate": {"general_tasks": ["quiz", "prose"]}}  # fmt: skip
    cells = study_cells(Study.model_validate({"name": "s", "recipe": fields, "seeds": [0, 1]}))
    runs = [(cell, make_run(tmp_path / cell.name, merge=["magmax", "average"])) for cell in cells]
    study = load_study_results("s", runs, [0, 1])
    assert study.blocks == ["perplexity", "accuracy"]
    assert study.of_stages == ["perplexity"]
    assert study.reference.mean("perplexity", "acc") is not None
    said = [line for line in findings(study) if ", accuracy: " in line]
    compared = list(study.compared("accuracy"))
    assert [line.name for line in compared] == ["magmax", "average"]
    assert len(said) == 2
    assert all(" on general (" in line and "on last stage" not in line for line in said)

    write_study_report(study, tmp_path / "report")
    with (tmp_path / "report/study.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["block"] == "accuracy"]
    assert len(rows) == 2 * 3
    assert all(row["general_delta"] and not row["acc"] for row in rows)
    found = json.loads((tmp_path / "report/study.json").read_text())["lines"]
    assert {line["block"] for line in found} == {"perplexity", "accuracy"}
    page = (tmp_path / "report/index.html").read_text()
    assert page.count("<svg") == 2
    for line in compared:
        wins = [line.metrics("accuracy")[at]["general_delta"] or 0 for at in line.cells]
        theirs = [study.reference.metrics("accuracy")[at]["general_delta"] or 0 for at in line.cells]
        assert study.better_in(line, "accuracy") == (sum(x > y for x, y in zip(wins, theirs, strict=True)), 2)
