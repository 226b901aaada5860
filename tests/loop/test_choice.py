"""The forgetting budget: merges that hold it, that a rung of the ladder mends, and that nothing mends."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from pyarrow import parquet
from safetensors.torch import load_file
from toys.guarded import make_home, recipe
from toys.models import write_jsonl
from toys.reports import make_score

from hf_contmerge.errors import BudgetError, RecipeError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.loop.verify import verify_run
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.in_mergekit.replay import mergekit_yaml
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Merged, Output, write_merged
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import MergePlace
from hf_contmerge.run.recipe.changes import changes
from hf_contmerge.run.recipe.parts import Guard
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe
from hf_contmerge.run.scores import load_scores
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.scoring.forgetting.budget import judge
from hf_contmerge.train_strategies.replay import Replay

Data = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("guarded"))


def carried_out(data: Data, folder: Path) -> Run:
    return run_recipe(parse_recipe(data), folder, until="merge")


def merged(run: Run, t: int) -> MergePlace:
    return run.merged(t, run.recipe.merge[0])


def whats(record: Data) -> list[str]:
    return [t["what"] for t in record["tries"]]


# Whole runs


def test_what_changes_nothing_holds_a_budget_of_zero(home: Path, tmp_path: Path) -> None:
    run = carried_out(recipe(home, "quiet", "quiet2", guard={"max_forgetting": 0}), tmp_path / "run")
    for t in (1, 2):
        record = merged(run, t).record("merge")
        assert record["guard"]["tripped"] is False
        assert whats(record) == ["fold"]
        assert record["scale"] == 1.0
    assert {s["group"] for s in record["guard"]["losses"]} == {"general", "s1"}
    assert [g["group"] for g in record["guard"]["gains"]] == ["s2"]
    assert "folded" not in record


def test_shrinking_repairs_a_merge(home: Path, tmp_path: Path) -> None:
    guard = {"max_forgetting": 0.15, "on": ["general"]}
    run = carried_out(recipe(home, "loud", guard=guard), tmp_path / "run")
    record = merged(run, 1).record("merge")
    assert record["guard"]["tripped"] is True
    assert record["guard"]["taken"] == "shrink"
    assert whats(record)[0] == "fold"
    assert record["tries"][0]["held"] is False
    held = [t["scale"] for t in record["tries"] if t["held"]]
    assert record["scale"] == max(held) < 1
    assert record["parameters"] == {"lambda": record["scale"]}
    assert f"lambda: {record['scale']}" in merged(run, 1).mergekit_recipe.read_text()
    first, last = record["tries"][0]["losses"][0]["mean"], record["guard"]["losses"][0]["mean"]
    assert first < last < 0
    kept = load_scores(merged(run, 1).validation)
    assert kept["known"].utility == next(t for t in record["tries"] if t["taken"])["utilities"]["known"]


def test_nothing_holds_and_the_mended_recipe_goes_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_contmerge.train import main

    path, folder = tmp_path / "recipe.yml", tmp_path / "run"
    guard = {"max_forgetting": 0.001, "ladder": ["shrink"]}
    path.write_text(json.dumps(recipe(home, "quiet", "deaf", guard=guard)))
    assert main([str(path), "--run", str(folder), "--until", "merge"]) == 3
    told = capsys.readouterr().err
    assert "The merge task_arithmetic of stage s2 forgets more than guard.max_forgetting allows (0.001)" in told
    assert "nats, at least" in told
    assert "Tried: shrink" in told
    run = Run.load(folder)
    one, two = merged(run, 1), merged(run, 2)
    before = one.record("merge")
    assert (before["guard"]["tripped"], whats(before)) == (False, ["fold"])
    assert weights_sha256(one.model) == before["model_sha256"]
    assert one.running.is_dir()
    assert {p.name for p in two.folder.iterdir()} == {"guard.json"}
    report = json.loads(two.guard_file.read_text())
    assert not any(t["held"] for t in report["tries"])
    assert main([str(path), "--run", str(folder), "--until", "merge", "--set", "guard.ladder=[keep_previous]"]) == 0
    assert one.record("merge") == before
    assert not two.guard_file.exists()
    after = two.record("merge")
    assert (after["guard"]["taken"], after["guard"]["tripped"]) == ("keep_previous", True)
    assert after["folded"] == [{"stage": 1, "replayed": False}]
    assert weights_sha256(two.model) == weights_sha256(one.model) == after["model_sha256"]
    assert after["norms"] == before["norms"]
    assert two.running.is_dir()


def test_another_rule_takes_over_and_later_stages_go_on_with_it(home: Path, tmp_path: Path) -> None:
    """The sum at lambda 1 forgets; an exponential average with a beta near 1 hardly moves."""
    ladder = [{"rule": "ema", "parameters": {"beta": 0.99}}]
    data = recipe(home, "loud", "quiet", guard={"max_forgetting": 0.01, "on": "general", "ladder": ladder})
    run = carried_out(data, tmp_path / "run")
    one, two = (merged(run, t).record("merge") for t in (1, 2))
    assert (one["guard"]["taken"], one["rule"]) == ("rule", "ema")
    assert one["goes_on"] == two["goes_on"] == {"rule": "ema", "parameters": {"beta": 0.99}}
    assert (two["guard"]["tripped"], two["rule"], len(two["norms"]["experts"])) == (False, "ema", 2)
    assert "merge_method: ema" in merged(run, 2).mergekit_recipe.read_text()


def test_a_first_stage_that_is_left_out_leaves_the_base(home: Path, tmp_path: Path) -> None:
    guard = {"max_forgetting": 0.001, "on": ["general"], "ladder": ["keep_previous"]}
    run = carried_out(recipe(home, "deaf", "quiet", guard=guard), tmp_path / "run")
    one, two = (merged(run, t).record("merge") for t in (1, 2))
    assert (one["folded"], one["scale"]) == ([], 0.0)
    assert one["model_sha256"] == weights_sha256(home / "base")
    assert not merged(run, 1).mergekit_recipe.exists()
    assert two["folded"] == [{"stage": 2, "replayed": False}]
    assert (two["guard"]["tripped"], len(two["norms"]["experts"])) == (False, 1)


def killed_at(data: Data, folder: Path, when: Callable[[str], bool], count: int) -> int:
    """Carry out a recipe in a forked process that kills itself before the count-th folder of a name is made."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [count]

    def hook(event: str, args: Any) -> None:
        if event == "os.mkdir" and when(os.fspath(args[0])):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        carried_out(data, folder)
    finally:
        os._exit(1)


def test_killed_in_the_middle_of_the_ladder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_CONTMERGE_CACHE", str(tmp_path / "cache"))
    data = recipe(home, "loud", guard={"max_forgetting": 0.15, "on": ["general"]})
    whole = merged(carried_out(data, tmp_path / "whole"), 1).record("merge")
    code = killed_at(data, tmp_path / "run", lambda path: path.endswith("task_arithmetic/.merged"), 3)
    assert code == -signal.SIGKILL
    resumed = merged(carried_out(data, tmp_path / "run"), 1).record("merge")

    def decided(record: Data) -> Data:
        tries = [{k: v for k, v in t.items() if k != "seconds"} for t in record["tries"]]
        return {"tries": tries, **{k: record[k] for k in ("guard", "scale", "model_sha256", "parameters")}}

    assert decided(resumed) == decided(whole)


def test_results_are_told_of_other_documents_than_choices(home: Path, tmp_path: Path) -> None:
    run = run_recipe(parse_recipe(recipe(home, "quiet", guard={"max_forgetting": 0.1})), tmp_path / "run")
    test, chosen = load_scores(run.base)["known"], load_scores(run.base.validation)["known"]
    assert len(test.gains) + len(chosen.gains) == 24
    assert not set(test.documents) & set(chosen.documents)
    undone = run.redo("merge")
    assert any("merge of" in u for u in undone)
    assert not merged(run, 1).validation.folder.exists()


@pytest.mark.parametrize("name", ["average", "opcm"])
def test_mergekit_makes_a_shrunk_merge_from_its_recipe(home: Path, tmp_path: Path, name: str) -> None:
    """No parameter of these rules shrinks them, so that the recipe says a number for the scale."""
    experts = [home / "quiet", home / "loud"]
    base, rule, crew = Weights(home / "base"), get_rule(name), Crew(workers=1)
    found = merge_experts(rule, base, [open_expert(e, base) for e in experts], running_out=tmp_path / "s", crew=crew)
    scale = found.scale * 0.375
    out = Output(tmp_path / "merged")
    out.folder.mkdir()
    write_merged(rule, base, tmp_path / "s", Merged(found.norms, scale), out, crew=crew)
    recipe_file = mergekit_yaml(name, rule, base=home / "base", experts=experts, dtype=None, scale=scale)
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe_file))
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True, copy_tokenizer=False))
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("merged", "theirs"))
    assert ours.keys() == theirs.keys()
    for tensor, same in zip(ours.values(), theirs.values(), strict=True):
        assert torch.equal(tensor, same)


@pytest.mark.slow
def test_a_stage_is_trained_again_with_examples_of_earlier_ones(home: Path, tmp_path: Path) -> None:
    data = recipe(home, "quiet", guard={"max_forgetting": 0.0, "on": "stages", "ladder": ["replay", "keep_previous"]})
    data["stages"] = [
        {"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 8}} for n in ("own", "other")
    ]
    data["stages"][1]["train"] = {"learning_rate": 1.0}  # which no example of the first stage makes good
    data["merge"] = [{"rule": "ema", "parameters": {"beta": 0.0}, "start_from": "previous"}]
    data["train"] = {"max_steps": 12, "per_device_train_batch_size": 4, "max_length": 32, "learning_rate": 1e-4,
                     "save_strategy": "no"}  # fmt: skip
    run = carried_out(data, tmp_path / "run")
    place = merged(run, 2)
    record = place.record("merge")
    assert whats(record)[:2] == ["fold", "replay"]
    again = place.replayed.record("train")
    assert again["rung"]["do"] == "replay"
    assert again["model_sha256"] != run.expert(2, "previous").record("train")["model_sha256"]
    assert again["examples"] == run.expert(2, "previous").record("train")["examples"]
    assert not (place.folder / ".replay-memory").exists()
    assert record["guard"]["taken"] == "keep_previous"
    assert record["tries"][1]["scale"] == 1.0
    assert record["tries"][1]["utilities"] != record["tries"][0]["utilities"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "rung", "wanted"),
    [({}, {}, 16), ({}, {"examples": 3}, 3), ({"examples": 3}, {}, 3), ({}, {"tokens": 60}, None)],
)
def test_a_rungs_memory_has_the_size_that_was_set(
    own: Data, rung: Data, wanted: int | None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the rung, or for the run; in tokens too."""
    ladder = [{"do": "replay", "parameters": rung}, "keep_previous"]
    data = recipe(home, "quiet", guard={"max_forgetting": 0.0, "on": "stages", "ladder": ladder})
    data["stages"] = [
        {"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 8}} for n in ("own", "other")
    ]
    data["stages"][1]["train"] = {"learning_rate": 1.0}
    data["merge"] = [{"rule": "ema", "parameters": {"beta": 0.0}, "start_from": "base"}]
    strategy = {"strategy": ["full", "replay"], "parameters": {"replay": own}} if own else {}
    data["train"] = {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 32, "learning_rate": 1e-4,
                     "save_strategy": "no", **strategy}  # fmt: skip
    held: list[Any] = []
    mix = Replay.mix

    def noted(self: Replay, fresh: Any, memory: Path | None, *, seed: int) -> Any:
        for path in sorted(memory.glob("*.parquet")) if memory else ():
            held.extend(parquet.read_table(path).to_pylist())
        return mix(self, fresh, memory, seed=seed)

    monkeypatch.setattr(Replay, "mix", noted)
    assert "replay" in whats(merged(carried_out(data, tmp_path / "run"), 2).record("merge"))
    if wanted:
        assert len(held) == wanted
    else:
        assert 0 < len(held) < 16
        assert sum(row["replay_size"] for row in held) <= 60


@pytest.mark.slow
def test_an_earlier_step_takes_the_stages_place(home: Path, tmp_path: Path) -> None:
    """The latest one within the budget is taken, and the next stage's merge goes on from there."""

    words = [f"{chr(97 + i % 26)}{chr(98 + i % 24)}x" for i in range(200)]
    rows = [{"text": " ".join(words[i : i + 15])} for i in range(40)]
    noise = write_jsonl(tmp_path / "noise-earlier.jsonl", rows)

    def run(name: str, strategy: list[str], ladder: list[Any], budget: float) -> Run:
        data = recipe(home, "quiet", guard={"max_forgetting": budget, "on": "general", "ladder": ladder})
        texts = {"s1": str(noise), "s2": str(home / "other.jsonl")}
        stages = [{"name": n, "dataset": {"path": path, "heldout": 8}} for n, path in texts.items()]
        data["stages"] = stages[: 2 if budget else 1]
        data["merge"] = [{"rule": "task_arithmetic", "parameters": {"lambda": 1.0}, "start_from": "base"}]
        data["train"] = {"max_steps": 8, "per_device_train_batch_size": 4, "max_length": 32, "learning_rate": 1e-2,
                         "lr_scheduler_type": "constant", "save_strategy": "no", "strategy": strategy}  # fmt: skip
        return carried_out(data, tmp_path / name)

    rungs = [{"do": "earlier", "parameters": {"checkpoints": 3}}, "keep_previous"]
    none = merged(run("none", ["lora", "soup"], rungs, 0.0), 1)
    tries = none.record("merge")["tries"]
    assert [(t["what"], t.get("step")) for t in tries] == [
        ("fold", None), ("earlier", 6), ("earlier", 4), ("earlier", 2), ("keep_previous", None)
    ]  # fmt: skip
    assert not (none.folder / "earlier").exists()
    drops = [-t["losses"][0]["mean"] for t in tries[:4]]
    assert 0 < drops[3] < drops[0]
    one = run("one", ["lora", "soup"], rungs, 1.05 * drops[3])
    place, record = merged(one, 1), merged(one, 1).record("merge")
    *others, taken = record["tries"]
    assert (taken["held"], any(t["held"] for t in others)) == (True, False)
    assert (record["guard"]["taken"], taken["step"]) == ("earlier", taken["step"])
    assert record["folded"] == [{"stage": 1, "replayed": False, "earlier": taken["step"]}]
    expert = place.earlier_at(taken["step"])
    assert [p.name for p in (place.folder / "earlier").iterdir()] == [str(taken["step"])]
    assert expert.record("train")["model_sha256"] == weights_sha256(expert.model) == record["expert_sha256"][0]
    assert not list(one.folder.glob("stages/*/experts/*/earlier"))
    assert len(merged(one, 2).record("merge")["norms"]["experts"]) >= 1
    assert f"earlier/{taken['step']}/expert" in place.mergekit_recipe.read_text()
    assert not verify_run(one).damages
    assert not verify_run(one).uncovered()


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "word"), [("blend", "take"), ("task_arithmetic", "lambda")], ids=["folded", "scaled"])
def test_rungs_keep_the_coefficient_that_was_found(home: Path, tmp_path: Path, rule: str, word: str) -> None:
    """Earlier steps and retrained experts are folded with it, and shrinking is of the last step again."""
    ladder = [{"do": "earlier", "parameters": {"checkpoints": 2}}, "shrink", "replay", "keep_previous"]
    data = recipe(home, "quiet", guard={"max_forgetting": 0.0, "on": ["general", "stages"], "ladder": ladder})
    data["stages"] = [
        {"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 8}} for n in ("own", "other")
    ]
    data["stages"][1]["train"] = {"learning_rate": 1.0}
    data["merge"] = [{"rule": rule, "parameters": {word: "auto"}, "start_from": "base"}]
    data["train"] = {"max_steps": 6, "per_device_train_batch_size": 4, "max_length": 32, "learning_rate": 1e-4,
                     "save_strategy": "no"}  # fmt: skip
    record = merged(carried_out(data, tmp_path / "run"), 2).record("merge")
    tries = record["tries"]
    assert list(dict.fromkeys(whats(record))) == ["auto", "earlier", "shrink", "replay", "keep_previous"]
    searched = [t for t in tries if t["what"] == "auto"]
    allowed = [t for t in searched if t["keeps_general"]] or searched
    best = max(allowed, key=lambda t: (t["objective"], -t["parameters"][word]))["parameters"][word]
    assert best != get_rule(rule).parameters()[word]  # else the default would pass
    again = [t for t in tries if t["what"] in ("earlier", "replay")]
    assert {t["parameters"][word] for t in again} == {best}
    assert [t.get("step") for t in tries if t["what"] in ("earlier", "shrink")][:3] == [4, 2, None]
    halved = next(t for t in tries if t["what"] == "shrink")
    assert halved["scale"] * (halved["parameters"][word] if rule == "blend" else 1.0) == pytest.approx(best / 2)


def test_an_earlier_step_has_statistics_of_its_own(home: Path, tmp_path: Path) -> None:
    """A rule that needs them folds it as it folds the last step."""
    ladder = [{"do": "earlier", "parameters": {"checkpoints": 1}}, "keep_previous"]
    data = recipe(home, "quiet", guard={"max_forgetting": 0.0, "on": "general", "ladder": ladder})
    data["stages"] = [{"name": "s1", "dataset": {"path": str(home / "own.jsonl"), "heldout": 8}}]
    data["merge"] = [{"rule": "covariance", "parameters": {"space": "inputs"}}]
    data["train"] = {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 32, "learning_rate": 0.1,
                     "save_strategy": "no", "statistics": ["inputs"]}  # fmt: skip
    tries = merged(carried_out(data, tmp_path / "run"), 1).record("merge")["tries"]
    assert [(t["what"], t.get("step")) for t in tries] == [("fold", None), ("earlier", 2), ("keep_previous", None)]


# Recipes


def test_guards_as_recipes_write_them(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(
        "name: x\nbase_model: b\nstages: [{name: s, dataset: a.jsonl}]\nmerge: [magmax]\n"
        "guard: {max_forgetting: 0.02, on: [stages], ladder: [shrink, {rule: opcm}, replay, keep_previous]}\n"
    )
    guard = load_recipe(path).guard
    assert guard
    assert guard.on == ("stages",)
    assert [r.do for r in guard.ladder] == ["shrink", "rule", "replay", "keep_previous"]
    assert load_recipe(path, ["guard.on=stages"]).tunes


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"max_forgeting": 0.1}, "max_forgetting"),
        ({"ladder": ["shrnk"]}, "guard.ladder.0"),
        ({"ladder": [{"do": "shrink", "rule": "opcm"}]}, "the others have no `rule`"),
        ({"ladder": [{"do": "shrink", "parameters": {"a": 1}}]}, "`shrink` has no parameters"),
        ({"confidence": 1.0}, "confidence"),
        ({"ladder": [{"do": "earlier", "parameters": {"checkpoints": 0}}]}, "`checkpoints`, a number from 1"),
        ({"ladder": [{"do": "earlier", "parameters": {"steps": 3}}]}, "`checkpoints`, a number from 1"),
    ],
)
def test_bad_guards_are_refused(home: Path, guard: Data, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe(recipe(home, "quiet", guard=guard))


def test_a_guard_needs_something_to_watch(home: Path) -> None:
    data = recipe(home, "quiet", guard={"on": ["general"]})
    data["evaluate"]["general_tasks"] = []
    with pytest.raises(RecipeError, match=r"no tasks to watch: set evaluate\.general_tasks"):
        parse_recipe(data)


def test_an_unknown_rule_in_the_ladder_is_told_before_the_run(home: Path, tmp_path: Path) -> None:
    data = recipe(home, "quiet", guard={"ladder": [{"rule": "opcn"}]})
    with pytest.raises(RecipeError, match=r"Unknown rule 'opcn' in guard.ladder.0. Did you mean 'opcm'"):
        carried_out(data, tmp_path / "run")


def test_a_guard_that_comes_later_measures_anew(home: Path) -> None:
    without, with_guard, mended = (
        parse_recipe(recipe(home, "quiet", **fields))
        for fields in ({}, {"guard": {}}, {"guard": {"max_forgetting": 0.5, "ladder": ["replay"]}})
    )
    assert [(c.field, c.phase) for c in changes(without, with_guard)] == [("documents measured (guard, auto)", "score")]
    assert list(changes(with_guard, mended)) == []
    half = with_guard.model_copy(update={"evaluate": with_guard.evaluate.model_copy(update={"validation": 0.4})})
    assert [(c.field, c.phase) for c in changes(with_guard, half)] == [("evaluate.validation", "merge")]
    assert list(changes(without, half.model_copy(update={"guard": None}))) == []


# Judging


def judged(now: Data, base: Data, after: Data, guard: Data) -> Any:
    def scores(values: Data) -> Data:
        return {n: make_score(u, "accuracy" if n == "quiz" else "perplexity", seed=n) for n, u in values.items()}

    data = {
        "name": "x", "base_model": "b", "merge": ["magmax"],
        "stages": [{"name": n, "dataset": "a.jsonl"} for n in ("one", "two")],
        "evaluate": {"general_tasks": ["quiz"]}, "guard": guard,
    }  # fmt: skip
    parsed = parse_recipe(data)
    assert parsed.guard
    return judge(scores(now), scores(base), {"one": scores(after)}, parsed, parsed.guard, ["one", "two"])


BASE = {"quiz": 0.5, "one_heldout": -4.0, "two_heldout": -4.0}


def test_blocks_are_judged_apart() -> None:
    now = {"quiz": 0.5, "one_heldout": -3.4, "two_heldout": -3.0}
    found = judged(now, BASE, {**BASE, "one_heldout": -3.0}, {"max_forgetting": 0.1})
    assert not found.held
    assert (found.worst.group, found.worst.block) == ("one", "perplexity")
    assert found.drop == pytest.approx(0.4)
    assert "stage one lost 0.4 nats, at least 0.3" in found.in_words(Guard(max_forgetting=0.1))
    assert [(g.group, round(g.change.mean, 6)) for g in found.gains] == [("two", 1.0)]
    assert judged(now, BASE, {**BASE, "one_heldout": -3.0}, {"max_forgetting": 0.5}).held
    assert judged(now, BASE, {**BASE, "one_heldout": -3.0}, {"max_forgetting": 0.1, "on": "general"}).held


def test_a_drop_within_the_noise_breaks_nothing() -> None:
    now = {**BASE, "quiz": 0.5 - 1 / 24}
    found = judged(now, BASE, BASE, {"max_forgetting": 0})
    assert found.held
    low = min(s.change.low for s in found.losses)
    told = f"within the noise; a loss of {-low:.4g} of accuracy on the general tasks cannot be ruled out"
    assert found.in_words(Guard(max_forgetting=0)).endswith(told)


def test_a_gain_is_called_one() -> None:
    better = judged({**BASE, "one_heldout": -3.5}, BASE, BASE, {"max_forgetting": 0, "on": "stages"})
    assert better.in_words(Guard(max_forgetting=0)) == "stage one gained 0.5 nats"


def test_a_budget_error_is_one_of_ours() -> None:
    assert BudgetError.exit_code == 3
