"""Baselines of a run: joint training on all stages at once, a router, examples in the prompt."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from toys.models import TEXT, toy_llama, write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import DataError, RecipeError
from hf_contmerge.loop.plan.plan import Findings, make_plan
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.report.card import model_card
from hf_contmerge.report.write import load_results, summary
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import load_scores
from hf_contmerge.training.joint import joint_train

TRAIN = {
    "max_steps": 4, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1.0e-2, "save_strategy": "no",
}  # fmt: skip
WORDS = TEXT.split()
AVERAGE = {"rule": "average", "start_from": "base"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, draw = tmp_path_factory.mktemp("yardsticks"), random.Random(0)
    toy_llama(home / "base", seed=0)
    for i, name in enumerate("ab"):
        rows = [{"text": " ".join(draw.choices(WORDS[8 * i : 8 * i + 8], k=30))} for _ in range(20)]
        write_jsonl(home / f"{name}.jsonl", rows)
    write_jsonl(home / "asked.jsonl", [{"prompt": "the quick", "completion": f" fox {i}"} for i in range(12)])
    pair = {"prompt": "the", "chosen": " fox", "rejected": " dog"}
    write_jsonl(home / "pairs.jsonl", [pair | {"chosen": f" fox {i}"} for i in range(12)])
    said = ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"fox {i}"}] for i in range(12))
    write_jsonl(home / "talks.jsonl", [{"messages": talk} for talk in said])
    return home


def recipe(home: Path, files: str, **more: Any) -> dict[str, Any]:
    names = files.split()
    stages = [{"name": f"s{i}", "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 3}}
              for i, n in enumerate(names, 1)]  # fmt: skip
    fields = {"name": "yard", "base_model": str(home / "base"), "stages": stages, "train": TRAIN, "merge": [AVERAGE]}
    rows = [{"query": "the quick", "choices": [" brown", " fox"], "gold": i % 2} for i in range(6)]
    quiz = {"name": "quiz", "kind": "multiple_choice", "dataset": str(write_jsonl(home / "quiz.jsonl", rows))}
    fields["evaluate"] = {"routed": True, "general_tasks": [quiz]}
    return {**fields, "baselines": ["joint"], **more}


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    fields = recipe(home, "a b", baselines=["joint", "in_context"])
    return run_recipe(parse_recipe(fields), tmp_path_factory.mktemp("yard") / "two")


@pytest.mark.slow
@pytest.mark.parametrize("length", [{}, {"max_steps": -1, "num_train_epochs": 2}])
def test_of_one_stage_the_joint_expert_is_its_own(home: Path, tmp_path: Path, length: dict[str, Any]):
    fields = recipe(home, "a", train={**TRAIN, **length, "strategy": ["full", "replay"]})
    fields["stages"][0]["train"] = {"learning_rate": 3e-3}
    run = run_recipe(parse_recipe(fields), tmp_path / "one", until="train")
    assert weights_sha256(run.joint.model) == weights_sha256(run.expert(1, "base").model)


def test_it_trains_on_all_stages_for_their_steps(run: Run):
    record = run.joint.record("train")
    each = [run.expert(t, "base").record("train") for t in (1, 2)]
    assert record["steps"] == sum(e["steps"] for e in each) == 8
    assert record["examples"] == sum(e["examples"] for e in each) == 34
    assert not run.joint.memory.exists()
    assert set(load_scores(run.joint)) == {"s1_heldout", "s2_heldout", "quiz"}


@pytest.mark.slow
def test_two_stages_of_one_file_see_each_example_twice(home: Path, tmp_path: Path):
    run = run_recipe(parse_recipe(recipe(home, "a a")), tmp_path / "twins", until="train")
    assert run.joint.record("train")["examples"] == 2 * run.expert(1, "base").record("train")["examples"]
    assert run.joint.record("train")["steps"] == 2 * TRAIN["max_steps"]


def test_the_order_of_the_stages_does_not_matter(run: Run, home: Path, tmp_path: Path):
    fields = recipe(home, "a b")
    fields["stages"].reverse()
    other = run_recipe(parse_recipe(fields), tmp_path / "reversed", until="train")
    assert weights_sha256(other.joint.model) == weights_sha256(run.joint.model)


def test_the_report_gives_shares_of_its_gain(run: Run):
    results = load_results(run)
    assert results.joint
    merged = results.merges[0]
    found = merged.metrics(results.stages, (), "perplexity")
    base, end, joint = (row for row in (results.base, merged.rows[-1], results.joint.rows[-1]))
    tasks = ("s1_heldout", "s2_heldout")
    gain = [sum(row[t].utility - base[t].utility for t in tasks) for row in (end, joint)]
    assert found["joint_kept"] == pytest.approx(gain[0] / gain[1])
    assert found["intransigence"] == pytest.approx(joint[tasks[1]].utility - end[tasks[1]].utility)
    assert summary(run, results)["experts"]["joint"]["metrics"]["perplexity"]["joint_kept"] == pytest.approx(1)
    page = (run.folder / "report" / "report.md").read_text()
    assert f"{100 * gain[0] / gain[1]:.0f} % of joint training's gain (perplexity)" in page
    assert "Dashed line: an expert trained on all stages at once." in page


@pytest.mark.slow
def test_it_resumes_is_undone_and_follows_its_recipe(run: Run, home: Path, tmp_path: Path):
    copy = tmp_path / "copied"
    shutil.copytree(run.folder, copy, symlinks=True)
    before = weights_sha256(run.joint.model)
    for phase in ("report", "score", "train"):  # a kill after the last merge
        (Run.load(copy).report if phase == "report" else Run.load(copy).joint).undo(phase)
    again = run_recipe(parse_recipe(recipe(home, "a b")), copy)
    assert weights_sha256(again.joint.model) == before
    assert "train of stages/02-s2/baselines/joint" in again.redo("train")
    assert not again.joint.is_done("train")
    third = recipe(home, "a b asked")
    planned = make_plan(Run(copy, parse_recipe(third)), Findings())
    assert [p["place"] for p in planned["phases"] if p["place"].endswith("joint")] == ["03-s3/baselines/joint"] * 2


def test_plan_prices_it_like_all_stages(home: Path, tmp_path: Path):
    phases = make_plan(Run(tmp_path / "planned", parse_recipe(recipe(home, "a b"))), Findings())["phases"]
    training = {p["place"]: p["seconds"] for p in phases if p["phase"] == "train"}
    joint = training.pop("02-s2/baselines/joint")
    assert joint == pytest.approx(sum(training.values()), abs=0.02)


def test_its_settings_are_those_that_all_stages_share(home: Path):
    train = {**TRAIN, "strategy": ["lora", "replay"], "parameters": {"lora": {"r": 4}, "replay": {"share": 0.2}}}
    fields = recipe(home, "a b", train=train)
    fields["stages"][0]["train"] = {"learning_rate": 1e-3, "weight_decay": 0.1}
    fields["stages"][1]["train"] = {"learning_rate": 1e-3, "weight_decay": 0.2}
    joint = joint_train(parse_recipe(fields), 9)
    assert joint.strategy == ("lora",)
    assert joint.parameters_of() == {"lora": {"r": 4}}
    assert joint.sft_fields["learning_rate"] == 1e-3
    assert "weight_decay" not in joint.sft_fields
    assert joint.sft_fields["max_steps"] == 9


@pytest.mark.parametrize(
    ("files", "message"),
    [("a pairs", "stage s2 has preference pairs"), ("a talks", "stages differ (s1: text, s2: messages)")],
)
def test_forms_without_a_union_are_refused(home: Path, tmp_path: Path, files: str, message: str):
    with pytest.raises(DataError) as error:
        run_recipe(parse_recipe(recipe(home, files)), tmp_path / "refused")
    assert message in str(error.value)
    assert not list((tmp_path / "refused").glob("stages/*/experts"))


@pytest.mark.slow
def test_texts_and_prompts_have_a_union(home: Path, tmp_path: Path):
    run = run_recipe(parse_recipe(recipe(home, "a asked")), tmp_path / "mixed", until="train")
    assert run.joint.record("train")["examples"] == 17 + 9


@pytest.mark.parametrize("name", ["joint", "in_context"])
def test_given_experts_are_refused(name: str, home: Path, tmp_path: Path):
    fields = recipe(home, "a", baselines=[name])
    fields["stages"].append({"name": "given", "expert": str(home / "base")})
    with pytest.raises(RecipeError, match=rf"baselines \({name}\) needs the examples of every stage, and given has"):
        parse_recipe(fields)
    (tmp_path / "given.yml").write_text(json.dumps(fields))
    assert main(["run", str(tmp_path / "given.yml"), "--run", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_an_oracle_has_each_stage_s_own_expert(run: Run):
    oracle, base = load_scores(run.baseline("oracle")), load_scores(run.base)
    for t in (1, 2):
        task = f"s{t}_heldout"
        assert oracle[task].gains == load_scores(run.expert(t, "base"))[task].gains
    assert oracle["quiz"].gains == base["quiz"].gains, "no stage teaches general tasks"


def test_a_router_tells_texts_of_other_words_apart(run: Run):
    record = run.baseline("routed").record("score")["router"]
    assert record["prompts"] == [17, 17]
    assert sum(sum(of.values()) for of in record["confusion"].values()) == 3 + 3 + 6
    assert all(record["confusion"][s]["base"] == 0 for s in ("s1", "s2")), "the base is a choice for general tasks"


def test_routed_experts_are_in_report_and_card(run: Run):
    page = (run.folder / "report" / "report.md").read_text()
    assert "Merge or route" in page
    assert "Documents by the pick of routed experts" in page
    card = model_card(run, run.recipe.merge[0])
    assert "Merged or routed" in card
    assert "separate experts, with an oracle" in card
    oracle = load_results(run).expert("oracle")
    assert oracle
    assert oracle.metrics(run.recipe.stages, (), "perplexity")["normalised"] == pytest.approx(1)


def test_of_one_stage_the_router_has_the_expert(home: Path, tmp_path: Path):
    run = run_recipe(parse_recipe(recipe(home, "a", baselines=[])), tmp_path / "alone", until="score")
    own, routed, oracle = (load_scores(p)["s1_heldout"] for p in (
        run.expert(1, "base"), run.baseline("routed"), run.baseline("oracle")))  # fmt: skip
    assert own.gains == routed.gains == oracle.gains


def test_routing_needs_separate_experts(home: Path, tmp_path: Path):
    fields = recipe(home, "a b", merge=[{"rule": "average", "start_from": "previous"}])
    with pytest.raises(RecipeError, match="no merge entry trains them"):
        run_recipe(parse_recipe(fields), tmp_path / "none")


# Examples in the prompt


def test_the_base_with_examples_is_measured_on_the_stages(run: Run):
    place = run.baseline("in_context")
    scores, base = load_scores(place), load_scores(run.base)
    assert set(scores) == {"s1_heldout", "s2_heldout"}, "general tasks have no training examples"
    assert place.record("score")["measured_by"]["shots"] == 4
    for task, score in scores.items():
        assert score.gains != base[task].gains
        assert score.weights == base[task].weights
        assert score.details["shown"] == {"shots": 4, "examples": 17, "cut": 0}
        assert score.details["key"] != base[task].details["key"], "the score cache keeps them apart"


def test_report_and_card_have_the_base_with_examples(run: Run):
    page = (run.folder / "report" / "report.md").read_text()
    assert "against the base with 4 examples in its prompt: " in page
    assert "| base with examples in its prompt | s2 |" in page
    assert "the base model, with training examples in its prompt" in model_card(run, run.recipe.merge[0])
    line = load_results(run).expert("in_context")
    assert line
    assert line.metrics(run.recipe.stages, ("quiz",), "perplexity")["acc"] is not None


@pytest.mark.slow
def test_examples_are_resumed_undone_and_measured_again(run: Run, home: Path, tmp_path: Path):
    copy = tmp_path / "copied"
    shutil.copytree(run.folder, copy, symlinks=True)
    before = load_scores(run.baseline("in_context"))
    for place in (Run.load(copy).report, Run.load(copy).baseline("in_context")):  # a kill before the last phase
        place.undo("report" if place.folder == copy else "score")
    fields = recipe(home, "a b", baselines=["joint", "in_context"])
    again = run_recipe(parse_recipe(fields), copy)
    assert {k: s.gains for k, s in load_scores(again.baseline("in_context")).items()} == {
        k: s.gains for k, s in before.items()
    }
    others = [p.stat().st_mtime_ns for p in sorted(copy.glob("stages/*/*/*/score.json")) if "in_context" not in str(p)]
    fields["evaluate"]["shots"] = 2
    fewer = run_recipe(parse_recipe(fields), copy, until="score")
    assert load_scores(fewer.baseline("in_context"))["s1_heldout"].details["shown"]["shots"] == 2
    assert others == [
        p.stat().st_mtime_ns for p in sorted(copy.glob("stages/*/*/*/score.json")) if "in_context" not in str(p)
    ]
    assert "score of stages/02-s2/baselines/in_context" in fewer.redo("score")
    assert not fewer.baseline("in_context").is_done("score")


def test_plan_prices_the_longer_prompts(home: Path, tmp_path: Path):
    fields = recipe(home, "a b", baselines=["in_context"])
    fields["evaluate"] |= {"shots": 8, "general_tasks": []}
    phases = make_plan(Run(tmp_path / "planned", parse_recipe(fields)), Findings())["phases"]
    memory = {p["place"]: p["memory_bytes"] for p in phases if p["phase"] == "score"}
    assert memory["02-s2/baselines/in_context"] > memory["00-base"] + 2**20


def test_examples_of_preferences_are_refused(home: Path, tmp_path: Path):
    fields = recipe(home, "a pairs", baselines=["in_context"])
    (tmp_path / "pairs.yml").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="in_context needs texts, conversations or prompts, and stage s2 has pref"):
        run_recipe(parse_recipe(fields), tmp_path / "refused")
    assert main(["run", str(tmp_path / "pairs.yml"), "--run", str(tmp_path / "run")]) == 2
    assert not list(tmp_path.glob("*/stages/*/experts"))
    assert not list(tmp_path.glob("*/stages/00-base/score.json"))


def test_examples_need_a_task_of_a_stage(home: Path):
    fields = recipe(home, "a", baselines=["in_context"])
    fields["stages"][0]["dataset"]["heldout"] = 0
    with pytest.raises(RecipeError, match=r"baselines \(in_context\) has nothing to measure: no stage has"):
        parse_recipe(fields)
    with pytest.raises(RecipeError, match=r"evaluate\.shots: Input should be greater than or equal to 1"):
        parse_recipe(recipe(home, "a", evaluate={"shots": 0}))
