"""contmerge remix: weights of stages, searched after a run on what it stored."""

import gzip
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.guarded import recipe
from toys.loras import lora
from toys.models import TEXT, toy_llama, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ResourceError
from hf_contmerge.loop.proof import find_model, prove
from hf_contmerge.loop.remix import Remix, Wish
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.records import read_record, write_record
from hf_contmerge.scoring.forgetting.search import gain_kept

Data = dict[str, Any]
LINES = TEXT.strip().splitlines()
TEXTS = {"known": LINES[0], "own": LINES[1], "other": LINES[2]}


def taught(start: Path, out: Path, text: str, *, steps: int) -> Path:
    """Write a model trained further on a text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("remix")
    base = taught(toy_llama(home / "start", seed=0, layers=1), home / "base", TEXTS["known"], steps=40)
    taught(base, home / "one", TEXTS["own"], steps=12)
    taught(base, home / "two", TEXTS["other"], steps=12)
    draw = random.Random(0)
    for name, line in TEXTS.items():
        write_jsonl(home / f"{name}.jsonl", [{"text": line[(at := draw.randrange(40)) : at + 50]} for _ in range(24)])
    return home


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    return run_recipe(parse_recipe(recipe(home, "one", "two", merge=["average", "magmax"])), home / "run")


def remixed(run: Run, *words: str) -> tuple[int, Path]:
    out = run.folder / "remix/r"
    shutil.rmtree(out, ignore_errors=True)
    return main(["remix", str(run.folder), "-o", str(out), *words]), out


def test_a_remix_writes_a_merge_that_repeats_itself(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = remixed(run, "--want", "s1=1,s2=0.5", "--keep", "general", "--tries", "8")
    assert code == 0
    shown = capsys.readouterr().out
    assert "The front, on validation documents" in shown
    assert "8 candidates" in shown
    record = read_record(out / "remix.json", "")
    allowed = [t for t in record["tries"] if t["keeps"]] or record["tries"]
    best = max(allowed, key=lambda t: t["learning"]["mean"])
    assert best["taken"]
    assert best["weights"] == record["weights"]
    assert len({tuple(t["weights"]) for t in record["tries"]}) == len(record["tries"]) == 8
    of = Remix.find(run, Wish({"s1": 1.0, "s2": 1.0}), Crew())
    base, experts = Weights(of.base), [Weights(e.folder) for e in of.experts]
    for name in base.floating():
        start = base.tensor(name)
        changes = [w * (e.tensor(name) - start) / 2 for w, e in zip(record["weights"], experts, strict=True)]
        torch.testing.assert_close(Weights(out / "merged").tensor(name), start + sum(changes), rtol=0, atol=1e-6)
    assert "the same weights" in list(prove(find_model(str(out / "merged")), {}))[-1]
    assert main(["merge", "log", str(out / "state")]) == 0
    assert f"weight {record['weights'][0]:g}" in capsys.readouterr().out
    assert main(["verify", str(run.folder)]) == 0
    assert "Covered by no record" not in capsys.readouterr().out
    (out / "front.png").write_bytes(b"x")
    assert main(["verify", str(run.folder)]) == 1


def test_an_entry_and_another_rule_exclude_each_other(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        remixed(run, "--want", "s1=1", "--merge", "average", "--rule", "ema")
    assert "not allowed with" in capsys.readouterr().err


def test_stages_are_folded_in_the_order_of_the_run(run: Run) -> None:
    """However they are named: in `blend` or `ema` the newest expert is not the one that was named last."""
    there, back = (Remix.find(run, Wish(dict.fromkeys(names, 1.0)), Crew()) for names in (("s1", "s2"), ("s2", "s1")))
    assert [e.stage for e in back.experts] == ["s1", "s2"]
    assert (back.inputs(), back.wish.folder_name()) == (there.inputs(), there.wish.folder_name())


def test_experts_without_statistics_are_refused_before_any_scoring(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_CONTMERGE_CACHE", "off")
    code, out = remixed(run, "--want", "s1=1", "--rule", "input_space")
    assert code == 2
    assert "one lacks the statistics 'inputs', which the rule InputSpace needs: write" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_weights_that_do_nothing_are_told_and_not_tried(
    run: Run, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    entry = {"rule": "blend", "parameters": {"keep": 0.0, "take": 0.5}}
    newest = run_recipe(parse_recipe(recipe(home, "one", "two", merge=[entry])), tmp_path / "run", until="train")
    code, out = remixed(newest, "--want", "s1=1,s2=1", "--keep", "nothing", "--tries", "5")
    assert code == 0
    assert "blend (keep 0.0, take 0.5) takes nothing of the stage s1, whose weights therefore do nothing" in caplog.text
    weights = [t["weights"] for t in read_record(out / "remix.json", "")["tries"]]
    assert {first for first, _ in weights} == {0.0}
    assert len({second for _, second in weights}) == len(weights) == 5
    assert remixed(newest, "--want", "s1=1", "--keep", "nothing", "--tries", "2")[0] == 0  # alone, it is the newest
    entry["parameters"] = {"keep": 0.0, "take": 0.0}
    empty = run_recipe(parse_recipe(recipe(home, "one", "two", merge=[entry])), tmp_path / "empty", until="train")
    assert remixed(empty, "--want", "s1=1", "--keep", "nothing")[0] == 2
    assert "Name another rule with --rule, such as average." in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_measured_in_memory_is_what_is_written(run: Run) -> None:
    _, out = remixed(run, "--want", "s1,s2", "--tries", "3")
    record = read_record(out / "remix.json", "")
    of = Remix.find(run, Wish({"s1": 1.0, "s2": 1.0}), Crew())
    models = {"base": of.base, "merged": out / "merged", **{e.stage: e.folder for e in of.experts}}
    scores = {name: of.measure(model, of.tasks, "validation") for name, model in models.items()}
    gain = gain_kept(scores["merged"], scores["base"], {s: scores[s] for s in ("s1", "s2")}, of.stages)
    taken = next(t for t in record["tries"] if t["taken"])
    assert gain
    assert gain.mean == pytest.approx(taken["learning"]["mean"], abs=1e-4)
    assert gain.low == pytest.approx(taken["learning"]["low"], abs=1e-3)
    documents = {len(score.gains) for score in scores["base"].values()}
    assert max(documents) < 24  # the others decide nothing


@pytest.mark.slow
def test_more_is_learnt_than_by_the_runs_own_merge_and_base(run: Run) -> None:
    _, out = remixed(run, "--want", "s1=1", "--keep", "nothing", "--tries", "4")
    record = read_record(out / "remix.json", "")
    assert all(t["kept"] == [] and t["keeps"] for t in record["tries"])
    gain = {t["weights"][0]: t["learning"]["mean"] for t in record["tries"]}
    assert gain[1.0] == pytest.approx(1, abs=1e-3)  # one expert alone, at its full change
    assert max(gain.values()) == gain[record["weights"][0]]
    shifts = {name: {s["group"]: s["mean"] for s in shifts} for name, shifts in record["test"].items()}
    assert shifts["remix"]["s1"] > shifts["average of the run"]["s1"] > 0


@pytest.mark.slow
def test_a_finished_remix_is_not_made_again_and_a_forged_one_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--want", "s1=1,s2=0", "--keep", "general,other,s2", "--rule", "blend", "--tries")
    _, out = remixed(run, *words, "2")
    record = read_record(out / "remix.json", "")
    assert record["stages"] == ["s1", "s2"]
    assert {s["group"] for s in record["tries"][0]["kept"]} == {"general", "other", "s2"}
    before = (out / "remix.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["remix", str(run.folder), "-o", str(out), *words, "2"]) == 0
    assert (out / "remix.json").stat().st_mtime_ns == before
    assert "2 candidates" in capsys.readouterr().out
    assert main(["remix", str(run.folder), "-o", str(out), *words, "3"]) == 2
    assert "holds another remix" in capsys.readouterr().err
    write_record(out / "remix.json", {**record, "tries": "none"})
    assert main(["remix", str(run.folder), "-o", str(out), *words, "2"]) == 2
    assert "remix.json is damaged" in capsys.readouterr().err
    (out / "remix.json").unlink()
    assert main(["remix", str(run.folder), "-o", str(out), *words, "2"]) == 2
    assert "is not empty and holds no remix" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_choose_what_one_does(run: Run) -> None:
    words = ("--want", "s1=1,s2=0.5", "--tries", "5")
    _, out = remixed(run, *words)
    wanted = read_record(out / "remix.json", "")
    shutil.rmtree(out)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-m", "hf_contmerge.commands.main", "remix", str(run.folder), "-o", str(out), *words]
    done = subprocess.run([*command, "--cpu"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_record(out / "remix.json", "")
    assert record["weights"] == wanted["weights"]
    assert [t["learning"]["mean"] for t in record["tries"]] == pytest.approx(
        [t["learning"]["mean"] for t in wanted["tries"]], abs=1e-4
    )


@pytest.mark.slow
def test_adapters_are_mixed(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        lora(home / "base", tmp_path / f"l{seed}", seed=seed, target_modules=["q_proj", "down_proj"])
    data = recipe(home, "one", "two", merge=["task_arithmetic"])
    for stage, seed in zip(data["stages"], (1, 2), strict=True):
        stage["expert"] = str(tmp_path / f"l{seed}")
    done = run_recipe(parse_recipe(data), tmp_path / "run", until="merge")
    assert main(["remix", str(done.folder), "--want", "s1,s2", "--tries", "3"]) == 0
    (out,) = (done.folder / "remix").iterdir()
    assert "the same weights" in list(prove(find_model(str(out / "merged")), {}))[-1]
    assert main(["merge", "export", str(out / "state"), str(tmp_path / "adapter"), "--as-adapter"]) == 0


@pytest.mark.slow
def test_a_stopped_search_resumes_from_the_score_cache(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_CONTMERGE_CACHE", str(tmp_path / "cache"))
    words = ("--want", "s1=1,s2=1", "--tries", "4")
    _, out = remixed(run, *words)
    first, files = read_record(out / "remix.json", ""), sorted((tmp_path / "cache").rglob("*.gz"))
    _, out = remixed(run, *words)
    again = read_record(out / "remix.json", "")
    drop = ("seconds",)
    assert [{k: v for k, v in t.items() if k not in drop} for t in again["tries"]] == [
        {k: v for k, v in t.items() if k not in drop} for t in first["tries"]
    ]
    new = {*(tmp_path / "cache").rglob("*.gz")} - {*files}
    assert not [f for f in new if b"gains" in gzip.decompress(f.read_bytes())]  # digests of files, no scores


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--want", "law=1"], "Unknown stage 'law' in --want"),
     (["--want", "s1=much"], "--want s1=much: expected STAGE=NUMBER"),
     (["--want", "s1=-1"], "expected a number of 0 or more"),
     (["--want", "s1=nan"], "expected a number of 0 or more"),
     (["--want", "s1=0"], "names no stage with a weight above 0"),
     (["--want", "s1=1,s1=2"], "--want names s1 twice"),
     (["--want", ","], "names no stage with a weight above 0"),
     (["--want", "s1", "--keep", "generl"], "Unknown group of tasks 'generl' in --keep. Did you mean 'general'?"),
     (["--want", "s1", "--merge", "magmax"], "magmax is not linear .* --rule: average, blend"),
     (["--want", "s1", "--merge", "mean"], "Unknown merge entry 'mean' in --merge"),
     (["--want", "s1", "--rule", "opcm"], "opcm cannot give experts weights .* average, blend"),
     (["--want", "s1", "--rule", "avrage"], "Unknown rule 'avrage'"),
     (["--want", "s1", "--tries", "0"], "--tries 0: expected 1 or more")],
)  # fmt: skip
def test_bad_questions_are_refused(words: list[str], said: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = remixed(run, *words)
    assert code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(said, error), error
    assert not out.exists()


def test_a_run_without_a_linear_rule_or_experts_or_with_a_deleted_one_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "one", tmp_path / "gone")
    data = recipe(home, "one", "two", merge=["magmax"])
    data["stages"][0]["expert"] = str(tmp_path / "gone")
    data["stages"].append({"name": "untested", "expert": str(home / "base")})
    new = Run.open(parse_recipe({**data, "name": "new"}), tmp_path / "new")
    words = ["--want", "s1=1", "--rule", "average"]
    assert main(["remix", str(new.folder), *words]) == 2
    assert "stores no expert of stage s1 yet. Train it first: contmerge run" in capsys.readouterr().err
    done = run_recipe(parse_recipe({**data, "stages": data["stages"][:2]}), tmp_path / "run", until="train")
    assert main(["remix", str(done.folder), "--want", "s1=1"]) == 2
    assert "magmax is not linear in the experts" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "gone")
    assert main(["remix", str(done.folder), *words]) == 2
    assert "The expert of stage s1 was deleted" in capsys.readouterr().err
    assert main(["remix", str(new.folder), "--want", "untested=1", "--rule", "average"]) == 2
    assert "the stage has no tasks" in capsys.readouterr().err


def test_settings_under_which_no_weight_can_be_replaced_are_refused(run: Run) -> None:
    evaluate = run.recipe.evaluate.model_copy(update={"backend": "vllm"})
    other = Run(run.folder, run.recipe.model_copy(update={"evaluate": evaluate}))
    with pytest.raises(ResourceError, match=r"evaluate\.backend: vllm"):
        Remix.find(other, Wish({"s1": 1.0}), Crew())
