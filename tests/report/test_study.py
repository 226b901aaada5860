"""The report of a study, on made-up runs."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toys.reports import change_scores, make_run

from hf_contmerge.errors import RunError
from hf_contmerge.report.study import StudyResults, findings, load_study_results, print_study, write_study_report
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.study import Study, StudyCell, study_cells
from hf_contmerge.run.scores import TaskScore, load_scores, write_scores


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


CHANCES = {"chance": 0.0, "chance_variance": 0.0}


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


def drop_tasks(*names: str) -> Callable[[StudyCell, Run], None]:
    """Return an edit that takes the scores of tasks (or their endings) out of a run."""

    def edit(_: StudyCell, run: Run) -> None:
        for _, place in run.places():
            if place.is_done("score"):
                kept = {k: v for k, v in load_scores(place).items() if not k.endswith(names)}
                place.finish("score", {"tasks": write_scores(place, kept)})

    return edit


def test_a_line_that_the_reference_cannot_be_compared_with_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting of the reference has no general tasks of accuracy."""

    def edit(cell: StudyCell, run: Run) -> None:
        if cell.setting == "y":
            drop_tasks("quiz")(cell, run)

    settings = [{"name": name, "set": {"train.max_steps": steps}} for name, steps in (("x", 1), ("y", 2))]
    study = toy_study(tmp_path, monkeypatch, edit, settings=settings)
    study = replace(study, asked="y: fine-tuning alone")
    said = [line for line in findings(study) if line.startswith("x: magmax, accuracy: ")]
    assert said == ["x: magmax, accuracy: not compared, because y: fine-tuning alone was not measured on the same."]
    [line] = [x for x in study.compared("accuracy") if x.title == "x: magmax"]
    assert study.better_in(line, "accuracy") == (0, 0)
    write_study_report(study, tmp_path / "report")
    page = (tmp_path / "report/study.md").read_text()
    assert "| x: magmax | – | – | – | – | – |" in page


def test_a_study_of_general_tasks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = toy_study(tmp_path, monkeypatch, drop_tasks("_heldout"))
    assert study.of_stages == []
    assert study.blocks == ["perplexity", "accuracy"]
    assert study.reference.title == "plain: fine-tuning alone"
    asked = replace(study, asked="plain: average")
    assert asked.reference.title == "plain: average"
    write_study_report(study, tmp_path / "report")
    assert "better in" in (tmp_path / "report/study.md").read_text()


def test_a_study_without_any_measurement_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = toy_study(tmp_path, monkeypatch, drop_tasks("_heldout", "quiz", "prose"))
    assert study.blocks == []
    [said] = findings(study)
    assert said.startswith("2 runs: ")
    assert "Nothing was measured" in said
    write_study_report(study, tmp_path / "report")
    found = json.loads((tmp_path / "report/study.json").read_text())
    assert (found["reference"], found["lines"]) == (None, [])
    assert "## Costs" in (tmp_path / "report/study.md").read_text()
    print_study(study)
    with pytest.raises(RunError, match=r"has no reference\. Nothing was measured"):
        _ = study.reference


def test_the_literatures_table_has_metrics_intervals_and_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chances(_: StudyCell, run: Run) -> None:
        for _, place in run.places():
            if place.is_done("score"):
                change_scores(place, lambda _, s: replace(s, details=CHANCES) if s.block == "accuracy" else s)

    study = toy_study(tmp_path, monkeypatch, chances)
    write_study_report(study, tmp_path / "report")
    page, tex = ((tmp_path / "report" / name).read_text() for name in ("study.md", "study.tex"))
    costs = "| seconds | peak memory |"
    assert f"| line | AA | BWT | FWT | general Δ {costs}" in page
    assert f"| line | AA | BWT | FWT | general Δ | general right → wrong | general wrong → right {costs}" in page
    assert r"general $\Delta$ & general right $\to$ wrong" in tex
    with (tmp_path / "report/study.csv").open(newline="") as file:
        rows = {(row["line"], row["block"], row["seed"]): row for row in csv.DictReader(file)}
    plain = rows["fine-tuning alone", "perplexity", "0"]
    assert (plain["seconds"], plain["peak_memory_bytes"]) == ("270.0", str(3 * 2**30))
    assert float(rows["magmax", "accuracy", "1"]["seconds"]) == 270.0 + 3 * 2.0
    found = {
        (line["line"], line["block"]): line
        for line in json.loads((tmp_path / "report/study.json").read_text())["lines"]
    }
    one = found["plain: magmax", "perplexity"]
    for metric in ("acc", "bwt", "general_delta"):
        limits = one["intervals"][metric]
        assert limits["low"] < limits["mean"] < limits["high"]
        assert limits["mean"] == pytest.approx(one["mean"][metric])
    assert one["intervals"]["fwt"] is None
    assert "seen" not in one["intervals"]["acc"]  # a level is no change
    assert one["intervals"]["bwt"]["seen"]
    quiz = found["plain: magmax", "accuracy"]["intervals"]["general_lost"]
    assert -1 <= quiz["low"] <= quiz["mean"] <= quiz["high"] <= 0
    assert (one["seconds"], one["peak_memory_bytes"]) == (276.0, 3 * 2**30)


def test_shares_of_a_gain_are_quotients_of_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that gains little in one cell makes that cell's share large, not the study's."""

    def edit(cell: StudyCell, run: Run) -> None:
        if cell.seed:
            for t in run.stage_numbers():
                change_scores(run.expert(t, "base"), lambda _, s: s if s.block == "accuracy" else _lifted(s, -0.79))

    study = toy_study(tmp_path, monkeypatch, edit)
    [line] = [x for x in study.lines if x.name == "magmax"]
    parts = [x.fractions(r.stages, r.general_tasks, "perplexity")["normalised"] for r, x in line.cells.values()]
    (kept, gain), (kept2, gain2) = (part for part in parts if part)
    each = [found["normalised"] for found in line.metrics("perplexity").values()]
    assert each == pytest.approx([kept / gain, kept2 / gain2])
    assert line.mean("perplexity", "normalised") == pytest.approx((kept + kept2) / (gain + gain2))
    assert line.mean("perplexity", "joint_kept") is None


def _lifted(score: TaskScore, by: float) -> TaskScore:
    gains = tuple(g + by * w for g, w in zip(score.gains, score.weights, strict=True))
    return replace(score, gains=gains, utility=score.utility + by)
