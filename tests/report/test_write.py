"""Reports of made-up runs with known scores: the files' contract, the verdicts, the page and the picture."""

import csv
import json
import math
import re
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from toys.reports import KEPT, Page, make_run, make_score, with_token

from hf_contmerge.errors import RunError
from hf_contmerge.report import _results
from hf_contmerge.report._findings import METRICS, amount, headline, verdict
from hf_contmerge.report._labels import spread
from hf_contmerge.report._tables import cost_tables, costs
from hf_contmerge.report.write import load_results, print_table, write_report
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import load_scores, write_scores
from hf_contmerge.scoring.forgetting.paired import Change, mean_change


def summary_of(run: Run) -> dict:
    write_report(run)
    return json.loads((run.folder / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("run") / "toy")
    assert write_report(run) == run.folder / "report" / "forgetting.png"
    return run


@pytest.fixture(scope="module")
def summary(run: Run) -> dict:
    return json.loads((run.folder / "report" / "summary.json").read_text())


def test_all_files_are_there_and_no_record(run):
    names = {p.name for p in (run.folder / "report").iterdir()}
    costs = {"costs.html", "costs.csv", "digests.json"}
    assert names == {"index.html", "report.md", "scores.csv", "summary.json", "forgetting.png", *costs}
    assert not run.report.is_done("report")


def test_summary_keeps_its_contract(summary):
    assert {"base_model", "seed", "stages", "units", "tasks", "experts", "merges"} == set(summary)
    assert (summary["base_model"], summary["seed"], summary["stages"]) == ("me/base", 0, ["s1", "s2", "s3"])
    assert summary["tasks"]["quiz"] == {
        "stage": None, "block": "accuracy", "metric": "acc", "documents": 24, "base": 0.5}  # fmt: skip
    assert summary["tasks"]["s2_heldout"] == {
        "stage": "s2", "block": "perplexity", "metric": "word_perplexity", "documents": 24,
        "base": pytest.approx(math.exp(3.6))}  # fmt: skip
    assert (set(summary["experts"]), set(summary["merges"])) == ({"previous", "base"}, {"magmax", "opcm", "average"})
    for entry in (*summary["experts"].values(), *summary["merges"].values()):
        assert set(entry) == {"matrix", "metrics", "general"}
        assert set(entry["matrix"]) == {"perplexity"}, "no stage has an accuracy"
        assert set(entry["general"]) == {"accuracy", "perplexity"}
        assert all(set(m) == set(METRICS) for m in entry["metrics"].values())


@pytest.mark.parametrize("rule", ["magmax", "opcm", "average"])
def test_summary_has_the_right_numbers(summary, rule):
    entry, drop = summary["merges"][rule], KEPT[rule]
    assert entry["matrix"]["perplexity"] == [
        pytest.approx([-3.6, -3.6, -3.6]),
        [pytest.approx(-3.1), None, None],
        [pytest.approx(-3.1 - drop), pytest.approx(-3.1), None],
        [pytest.approx(-3.1 - 2 * drop), pytest.approx(-3.1 - drop), pytest.approx(-3.1)],
    ]
    metrics = entry["metrics"]["perplexity"]
    assert metrics["acc"] == pytest.approx(-3.1 - drop)
    assert metrics["la"] == pytest.approx(-3.1)
    assert metrics["bwt"] == pytest.approx(-1.5 * drop)
    assert metrics["forgetting"] == pytest.approx(1.5 * drop)
    assert metrics["fwt"] is None
    assert metrics["general_delta"] == pytest.approx(-0.3 * drop)
    assert entry["general"]["perplexity"]["tasks"] == ["prose"]
    assert entry["general"]["perplexity"]["rows"][0] == [pytest.approx(-3.0)]


def test_independent_experts_have_only_what_was_measured(summary):
    rows = summary["experts"]["base"]["matrix"]["perplexity"]
    assert rows[3] == [None, None, pytest.approx(-2.8)]
    assert summary["experts"]["base"]["metrics"]["perplexity"]["acc"] is None


def test_scores_csv_has_every_score_once(run):
    with (run.folder / "report" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [(r["line"], r["stage_index"], r["task"]) for r in rows]
    assert len(set(keys)) == len(keys) == 5 * 5 + 4 * (3 + 4 + 5) + (3 + 1 + 1)
    last = next(r for r in rows if (r["line"], r["stage"], r["task"]) == ("merges/opcm", "s3", "s1_heldout"))
    assert float(last["utility"]) == pytest.approx(-3.14)
    assert float(last["value"]) == pytest.approx(math.exp(3.14))
    assert last["documents"] == "24"


def test_verdict_tells_each_side(run):
    results = load_results(run)
    told = {line.name: verdict(results, line) for line in results.merges}
    assert "after 3 stages, against plain fine-tuning: better over all stages (+0.10 nats, " in told["magmax"]
    assert "better on the earlier (+0.35 nats, " in told["magmax"]
    assert "worse on s3, the last one (−0.40 nats, " in told["magmax"]
    assert "better on general tasks (+0.09 nats, " in told["average"]
    assert "no change seen on general tasks (+8.3 points, " in told["average"]
    assert "against the mean of the experts: better over all stages (+0.20 nats, " in told["magmax"]
    assert "mean of the experts" not in told["average"]


def test_verdict_flips_with_the_data(tmp_path):
    run = make_run(tmp_path / "run", forget={"previous": 0.02, "magmax": 0.6, "opcm": 0.02, "average": 0.02})
    results = load_results(run)
    told = verdict(results, results.merges[0])
    assert "worse over all stages (−0.98 nats, " in told
    assert "against the mean of the experts: worse over all stages (−0.58 nats, " in told
    write_report(run)
    assert '<li class="worse"><b>magmax</b>' in (run.folder / "report" / "index.html").read_text()


def test_no_change_is_claimed_within_the_noise():
    old = {"x": make_score(-3.0, seed="x")}
    near = {"x": make_score(-3.0 + 1e-4, seed="x")}
    change = mean_change([(near, old, ["x"])], "perplexity")
    assert change is not None
    assert change.mean == pytest.approx(1e-4)
    assert change.sign == 0
    one = make_score(-2.0, seed="x", documents=1), make_score(-3.0, seed="x", documents=1)
    alone = mean_change([({"x": one[0]}, {"x": one[1]}, ["x"])], "perplexity")
    assert alone == Change(pytest.approx(1.0), None)
    assert alone.sign == 0


def test_mean_change_averages_tasks_then_stages_and_combines_errors():
    old = {t: make_score(-3.0, seed=t) for t in "abc"}
    new = {"a": make_score(-2.0, seed="a"), "b": make_score(-2.6, seed="b"), "c": make_score(-3.6, seed="c")}
    change = mean_change([(new, old, ["a", "b"]), (new, old, ["c"])], "perplexity")
    errors = {t: mean_change([(new, old, [t])], "perplexity") for t in "abc"}
    assert change
    assert change.mean == pytest.approx(((1.0 + 0.4) / 2 - 0.6) / 2)
    by_hand = math.hypot(*(w * (errors[t].stderr or 0) for t, w in (("a", 0.25), ("b", 0.25), ("c", 0.5))))
    assert change.stderr == pytest.approx(by_hand)
    assert mean_change([(new, {"a": old["a"]}, ["a", "b"])], "perplexity") is None, "b was not measured before"
    assert mean_change([(new, old, ["a"])], "accuracy") is None


def test_scores_of_other_documents_are_refused():
    old, new = make_score(-3.0, seed="x"), make_score(-3.0, seed="x", documents=12)
    with pytest.raises(
        RunError, match=r"task x: the old score has 24 documents, the new one 12 .*contmerge redo RUN score"
    ):
        mean_change([({"x": new}, {"x": old}, ["x"])], "perplexity")


def test_half_done_shows_null_and_dash(tmp_path):
    run = make_run(tmp_path / "run", done=2)
    run.merged(2, run.recipe.merge[1]).undo("score")
    found = summary_of(run)
    assert [len(e["matrix"]["perplexity"]) for e in found["merges"].values()] == [3, 2, 3]
    assert found["merges"]["magmax"]["matrix"]["perplexity"][2][2] is None
    assert found["merges"]["opcm"]["metrics"]["perplexity"]["bwt"] is None
    assert "| – |" in (run.folder / "report" / "report.md").read_text()
    results = load_results(run)
    assert verdict(results, results.merges[1]).startswith("after 1 stage, ")


def test_a_run_that_has_only_begun(tmp_path):
    run = Run.open(parse_recipe({"name": "n", "base_model": "b", "stages": [{"name": "s1", "dataset": "a.jsonl"}],
                                 "merge": ["magmax"]}), tmp_path / "run")  # fmt: skip
    found = summary_of(run)
    assert found["tasks"]["s1_heldout"] == {
        "stage": "s1", "block": None, "metric": None, "documents": None, "base": None}  # fmt: skip
    assert found["merges"]["magmax"] == {"matrix": {}, "metrics": {}, "general": {}}
    assert "not measured yet" in (run.folder / "report" / "report.md").read_text()


def test_without_plain_fine_tuning_nothing_is_compared_with_it(tmp_path):
    run = make_run(tmp_path / "run", stages=2, merge=["opcm"])
    place = run.expert(2, "previous")
    for phase in ("train", "score"):
        place.undo(phase)
    place.folder.rmdir()
    results = load_results(run)
    assert [line.name for line in results.experts] == ["base"]
    assert verdict(results, results.merges[0]).startswith("after 2 stages, this run has no plain fine-tuning")
    write_report(run)


def test_the_page_is_whole_and_loads_nothing(run):
    text = (run.folder / "report" / "index.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert text.count("<svg") == 3 + 2 + 1, "a panel per stage, two of general ability, the plane"
    assert {a for a in page.addresses if not a.startswith("#")} == {"costs.html"}
    for loads in ("http://", "https://", "url(", "@import", "<script", "<link"):
        assert loads not in text.replace("url(#", "")
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(set(names)) == len(names)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(names)


def test_costs_lie_apart(run):
    """What differs from machine to machine is in files of its own; the rest of the report is the same everywhere."""
    folder = run.folder / "report"
    spent = folder / "costs.html"
    assert "1.5 min" in spent.read_text()
    assert "3.0 GiB" in spent.read_text()
    assert "peak memory" in spent.read_text()
    with (folder / "costs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["what"] for row in rows} == {str(place.folder.relative_to(run.folder)) for _, place in run.places()}
    for name in ("index.html", "report.md", "summary.json", "scores.csv"):
        assert "peak memory" not in (folder / name).read_text()


def test_costs_are_summed_by_phase(run):
    spent = costs(run)
    trained = [c for c in spent if c.phase == "train"]
    assert len(trained) == 5
    first, each = cost_tables(spent)
    row = next(row for row in first.rows if row[0].text == "train")
    assert [cell.text for cell in row] == ["train", "5", "7.5 min", "3.0 GiB"]
    assert len(each.rows) == len(spent)
    assert {c.seconds for c in trained} == {90.0}


def test_the_page_escapes_and_hides_tokens(tmp_path):
    run = make_run(tmp_path / "run", stages=1, merge=["magmax"], base_model="<script>alert(1)</script>")
    with_token(run)
    write_report(run)
    for name in ("index.html", "report.md"):
        text = (run.folder / "report" / name).read_text()
        assert "hf_verysecret" not in text
    assert "<script" not in (run.folder / "report" / "index.html").read_text()


@pytest.mark.parametrize("stages", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_pictures_of_any_length(tmp_path, stages):
    picture = write_report(make_run(tmp_path / "run", stages=stages))
    check_picture(picture)


def test_the_picture(run):
    check_picture(run.folder / "report" / "forgetting.png")


def check_picture(path: Path) -> None:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000
    assert 1000 <= width <= 5000
    assert 500 <= height <= 2000


def test_the_headline_is_computed(run, tmp_path):
    assert headline(load_results(run)) == (
        "After 3 stages, fine-tuning alone forgot the earlier ones (perplexity × 2.5); "
        "opcm, the best merge, forgot them (perplexity × 1.03)"
    )
    kept = make_run(tmp_path / "run", forget={**KEPT, "previous": -0.2})
    assert "fine-tuning alone got better on the earlier ones (perplexity × 0.74)" in headline(load_results(kept))


def test_labels_are_spread_without_overlap():
    found = spread([10, 10, 10, 50], 8, 60)
    assert all(b - a >= 8 - 1e-9 for a, b in pairwise(found))
    assert found[0] >= 0
    assert found[-1] <= 60
    assert spread([5, 50], 8, 60) == [5, 50]


def test_amounts_have_units_and_no_minus_zero():
    assert amount(-0.001, "perplexity") == "0.00 nats"
    assert amount(-0.051, "accuracy") == "−5.1 points"
    assert amount(0.5, "perplexity") == "+0.50 nats"


def test_the_table_in_the_terminal(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    print_table(run)
    out = capsys.readouterr().out
    assert "fine-tuning alone" in out
    assert "−0.900" in out
    assert "better over all stages" in out


def test_each_paired_change_is_computed_once(tmp_path, monkeypatch):
    run, asked = make_run(tmp_path / "run"), Counter()

    def counted(groups, block):
        asked[block, *((id(new), id(old), tuple(tasks)) for new, old, tasks in groups)] += 1
        return mean_change(groups, block)

    monkeypatch.setattr(_results, "mean_change", counted)
    write_report(run)
    assert asked
    assert {key for key, times in asked.items() if times > 1} == set()


def test_reports_are_replaced(tmp_path):
    run = make_run(tmp_path / "run", stages=1)
    write_report(run)
    (run.folder / "report" / "old.txt").write_text("x")
    write_report(run)
    assert not (run.folder / "report" / "old.txt").exists()


def test_importing_the_report_is_cheap():
    heavy = ("matplotlib", "rich", "torch", "jinja2")
    code = f"import sys, hf_contmerge.report.write; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_task_with_one_document_says_so(tmp_path):
    run = make_run(tmp_path / "run", stages=1)
    for place in (run.base, run.expert(1, "base"), run.merged(1, run.recipe.merge[0])):
        tasks = load_scores(place)
        cut = {t: replace(s, gains=s.gains[:1], weights=s.weights[:1], stderr=None) for t, s in tasks.items()}
        place.finish("score", {"tasks": write_scores(place, cut)})
    for entry in run.recipe.merge[1:]:
        run.merged(1, entry).undo("score")
    results = load_results(run)
    assert "too few documents on s1" in verdict(results, results.merges[0])
    write_report(run)


def test_rounding_is_named_where_a_rule_would_be_blamed(tmp_path):
    """A merge whose file lost most of its update is not called worse: the verdict says what took it, and what to do."""
    run = make_run(tmp_path / "run", forget={"previous": 0.02, "magmax": 0.6, "opcm": 0.02, "average": 0.02})
    lossy = {"dtype": "bfloat16", "rounding": "nearest", "survival": 0.31, "error": 0.84, "nbytes": 2**30,
             "worst": [["model.norm.weight", 0.0]]}  # fmt: skip
    for entry, share in zip(run.recipe.merge, (0.31, 0.95), strict=False):
        record = run.merged(3, entry).record("merge")
        run.merged(3, entry).finish("merge", {**record, "stored": {**lossy, "survival": share}})
    results = load_results(run)
    told = {line.name: verdict(results, line) for line in results.merges}
    assert told["magmax"].endswith(
        "; rounding to bfloat16 took 69 % of the update, so this does not judge the rule: `dtype: float32`, "
        "`rounding: stochastic` or a higher learning rate keeps more."
    )
    assert not any("rounding" in told[name] for name in ("opcm", "average"))
    write_report(run)
    html, text = ((run.folder / "report" / name).read_text() for name in ("index.html", "report.md"))
    assert '<li class="same"><b>magmax</b>' in html
    assert "What the files keep" in html
    assert "| magmax | 31.0 % | bfloat16 | nearest | 0.84 | 1.0 GiB | model.norm.weight 0 % |" in text
    summary = json.loads((run.folder / "report" / "summary.json").read_text())
    assert summary["merges"]["magmax"]["stored"]["survival"] == 0.31
    assert "stored" not in summary["merges"]["average"]


def test_experts_of_16_bits_are_listed(tmp_path):
    """A LoRA folded into 16 bits with what its file keeps; weights trained in 16 bits as unknown."""
    run = make_run(tmp_path / "run", merge=["magmax"])
    first, second = [place for _, place in run.places() if place.folder.parent.name == "experts"][:2]
    stored = {
        "dtype": "bfloat16",
        "rounding": "stochastic",
        "survival": 0.99,
        "error": 0.7,
        "nbytes": 2**30,
        "worst": [],
    }
    first.finish("train", {**first.record("train"), "trained_in": "float32", "stored": stored})
    second.finish("train", {**second.record("train"), "trained_in": "bfloat16"})
    write_report(run)
    text = (run.folder / "report" / "report.md").read_text()
    assert "| float32 | 99.0 % | bfloat16 | stochastic | 0.7 | 1.0 GiB | none |" in text
    assert "| bfloat16 | unknown | bfloat16 |" in text


def test_the_headline_names_rounding(tmp_path):
    run = make_run(tmp_path / "run", merge=["magmax"])
    record = run.merged(3, run.recipe.merge[0]).record("merge")
    stored = {"dtype": "bfloat16", "rounding": "nearest", "survival": 0.5, "error": 0.8, "nbytes": 1, "worst": []}
    run.merged(3, run.recipe.merge[0]).finish("merge", {**record, "stored": stored})
    assert "magmax (rounding to bfloat16 took 50 % of the update) forgot" in headline(load_results(run))
