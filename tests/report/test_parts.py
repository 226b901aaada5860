"""Parts of the report of made-up runs: task tables, examples, geometry, what was chosen, and noise that says so."""

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from toys.reports import Page, change_scores, make_run, merge_record, texts

from hf_contmerge.report._choices import Curve, Point, choice_tables, curves
from hf_contmerge.report._examples import answers as side_by_side
from hf_contmerge.report._examples import examples
from hf_contmerge.report._findings import relative
from hf_contmerge.report._losses import loss_section
from hf_contmerge.report._merges import geometry_section
from hf_contmerge.report._pages import pages
from hf_contmerge.report._panels import Panel, draw_panel, panels
from hf_contmerge.report._pictures import (
    Dot,
    FrontDot,
    LossCurve,
    draw_alone,
    draw_curve,
    draw_dots,
    draw_front,
    draw_losses,
)
from hf_contmerge.report._tables import Table, answer_table, change_cell, score_grid, task_tables
from hf_contmerge.report.write import load_results, sections, write_report
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import Place
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.runtime.records import write_record
from hf_contmerge.scoring.forgetting.paired import Change


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three stages; the quiz is forgotten by plain fine-tuning in four documents, of which merges keep three."""
    run = make_run(tmp_path_factory.mktemp("run") / "toy", merge=["magmax", "opcm"])
    last = run.expert(3, "previous"), *(run.merged(3, entry) for entry in run.recipe.merge)
    answers(run.base, [1] * 12 + [0] * 12)
    answers(last[0], [0] * 4 + [1] * 8 + [0] * 12)
    for place in last[1:]:
        answers(place, [0] + [1] * 10 + [0] * 13)
    texts(run.base)
    for t in run.stage_numbers():
        for entry in run.recipe.merge:
            run.merged(t, entry).finish("merge", merge_record(t))
    return run


def answers(place: Place, right: list[int]) -> None:
    """Say which documents of the quiz were answered rightly."""

    def change(name: str, score: TaskScore) -> TaskScore:
        if name != "quiz":
            return score
        gains, words = tuple(map(float, right)), tuple("hen" if r else "fox" for r in right)
        share = sum(right) / len(right)
        return replace(score, gains=gains, answers=words, value=share, utility=share)

    change_scores(place, change)


def cell(table: Table, row: str, column: str) -> str:
    return next(r for r in table.rows if r[0].text == row)[table.header.index(column)].text


def test_task_tables_tell_changes_with_intervals(run):
    tables = {table.title: table for table in task_tables(load_results(run))}
    stage = tables["s1_heldout (stage s1, 24 documents)"]
    assert stage.header == ("line", "base", "s1", "s2", "s3", "against the base", "since it was learnt",
                            "detectable")  # fmt: skip
    assert cell(stage, "fine-tuning alone", "since it was learnt").startswith("−1.20 nats (")
    assert cell(stage, "opcm", "against the base").startswith("+0.46 nats (+0.")
    assert cell(stage, "opcm", "detectable").endswith(" nats")
    assert cell(stage, "independent experts", "s3") == "–"
    assert "since it was learnt" not in tables["s3_heldout (stage s3, 24 documents)"].header
    assert "since it was learnt" not in tables["quiz (general, 24 documents)"].header


def test_noise_is_called_no_change():
    seen = change_cell(Change(0.2, 0.01, 0.18, 0.22), "perplexity")
    none = change_cell(Change(0.01, 0.02, -0.03, 0.05), "perplexity")
    assert (seen.text, seen.shade > 0) == ("+0.20 nats (+0.18 to +0.22)", True)
    assert (none.text, none.shade) == ("≈ +0.01 nats (−0.03 to +0.05)", 0.0)
    assert none.hint == "no change seen; detectable: 0.06 nats"
    assert change_cell(Change(0.2, None), "accuracy").text == "+20.0 points (too few documents)"
    assert change_cell(None, "accuracy").text == "–"


def test_noise_has_no_colour_in_the_heat_map(run):
    (table,) = score_grid(load_results(run))
    names = [row[0].text for row in table.rows]
    assert names == [
        "base",
        "fine-tuning alone",
        "",
        "",
        "independent experts",
        "",
        "",
        "magmax",
        "",
        "",
        "opcm",
        "",
        "",
    ]
    last = table.rows[-1][table.header.index("quiz")]
    assert (last.text, last.shade) == ("41.7%", 0.0)
    assert "no change seen" in last.hint


def test_noise_is_drawn_hollow(run):
    results, axes = load_results(run), Figure().add_subplot()
    draw_panel(axes, results, Panel("general", "accuracy"))
    assert "white" in [line.get_markerfacecolor() for line in axes.lines]
    stage = Figure().add_subplot()
    drawing = draw_panel(stage, results, Panel("stage", "perplexity", 1))
    assert {"base 36.6", "fine-tuning alone 49.4"} <= {label.text for label in drawing.labels}
    assert (drawing.title, drawing.stages) == ("1 · s1", ("base", "s1", "s2", "s3"))
    assert "forgotten" in {text.get_text() for text in stage.texts}


def test_panels_of_stages_share_their_scale(run):
    results = load_results(run)
    limits = set()
    for panel in panels(results):
        axes = Figure().add_subplot()
        draw_panel(axes, results, panel)
        if panel.kind == "stage":
            limits.add(axes.get_ylim())
    assert len(limits) == 1


def test_relative_amounts():
    assert relative(-1.0986, "perplexity") == "× 3.0"
    assert relative(0.03, "perplexity") == "× 0.97"
    assert relative(-0.05, "accuracy") == "−5.0 points"


def test_examples_are_those_that_were_lost_and_kept(run):
    found = examples(load_results(run))
    quiz = [q for q in found.quotes if q.source.startswith("quiz")]
    assert [q.source for q in quiz] == ["quiz, document 2", "quiz, document 3"]
    assert quiz[0].text.startswith("quiz 1 <script>")
    assert quiz[0].outcome == "base: right (hen) → fine-tuning alone: wrong (fox) → opcm: right (hen)"
    assert (
        "quiz: of 12 right answers (base), fine-tuning alone lost 4; opcm has 3 of these right, and lost 1 more."
        in found.intro
    )
    texts = [q for q in found.quotes if q.source.startswith("s1_heldout")]
    assert len(texts) == 2
    assert texts[0].outcome.startswith("after s1: perplexity ")
    assert not [q for q in found.quotes if q.source.startswith("s3")], "the last stage had no time to be forgotten"


def test_the_page_opens_with_one_table(run):
    table = answer_table(load_results(run))
    assert table.header == ("against the base", "earlier stages, perplexity", "last stage (s3), perplexity",
                            "general, perplexity", "general, accuracy")  # fmt: skip
    assert [row[0].text for row in table.rows] == ["fine-tuning alone", "magmax", "opcm"]
    earlier, last = table.rows[2][1:3]
    assert earlier.text.startswith("better: +0.47 nats (+0.4")
    assert earlier.text.endswith(", perplexity × 0.63")
    assert last.text.startswith("better: +0.50 nats (")
    assert table.rows[2][4].text.startswith("no change seen: −8.3 points (")
    text = fill_page(run)
    assert text.index("better: +0.47 nats") < text.index("<figure>") < text.index('<ul class="verdicts">')


def fill_page(run: Run) -> str:
    write_report(run)
    return (run.folder / "report" / "index.html").read_text()


def test_five_answers_stand_side_by_side(run):
    (table,) = side_by_side(load_results(run)).tables
    assert table.header == ("document", "base", "fine-tuning alone", "opcm")
    assert len(table.rows) == 5
    first = table.rows[0]
    assert first[0].text.startswith("quiz 0 <script>")
    assert [c.text for c in first[1:]] == ["right (hen)", "wrong (fox)", "wrong (fox)"]


def test_learning_curves_are_the_recorded_losses(tmp_path):
    copy = make_run(tmp_path / "curves", stages=2, merge=["opcm"])
    assert loss_section(copy).empty
    for t in (1, 2):
        log = [{"step": s, "loss": 3.0 - 0.1 * s} for s in (5, 10)]
        copy.expert(t, "base").finish("train", {"log": [*log, {"step": 10, "train_runtime": 1.0}]})
    (picture,) = loss_section(copy).pictures
    for word in ("independent experts", "s1", "s2", "step, over all stages"):
        assert word in picture.svg


LONG = "a very long name of a stage or a rule that no panel has the room for, " * 2


def cut_off(figure: Figure) -> list[str]:
    """Return the texts that reach over the edge of a drawn figure."""
    figure.draw_without_rendering()
    whole, renderer = figure.bbox, figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    texts = [t for t in figure.findobj(Text) if isinstance(t, Text) and re.search("[a-z]", t.get_text())]  # no ticks
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    return [text for text, b in boxes
            if b.x0 < -1 or b.y0 < -1 or b.x1 > whole.x1 + 1 or b.y1 > whole.y1 + 1]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Collect the figures that are saved."""
    figures = list[Figure]()
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.mark.parametrize("stages", [1, 3])
def test_no_label_is_cut_off(tmp_path, drawn, stages):
    run = make_run(tmp_path / "long", stages=stages)
    results = load_results(run)
    named = tuple(s.model_copy(update={"name": f"{i}{LONG}"}) for i, s in enumerate(results.stages))
    lines = tuple(replace(line, name=f"{line.name} {LONG}") for line in results.merges)
    for shown in (results, replace(results, stages=named, merges=lines)):
        for panel in panels(shown):
            draw_alone(shown, panel)
        draw_front([FrontDot((0.1, 0.0, 0.2), (0.5, 0.4, 0.6), front=True, taken=True, allowed=True)], keeping=LONG)
        draw_dots([Dot(LONG, LONG, Change(0.1, 0.01, 0.0, 0.2))], "accuracy", title=LONG)
        draw_losses([LossCurve("independent experts", [[(1, 2.0), (2, 1.0)]])], {LONG: 0.0})
        draw_curve(Curve(LONG, "lambda", {LONG: [Point(1.0, 0.5, True, True)]}))
    assert len(drawn) > 8
    assert [text for figure in drawn for text in cut_off(figure)] == []


def test_no_examples_without_texts_or_plain_fine_tuning(tmp_path):
    run = make_run(tmp_path / "run", stages=2)
    assert examples(load_results(run)).empty
    texts(run.base)
    assert not examples(load_results(run)).empty
    for phase in ("train", "score"):
        run.expert(2, "previous").undo(phase)
    shutil.rmtree(run.expert(2, "previous").folder)
    assert examples(load_results(run)).empty


@pytest.fixture(scope="module")
def written(run: Run) -> Run:
    write_report(run)
    return run


def test_texts_are_escaped(written):
    run = written
    text = (run.folder / "report" / "index.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; # not a heading" in text
    assert "<script" not in text
    assert "\\<script\\>" in (run.folder / "report" / "report.md").read_text()


def test_geometry_is_read_from_the_records(run):
    section = geometry_section(run)
    cosines, signs, *owned = section.tables
    assert "0.1 % of the weights" in section.intro
    assert cosines.header == ("vector", "length", "s1", "s2", "s3")
    assert cell(cosines, "s3", "s1") == "+0.20"
    assert cell(cosines, "s2", "length") == "2"
    assert cell(cosines, "merged: opcm", "s3") == "+0.50"
    assert cell(cosines, "merged: opcm", "length") == "2.5"
    assert cell(signs, "s2", "s3") == "30 %"
    assert cell(owned[0], "s1", "0") == "33"
    assert not cosines.judged


def test_geometry_of_a_merge_without_a_stage(tmp_path, run):
    """A guard may leave an expert out; the record names those that were folded."""
    shutil.copytree(run.folder, tmp_path / "run")
    copy = Run.load(tmp_path / "run")
    for entry in copy.recipe.merge:
        copy.merged(3, entry).finish("merge", {**merge_record(2), "folded": [
            {"stage": 1, "replayed": False}, {"stage": 3, "replayed": True}]})  # fmt: skip
    table = geometry_section(copy).tables[0]
    assert table.header == ("vector", "length", "s1", "s3 (again, with replay)")
    assert cell(table, "merged: opcm", "s3 (again, with replay)") == "+0.30"


def attempt(
    what: str, scale: float, *, held: bool | None, taken: bool, objective: float | None = None
) -> dict[str, Any]:
    shift = {"group": "general", "block": "accuracy", "mean": -0.1 * scale, "low": -0.2 * scale, "high": -0.05 * scale}
    gain = {"group": "s2", "block": "perplexity", "mean": 0.5 * scale, "low": None, "high": None}
    return {
        "what": what, "rule": "magmax", "parameters": {"lambda": scale}, "factor": 1.0, "scale": scale, "held": held,
        "objective": objective, "keeps_general": scale < 0.9, "losses": [shift], "gains": [gain], "seconds": 98.76,
        "taken": taken,
    }  # fmt: skip


def choosing_run(folder: Path) -> Run:
    merge = [{"rule": "magmax", "parameters": {"lambda": "auto"}}]
    return make_run(folder, stages=2, merge=merge, guard={"max_forgetting": 0.05})


def test_what_was_tried_is_told(tmp_path):
    run = choosing_run(tmp_path / "run")
    place = run.merged(1, run.recipe.merge[0])
    tries = [attempt("auto", s, held=None, taken=s == 0.5, objective=1 - (s - 0.5) ** 2) for s in (1.0, 0.5, 0.25)]
    place.finish("merge", {**merge_record(1), "tries": tries})
    lost = run.merged(2, run.recipe.merge[0])
    lost.undo("score")
    lost.undo("merge")
    ladder = [attempt("fold", 0.5, held=False, taken=False), attempt("shrink", 0.25, held=False, taken=False)]
    write_record(lost.guard_file, {"tries": ladder})
    first, second = choice_tables(run)
    assert (first.title, second.title) == (
        "magmax of s1",
        "magmax of s2: over the budget, the run stopped",
    )
    assert [r[0].text for r in first.rows] == ["a coefficient", "a coefficient ← taken", "a coefficient"]
    told = [c.text for c in second.rows[0]]
    assert told == ["as in the recipe", "0.5", "no", "general −5.0 points (−10.0 to −2.5)", "general −10.0 points",
                    "+0.25 nats", "–", "magmax (lambda 0.5)"]  # fmt: skip
    curve = curves(run)[0]
    assert (curve.entry, curve.word, list(curve.stages)) == ("magmax", "lambda", ["s1"])
    assert [(p.value, p.allowed, p.taken) for p in curve.stages["s1"]] == [
        (0.25, True, False), (0.5, True, True), (1.0, False, False)]  # fmt: skip
    chosen = next(s for s in sections(run, load_results(run)) if s.title == "Choosing the merges")
    assert "validation documents (25 % of each task); results use the other documents" in chosen.intro
    assert "a loss of at most 0.05" in chosen.intro
    assert "98.76" not in pages(run, load_results(run), [], [chosen])["report.md"], "times are the machine's"


def test_what_was_not_chosen_has_no_section(run):
    chosen = next(s for s in sections(run, load_results(run)) if s.title == "Choosing the merges")
    assert chosen.empty


def test_reports_are_the_same_again(written, tmp_path):
    """Byte for byte, wherever the run lies and however long its phases took; costs apart."""
    run = written
    shutil.copytree(run.folder, tmp_path / "elsewhere")
    copy = Run.load(tmp_path / "elsewhere")
    for _, place in copy.places():
        for phase in ("train", "merge", "score"):
            if place.is_done(phase):
                place.finish(phase, {**place.record(phase), "seconds": 77.7, "peak_memory_bytes": 12345678901})
    write_report(copy)
    for file in sorted((run.folder / "report").iterdir()):
        same = file.read_bytes() == (copy.folder / "report" / file.name).read_bytes()
        assert same != file.name.startswith(("costs", "digests")), file.name
    with (copy.folder / "report" / "costs.csv").open(newline="") as file:
        assert {row["seconds"] for row in csv.DictReader(file)} == {"77.7"}


def test_a_stage_with_several_tasks_is_drawn_as_their_mean(tmp_path):
    run = make_run(tmp_path / "run", stages=1, merge=["opcm"])
    results = load_results(run)
    both = replace(results, stages=tuple(s.model_copy(update={"tasks": run.recipe.evaluate.general_tasks[1:]})
                                         for s in results.stages), general_tasks=())  # fmt: skip
    labels = draw_panel(Figure().add_subplot(), both, Panel("stage", "perplexity", 1)).labels
    assert next(label.text for label in labels if label.text.startswith("opcm")) == "opcm × 0.78"
