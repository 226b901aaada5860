"""`contmerge compare` on made-up runs with known scores: the numbers, what is not comparable, and the files."""

import csv
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest
from toys.reports import with_token

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ResourceError, RunError
from hf_contmerge.report.compare import compare_runs, findings, sections, write_comparison
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import Sample, TaskScore, write_scores


def text_score(utility: float, *, seed: str, documents: int = 24) -> TaskScore:
    """Return a perplexity of exactly this utility; texts of one seed are the same in all runs."""
    rng, noise = random.Random(seed), random.Random(f"{seed} {utility}")
    words = tuple(float(rng.randint(50, 150)) for _ in range(documents))
    raw = [w * (rng.gauss(0, 0.3) + noise.gauss(0, 0.02)) for w in words]
    gains = tuple(g + w * (utility - sum(raw) / sum(words)) for g, w in zip(raw, words, strict=True))
    sample, names = Sample(gains, words), tuple(f"{seed}{i}" for i in range(documents))
    value = math.exp(-sample.utility)
    return TaskScore("perplexity", "word_perplexity", value, sample.utility, sample.stderr(), gains, words, {}, names)


def quiz_score(right: int, *, of: int = 24) -> TaskScore:
    gains = (1.0,) * right + (0.0,) * (of - right)
    sample, names = Sample(gains, (1.0,) * of), tuple(f"q{i}" for i in range(of))
    return TaskScore("accuracy", "acc", right / of, right / of, sample.stderr(), gains, sample.weights, {}, names)


def make_run(folder: Path, *, kept: float, rules=("magmax", "opcm"), right: int = 12, seed: str = "", **more) -> Run:
    """Return a finished run of two stages in which each rule keeps this utility of the first stage's text."""
    data = {"name": folder.name, "base_model": "me/base", "stages": [{"name": n, "dataset": "a.jsonl"} for n in "ab"],
            "merge": list(rules), "evaluate": {"general_tasks": ["quiz"]}, **more}  # fmt: skip
    run = Run.open(parse_recipe(data), folder)

    def put(place, scores: dict[str, TaskScore]) -> None:
        place.finish("score", {"tasks": write_scores(place, scores)})

    def rows(t: int, own: float) -> dict[str, TaskScore]:
        texts = {"a_heldout": own, "b_heldout": -2.9} if t == 2 else {"a_heldout": -2.5}
        return {n: text_score(u, seed=seed + n) for n, u in texts.items()} | {"quiz": quiz_score(right)}

    put(run.base, {n: text_score(-3.6, seed=seed + n) for n in ("a_heldout", "b_heldout")} | {"quiz": quiz_score(12)})
    for t in (1, 2):
        run.expert(t, "previous").finish("train", {})
        put(run.expert(t, "previous"), rows(t, -3.0))
        for entry in run.recipe.merge:
            run.merged(t, entry).finish("merge", {})
            put(run.merged(t, entry), rows(t, kept))
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    train = {"learning_rate": 3e-4}
    return [make_run(folder / "old", kept=-2.9), make_run(folder / "new", kept=-2.6, right=18, train=train)]


def test_differences_are_paired_and_have_intervals(pair):
    found = compare_runs(pair)
    assert [(d.title, d.tasks) for d in found.pairs] == [
        (f"new: {name}", ("a_heldout", "b_heldout", "quiz")) for name in ("fine-tuning alone", "magmax", "opcm")
    ]
    magmax = found.pairs[1]
    change = magmax.change(["a_heldout"], "perplexity")
    assert change
    assert change.mean == pytest.approx(0.3)
    assert change.stderr is not None
    assert change.stderr < 0.02, "paired: texts differ by 0.3 among themselves"
    mean = magmax.change(magmax.comparable("perplexity"), "perplexity")
    assert mean
    assert mean.mean == pytest.approx(0.15)
    told = findings(found)
    assert told[1].startswith("new: magmax: better on 2 tasks of perplexity (+0.15 nats, ")
    assert "; better on 1 task of accuracy (+25.0 points, " in told[1]
    assert "the same on 2 tasks of perplexity (0.00 nats, 0.00 to 0.00)" in told[0], "one and the same fine-tuning"


def test_tables_show_metrics_and_what_differs_between_the_recipes(pair):
    differences, metrics, recipes = sections(compare_runs(pair))
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in recipes.tables[0].rows}
    assert rows["name"] == ["old", "new"]
    assert rows["train.learning_rate"][1] == "0.0003"
    assert "base_model" not in rows
    table = metrics.tables[0]
    named = {row[0].text: dict(zip(table.header[1:], (c.text for c in row[1:]), strict=True)) for row in table.rows}
    assert named["old: magmax"]["BWT"] == "−0.400"
    assert named["new: magmax"]["BWT"] == "−0.100"
    assert {"ACC", "LA"} < set(table.header)
    assert differences.tables[0].rows[-1][0].text == "mean"


def test_other_documents_are_said_and_not_compared(pair, tmp_path):
    found = compare_runs([pair[0], make_run(tmp_path / "y", kept=-2.6, seed="other ")])
    assert found.pairs[1].comparable("perplexity") == []
    assert "2 measured on other documents, not compared" in findings(found)[1]
    texts = sections(found)[0].tables[0]
    assert {cell.text for row in texts.rows[:-1] for cell in row[1:]} == {"other documents"}
    write_comparison(found, tmp_path / "out")
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = {(r["line"], r["task"]): r for r in csv.DictReader(file)}
    assert rows["magmax", "a_heldout"]["seen"] == "other documents"
    assert rows["magmax", "a_heldout"]["difference"] == ""
    assert float(rows["magmax", "quiz"]["difference"]) == 0


def test_runs_of_different_rules_meet_with_their_best(tmp_path):
    runs = [make_run(tmp_path / "x", kept=-2.9, rules=["magmax"]), make_run(tmp_path / "y", kept=-2.6, rules=["opcm"])]
    assert [d.title for d in compare_runs(runs).pairs] == ["y: fine-tuning alone", "y: opcm (against magmax)"]
    assert compare_runs(runs[::-1]).title == "x against y"


def test_three_runs_have_the_first_as_reference(pair, tmp_path):
    runs = [pair[0], *(make_run(tmp_path / f"r{i}" / "run", kept=-2.9 + i / 10, rules=["magmax"]) for i in (1, 2))]
    found = compare_runs(runs)
    merged = [d.change(["a_heldout"], "perplexity") for d in found.pairs if d.names[0] == "magmax"]
    assert [c.mean for c in merged if c] == pytest.approx([0.1, 0.2])
    assert [c.label for c in found.runs] == ["old", str(runs[1].folder), str(runs[2].folder)], "for names that clash"


def test_runs_without_a_common_task_are_refused(pair, tmp_path, capsys):
    Run.open(parse_recipe({"name": "y", "base_model": "b", "stages": [{"name": "s", "dataset": "a.jsonl"}],
                           "merge": ["magmax"]}), tmp_path / "y")  # fmt: skip
    assert main(["compare", str(pair[0].folder), str(tmp_path / "y")]) == 2
    told = capsys.readouterr().err
    assert "These runs have no task in common, so they cannot be compared: old has a_heldout, b_heldout, quiz" in told
    assert "y has no scores yet" in told
    assert "`evaluate.general_tasks`" in told


def test_one_run_is_not_enough(pair, tmp_path):
    with pytest.raises(RunError, match="name at least two different runs"):
        compare_runs([pair[0], pair[0]])
    assert main(["compare", str(pair[0].folder), str(tmp_path / "no")]) == 2


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_command_prints_and_writes(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "deep" / "out"
    assert main(["compare", *(str(run.folder) for run in pair), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "new: magmax: better on 2 tasks of perplexity" in told
    assert f"Page: {out / 'index.html'}" in told
    assert {p.name for p in out.iterdir()} == {"index.html", "compare.md", "compare.csv"}
    page = Page()
    page.feed((out / "index.html").read_text())
    assert page.open == []
    assert page.addresses == []
    assert "| a\\_heldout |" in (out / "compare.md").read_text()
    with (out / "compare.csv").open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if (r["line"], r["task"]) == ("opcm", "a_heldout"))
    assert (row["reference"], row["run"], row["seen"], row["documents"]) == ("old", "new", "better", "24")
    assert float(row["low"]) < float(row["difference"]) < float(row["high"])
    assert float(row["reference_value"]) == pytest.approx(math.exp(2.9))


def test_tokens_of_a_recipe_are_not_shown(tmp_path):
    runs = [make_run(tmp_path / name, kept=-2.9) for name in ("one", "two")]
    with_token(runs[1])
    out = tmp_path / "out"
    write_comparison(compare_runs(runs), out)
    assert not [p.name for p in out.iterdir() if "hf_verysecret" in p.read_text()]


def test_a_file_in_the_way(pair, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ResourceError, match=r"Cannot write .*out: .*--out"):
        write_comparison(compare_runs(pair), tmp_path / "out")
