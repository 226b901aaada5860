"""The report of a study, on made-up runs."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toys.reports import change_scores, make_run

from hf_contmerge.report.study import StudyResults, findings, load_study_results, write_study_report
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.study import Study, StudyCell, study_cells
from hf_contmerge.run.scores import TaskScore


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


def toy_study(
    folder: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[StudyCell, Run], None] = lambda *_: None,
    seeds: int = 2, **fields: Any,
) -> StudyResults:  # fmt: skip
    """Return a study of made-up runs."""
    monkeypatch.setattr(Run, "is_complete", lambda _: True)
    recipe = {"name": "r", "base_model": "me/base", "merge": ["magmax", "average"],
              "stages": [{"name": f"s{i}", "dataset": "a.jsonl"} for i in (1, 2, 3)],
              "evaluate": {"general_tasks": ["quiz", "prose"]}}  # fmt: skip
    cells = study_cells(Study.model_validate({"name": "s", "recipe": recipe, "seeds": list(range(seeds)), **fields}))
    runs = [(cell, make_run(folder / cell.name, merge=["magmax", "average"])) for cell in cells]
    for cell, run in runs:
        edit(cell, run)
    return load_study_results("s", runs, range(seeds))


def test_each_task_has_its_own_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out texts of each seed do not take the variation of the quiz's documents from its interval."""

    def redraw(cell: StudyCell, run: Run) -> None:
        for _, place in run.places() if cell.seed else ():
            if place.is_done("score"):
                change_scores(place, lambda name, s: _redrawn(s) if name.endswith("_heldout") else s)

    drawn = toy_study(tmp_path, monkeypatch, edit=redraw)
    [line] = [x for x in drawn.compared("accuracy") if x.name == "magmax"]
    results, mine = line.cells[1, 0]
    alone = results.change(mine.rows[-1], drawn.reference.cells[1, 0][1].rows[-1], ["quiz"], "accuracy")
    both = drawn.change(line, "accuracy", "general")
    assert alone
    assert both
    assert alone.low is not None
    assert (both.mean, both.low, both.high) == pytest.approx((alone.mean, alone.low, alone.high))
    texts = drawn.change(line, "perplexity", "all stages")
    assert texts
    assert texts.low is not None
    assert texts.low < texts.mean


def _redrawn(score: TaskScore) -> TaskScore:
    """Return the score on other documents, as another seed draws them."""
    return replace(score, gains=tuple(1.5 * g for g in score.gains), weights=tuple(1.5 * w for w in score.weights))
