"""A whole run of a toy model, looked at from all sides; then runs that go on, change course, or take given experts."""

import json
import math
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toys.models import perturbed, toy_llama, write_jsonl

from hf_contmerge.errors import RunError
from hf_contmerge.loop._job import MergeJob
from hf_contmerge.loop.plan.checks import prepare
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merge_rules.opcm import Opcm
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe
from hf_contmerge.run.scores import BLOCKS, load_scores
from hf_contmerge.runtime.ranks import find_ranks
from hf_contmerge.runtime.records import read_record, write_record
from hf_contmerge.scoring.forgetting.lines import load_lines

Data = dict[str, Any]
WORDS = "the quick brown fox jumps over lazy dog while red blue green birds sing songs about law medicine and code"
TRAIN = {
    "max_steps": 4, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1.0e-2, "save_strategy": "no",
}  # fmt: skip
KINDS = ("base", "merged-ema", "previous")
ENTRIES = ("average", "ema", "magmax", "opcm")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two experts, three texts and a few questions."""
    home, draw = tmp_path_factory.mktemp("home"), random.Random(0)
    base = toy_llama(home / "base", seed=0)
    for seed, name in enumerate(("expert", "minus"), 1):
        perturbed(base, home / name, seed=seed, size=0.005)
    words = WORDS.split()
    for i, name in enumerate("abc"):
        own = words[6 * i : 6 * i + 8]
        write_jsonl(home / f"{name}.jsonl", [{"text": " ".join(draw.choices(own, k=30))} for _ in range(20)])
    for name in ("choice", "own"):
        rows = [{"query": "the quick", "choices": ["brown", "fox", "red"], "gold": draw.randrange(3)} for _ in range(6)]
        write_jsonl(home / f"{name}.jsonl", rows)
    return home


def stages(home: Path, names: str) -> list[Data]:
    return [{"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 3}} for n in names]


def choice(home: Path, name: str) -> Data:
    return {"name": name, "kind": "multiple_choice", "dataset": str(home / f"{name}.jsonl")}


def texts(home: Path, name: str) -> Data:
    return {"name": name, "kind": "perplexity", "dataset": {"path": str(home / "c.jsonl"), "heldout": 2}}


@pytest.fixture(scope="module")
def recipe(home: Path) -> Data:
    """Three stages, the second with a task of its own; four rules; one general task."""
    three = stages(home, "abc")
    three[1]["tasks"] = [choice(home, "own")]
    return {
        "name": "whole",
        "base_model": str(home / "base"),
        "stages": three,
        "train": TRAIN,
        "merge": ["magmax", "opcm", {"rule": "average"}, {"rule": "ema", "parameters": {"beta": 0.4}}],
        "evaluate": {"general_tasks": [choice(home, "choice")]},
    }


@pytest.fixture(scope="module")
def run(recipe: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(parse_recipe(recipe), tmp_path_factory.mktemp("run") / "whole")


@pytest.fixture(scope="module")
def small(home: Path) -> Data:
    """Two stages, one rule: what the tests go on from that change a recipe."""
    return {
        "name": "small", "base_model": str(home / "base"), "stages": stages(home, "ab"), "train": TRAIN,
        "merge": [{"rule": "magmax"}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def small_run(small: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(parse_recipe(small), tmp_path_factory.mktemp("small") / "run")


@pytest.fixture
def go_on(small: Data, small_run: Run, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that runs a changed recipe in a copy of the small run."""
    folder = tmp_path / "run"
    shutil.copytree(small_run.folder, folder, symlinks=True)
    return lambda **changes: run_recipe(parse_recipe({**small, **changes}), folder)


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def times(folder: Path, names: str = "*.json") -> dict[str, int]:
    """Return when the records, or other files, were last written."""
    files = [p for p in (folder / "stages").rglob(names) if p.is_file()]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


# The folder


def test_layout(run: Run) -> None:
    assert listing(run.folder) == {
        ".lock", ".report.lock", "recipe.yml", "inputs.json", "tasks", "stages", "report", "report.json",
    }  # fmt: skip
    assert listing(run.folder / "stages") == {"00-base", "01-a", "02-b", "03-c"}
    assert listing(run.folder / "stages/00-base") == {"model", "score.json", "score.parquet"}
    tasks = ("a_heldout", "b_heldout", "c_heldout", "choice", "own")
    assert listing(run.tasks) == {f"{t}{suffix}" for t in tasks for suffix in (".yaml", ".jsonl", ".parquet")}
    assert run.base_model.resolve() == Path(run.recipe.base_model)
    for t in run.stage_numbers():
        stage = run.folder / "stages" / f"{t:02d}-{run.stage(t).name}"
        assert listing(stage) == {"experts", "merges"}
        assert listing(stage / "merges") == set(ENTRIES)
        for kind in listing(stage / "experts"):
            assert listing(stage / "experts" / kind) == {"expert", "train.json", "score.json", "score.parquet"}


def test_report_files(run: Run) -> None:
    wanted = {"index.html", "report.md", "scores.csv", "summary.json", "forgetting.png"}
    assert wanted <= listing(run.folder / "report")
    assert all((run.folder / "report" / name).stat().st_size > 100 for name in wanted)


def test_only_the_last_running_state_is_kept(run: Run) -> None:
    files = {"merged", "merge.yml", "merge.json", "score.json", "score.parquet"}
    for t in run.stage_numbers():
        for entry in run.recipe.merge:
            assert listing(run.merged(t, entry).folder) == files | ({"running"} if t == 3 else set())


def test_frozen_recipe_is_the_recipe(run: Run, recipe: Data) -> None:
    assert load_recipe(run.folder / "recipe.yml") == parse_recipe(recipe)
    assert run.is_complete()


# Training


def test_each_kind_of_expert_is_trained_once(run: Run) -> None:
    """In the first stage all kinds start from the base: one expert serves them all."""
    assert listing(run.folder / "stages/01-a/experts") == {"base"}
    assert listing(run.folder / "stages/02-b/experts") == set(KINDS)
    assert listing(run.folder / "stages/03-c/experts") == set(KINDS)


def test_what_each_expert_started_from(run: Run) -> None:
    ema = next(e for e in run.recipe.merge if e.name == "ema")
    base = run.recipe.base_model
    for t in (2, 3):
        starts = {kind: run.expert(t, kind).record("train")["start"] for kind in KINDS}
        previous = str(run.expert(t - 1, "previous").model)
        assert starts == {"base": base, "previous": previous, "merged-ema": str(run.merged(t - 1, ema).model)}
    assert run.expert(1, "previous").record("train")["start"] == base


def test_train_records(run: Run) -> None:
    for t in run.stage_numbers():
        for kind in KINDS:
            place = run.expert(t, kind)
            record = place.record("train")
            assert record["model_sha256"] == weights_sha256(place.model)
            assert (record["steps"], record["seed"], record["processes"]) == (4, 0, 1)
            assert record["settings"]["learning_rate"] == 1.0e-2
            assert 0 < record["loss"] < 10
            assert record["peak_memory_bytes"] > 2**20
            assert {"torch", "transformers", "trl"} <= record["versions"].keys()


def test_experts_have_learnt(run: Run) -> None:
    base = load_scores(run.base)
    for t in run.stage_numbers():
        task = f"{run.stage(t).name}_heldout"
        assert load_scores(run.expert(t, "base"))[task].utility > base[task].utility + 0.1


def test_no_expert_equals_another(run: Run) -> None:
    digests = {place.record("train")["model_sha256"] for _, place in run.places() if place.is_done("train")}
    assert len(digests) == 7


# Merging


@pytest.mark.parametrize("name", ENTRIES)
def test_merged_model_is_what_merge_stream_makes_of_the_experts(name: str, run: Run, tmp_path: Path) -> None:
    """Fold the experts once more, and compare weights bit by bit, norms and scales exactly."""
    entry = next(e for e in run.recipe.merge if e.name == name)
    rule = get_rule(entry.rule, **entry.parameters)
    base = Weights(Path(run.recipe.base_model))
    running, norms = None, ()
    for t in run.stage_numbers():
        place, out = run.merged(t, entry), tmp_path / str(t)
        record = place.record("merge")
        for part in ("running", "merged"):
            (out / part).mkdir(parents=True)
        kind = {"merged": f"merged-{name}"}.get(rule.start_from, rule.start_from)
        expert = run.expert(t, kind)
        merged = merge_experts(
            rule, base, [open_expert(expert.model, base)], running=running, earlier=norms,
            running_out=out / "running", merged_out=Output(out / "merged"),
        )  # fmt: skip
        running, norms = out / "running", merged.norms.experts
        assert weights_sha256(out / "merged") == record["model_sha256"] == weights_sha256(place.model)
        assert record["norms"] == {"experts": list(norms), "running": merged.norms.running}
        assert record["scale"] == merged.scale
        assert record["start_from"] == kind
        assert record["rule"] == entry.rule
        assert record["parameters"] == rule.parameters()
        assert record["expert_sha256"][-1] == expert.record("train")["model_sha256"]
        assert len(record["expert_sha256"]) == t
        assert ("ownership" in record) == rule.selects
    assert running
    assert weights_sha256(running) == weights_sha256(run.merged(3, entry).running)


def test_a_rule_that_selects_records_whose_weights_they_are(run: Run) -> None:
    """Shares by layer, of the base and of each stage so far, as counted from the experts."""
    entry = next(e for e in run.recipe.merge if e.name == "magmax")
    base = load_file(Path(run.recipe.base_model) / "model.safetensors")
    experts = [load_file(run.expert(t, "previous").model / "model.safetensors") for t in run.stage_numbers()]
    for t in run.stage_numbers():
        owners = {name: torch.zeros_like(b, dtype=torch.int64) for name, b in base.items()}
        for name, b in base.items():
            state = torch.zeros_like(b)
            for stage, expert in enumerate(experts[:t], 1):
                change = expert[name] - b
                taken = (change.abs() >= state.abs()) & (change != state)
                owners[name][taken], state = stage, torch.where(taken, change, state)
        flat = torch.cat([o.reshape(-1) for o in owners.values()])
        names = ["base", *(run.stage(i).name for i in range(1, t + 1))]
        wanted = {name: float((flat == i).double().mean()) for i, name in enumerate(names)}
        found = run.merged(t, entry).record("merge")["ownership"]
        assert found["all"] == pytest.approx(wanted, abs=1e-12)
        assert list(found) == ["embed_tokens", "layer 0", "layer 1", "norm", "all"]
        assert found["layer 1"].keys() == wanted.keys()


def test_average_is_the_mean_of_the_experts(run: Run) -> None:
    """The same by hand, without any code of ours: base + mean(expert - base)."""
    base = load_file(Path(run.recipe.base_model) / "model.safetensors")
    experts = [load_file(run.expert(t, "previous").model / "model.safetensors") for t in run.stage_numbers()]
    entry = next(e for e in run.recipe.merge if e.name == "average")
    merged = load_file(run.merged(3, entry).model / "model.safetensors")
    for name, tensor in merged.items():
        mean = torch.stack([e[name].double() for e in experts]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6, msg=name)
    assert merged.keys() == base.keys()


def test_a_run_keeps_the_default_that_it_was_started_with(run: Run, tmp_path: Path) -> None:
    """A record of before the new default has no variant, or the old one; what the recipe names is the recipe's."""
    folder = tmp_path / "old"
    shutil.copytree(run.folder, folder, symlinks=True)
    old = Run.open(run.recipe, folder)
    entry = next(e for e in old.recipe.merge if e.name == "opcm")
    place, file = old.merged(3, entry), old.merged(2, entry).folder / "merge.json"
    prepared, record = prepare(old, find_ranks()), read_record(file, "")
    named = entry.model_copy(update={"parameters": {"variant": "block"}})
    for parameters in ({"alpha": 0.4}, {"alpha": 0.4, "variant": "fusionbench"}):
        write_record(file, {**record, "parameters": parameters})
        job: Any = MergeJob(old, prepared, cast(Any, None), 3, place)
        assert job.rule() == ("opcm", Opcm(alpha=0.4, variant="fusionbench"))
        assert job.previous().rule == Opcm(alpha=0.4, variant="fusionbench")
        other = replace(job, place=replace(place, entry=named))
        assert other.rule() == ("opcm", Opcm(alpha=0.4, variant="block"))
    write_record(file, record)
    assert MergeJob(old, prepared, cast(Any, None), 3, place).rule() == ("opcm", Opcm())


@pytest.mark.parametrize("name", ["opcm", pytest.param("magmax", marks=pytest.mark.slow)])
def test_stock_mergekit_makes_the_same_model(name: str, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("hf_contmerge.merging.in_mergekit.plugin")
    entry = next(e for e in run.recipe.merge if e.name == name)
    place, out = run.merged(3, entry), tmp_path / "out"
    command = [Path(sys.executable).with_name("mergekit-yaml"), place.mergekit_recipe, out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights_sha256(out) == weights_sha256(place.model)


# Scoring


def test_rows_are_the_stages_so_far(run: Run) -> None:
    """Lower triangle and general task for plain sequential fine-tuning and for every merge; row 0 has it all."""
    experts, merges = load_lines(run, KINDS)
    heldout = [{"a_heldout"}, {"a_heldout", "b_heldout", "own"}, {"a_heldout", "b_heldout", "own", "c_heldout"}]
    whole = [heldout[2] | {"choice"}, *(row | {"choice"} for row in heldout)]
    assert {line.name for line in merges} == set(ENTRIES)
    for line in [*merges, *(line for line in experts if line.name != "base")]:
        assert [set(row) for row in line.rows] == whole, line.name


def test_independent_experts_are_scored_on_their_own_stage(run: Run) -> None:
    assert load_scores(run.expert(2, "base")).keys() == {"b_heldout", "own"}
    assert load_scores(run.expert(3, "base")).keys() == {"c_heldout"}


def test_scores_are_those_of_a_plain_forward_pass(run: Run) -> None:
    """Perplexity per word of one held-out text, computed from the logits alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = run.expert(3, "previous")
    score = load_scores(place)["a_heldout"]
    texts = [json.loads(line)["text"] for line in (run.tasks / "a_heldout.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).eval()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(texts[0], add_special_tokens=False).input_ids]])
    assert ids.shape[1] <= model.config.max_position_embeddings
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)
    total = logs[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
    assert score.gains[0] == pytest.approx(total, rel=1e-4)
    assert score.weights[0] == len(texts[0].split())
    assert score.value == pytest.approx(math.exp(-sum(score.gains) / sum(score.weights)))


def test_equal_weights_are_measured_once(run: Run) -> None:
    """Also without a cache. OPCM's first merge is the expert itself."""
    opcm = next(e for e in run.recipe.merge if e.name == "opcm")
    expert, merged = run.expert(1, "base"), run.merged(1, opcm)
    assert expert.record("score")["scored_sha256"] == merged.record("score")["scored_sha256"]
    assert load_scores(expert) == load_scores(merged)
    assert all(score.details["key"] for score in load_scores(merged).values())


def test_summary(run: Run) -> None:
    """summary.json tells what the score records give, null where nothing was measured."""
    summary = json.loads((run.folder / "report/summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["stages"] == ["a", "b", "c"]
    assert summary["base_model"] == run.recipe.base_model
    assert summary["tasks"]["own"]["stage"] == "b"
    assert summary["tasks"]["choice"]["stage"] is None
    assert summary["experts"].keys() == set(KINDS)
    assert summary["merges"].keys() == set(ENTRIES)
    experts, merges = load_lines(run, KINDS)
    for told, lines in ((summary["experts"], experts), (summary["merges"], merges)):
        for line in lines:
            for block in BLOCKS:
                rows = line.matrix(run.recipe.stages, block).rows
                assert told[line.name]["matrix"][block] == [list(row) for row in rows], line.name
                metrics = line.metrics(run.recipe.stages, ["choice"], block)
                assert told[line.name]["metrics"][block] == metrics, line.name


# Runs that go on


def test_second_run_does_nothing_and_loads_no_torch(run: Run, recipe: Data, tmp_path: Path) -> None:
    path = tmp_path / "whole.yml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    before = times(run.folder, "*")
    code = (
        "import sys; from hf_contmerge.commands.main import main; "
        "sys.exit(main(sys.argv[1:]) or 3 * ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", code, "run", str(path), "--run", str(run.folder)]
    before_it = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after_it = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run.folder} is complete.\n")
    assert times(run.folder, "*") == before
    # Processor seconds: others on the machine do not count.
    assert after_it.ru_utime + after_it.ru_stime - before_it.ru_utime - before_it.ru_stime < 3


def test_run_again_in_process_does_nothing(run: Run, recipe: Data) -> None:
    before = times(run.folder, "*")
    again = run_recipe(parse_recipe(recipe), run.folder)
    assert again.is_complete()
    assert times(run.folder, "*") == before


@pytest.mark.slow
def test_order_of_the_words_is_no_change(small: Data, small_run: Run) -> None:
    turned = dict(reversed(small.items())) | {"train": dict(reversed(small["train"].items()))}
    assert Run(small_run.folder, parse_recipe(turned)).is_complete()


@pytest.mark.slow
def test_appended_stage_is_learnt_and_nothing_else(go_on: Callable[..., Run], small_run: Run, home: Path) -> None:
    before = times(go_on_folder := go_on().folder, "*")
    run = go_on(stages=stages(home, "abc"))
    assert run.folder == go_on_folder
    after = times(run.folder, "*")
    changed = {f for f in before if before[f] != after.get(f)}
    scored = {"stages/00-base/score.json", "stages/00-base/score.parquet"}
    assert changed == scored | {f for f in before if "/running/" in f}
    assert load_scores(run.base).keys() == {"a_heldout", "b_heldout", "c_heldout"}
    entry = run.recipe.merge[0]
    assert (
        run.merged(3, entry).record("merge")["norms"]["experts"][:2]
        == (small_run.merged(2, entry).record("merge")["norms"]["experts"])
    )
    assert run.is_complete()


@pytest.mark.slow
def test_appended_stage_ends_where_one_run_would(go_on: Callable[..., Run], home: Path, tmp_path: Path) -> None:
    three = stages(home, "abc")
    in_two = go_on(stages=three)
    at_once = run_recipe(in_two.recipe, tmp_path / "at_once")
    place = at_once.merged(3, at_once.recipe.merge[0])
    assert weights_sha256(in_two.merged(3, in_two.recipe.merge[0]).model) == weights_sha256(place.model)
    assert {n: s.gains for n, s in load_scores(in_two.base).items()} == {
        n: s.gains for n, s in load_scores(at_once.base).items()
    }


def test_appended_merge_entry_shares_the_experts(go_on: Callable[..., Run], small: Data) -> None:
    before = times(go_on().folder)
    run = go_on(merge=[*small["merge"], {"rule": "ema", "start_from": "previous", "name": "late"}])
    after = times(run.folder)
    assert {f: after[f] for f in before} == before
    assert {f for f in after if f not in before} == {
        f"stages/{s}/merges/late/{f}.json" for s in ("01-a", "02-b") for f in ("merge", "score")
    } | {f for f in after if "/late/" in f and "merged/" in f}
    assert run.merged(2, run.recipe.merge[1]).record("merge")["start_from"] == "previous"


@pytest.mark.slow
def test_appended_general_task_is_measured_everywhere(go_on: Callable[..., Run], home: Path) -> None:
    folder = go_on().folder
    before, old = times(folder), load_scores(Run.load(folder).base)
    run = go_on(evaluate={"general_tasks": [choice(home, "choice")]})
    after = times(folder)
    assert {f for f in before if before[f] != after[f]} == {f for f in before if f.endswith("/score.json")}
    for _, place in run.places():
        assert "choice" in load_scores(place)
    assert {n: s for n, s in load_scores(run.base).items() if n != "choice"} == old


def test_full_matrix_later_gives_forward_transfer(go_on: Callable[..., Run]) -> None:
    run = go_on()
    merged = load_lines(run, run.expert_kinds())[1][0]
    assert merged.matrix(run.recipe.stages, "perplexity").forward_transfer() is None
    weights = times(run.folder, "*.safetensors")
    run = go_on(evaluate={"matrix": "full"})
    merged = load_lines(run, run.expert_kinds())[1][0]
    matrix = merged.matrix(run.recipe.stages, "perplexity")
    before, first = matrix.rows[0][1], matrix.rows[1][1]
    assert before is not None
    assert first is not None
    assert matrix.forward_transfer() == pytest.approx(first - before)
    assert times(run.folder, "*.safetensors") == weights


def test_redo_merge_takes_the_new_lambda(go_on: Callable[..., Run]) -> None:
    changed = [{"rule": "magmax", "parameters": {"lambda": 0.3}}]
    run = go_on()
    trained = times(run.folder, "train.json")
    with pytest.raises(RunError, match=r"merge\.magmax\.parameters.*lambda"):
        go_on(merge=changed)
    run.redo("merge")
    run = go_on(merge=changed)
    assert run.merged(2, run.recipe.merge[0]).record("merge")["scale"] == 0.3
    assert times(run.folder, "train.json") == trained
    assert run.is_complete()


@pytest.mark.slow
def test_redo_merge_drops_experts_that_started_from_the_merged_model(home: Path, small: Data, tmp_path: Path) -> None:
    recipe = {**small, "merge": ["ema"]}
    run = run_recipe(parse_recipe(recipe), tmp_path / "run")
    old = run.expert(2, "merged-ema").record("train")["model_sha256"]
    run.redo("merge")
    recipe["merge"] = [{"rule": "ema", "parameters": {"beta": 0.9}}]
    run = run_recipe(parse_recipe(recipe), tmp_path / "run")
    expert = run.expert(2, "merged-ema")
    assert expert.record("train")["model_sha256"] != old
    at_once = run_recipe(parse_recipe(recipe), tmp_path / "at_once")
    assert weights_sha256(expert.model) == weights_sha256(at_once.expert(2, "merged-ema").model)


# Other recipes


def test_given_experts_and_a_vector_between_two_models(home: Path, tmp_path: Path) -> None:
    """merged = base + (expert - base), then the instruction vector on top: base + (expert - minus)."""
    recipe = {
        "name": "given",
        "base_model": str(home / "base"),
        "stages": [
            {"name": "whole", "expert": str(home / "expert")},
            {"name": "vector", "expert": str(home / "expert"), "minus": str(home / "minus")},
        ],
        "merge": [{"rule": "task_arithmetic", "start_from": "base"}],
    }
    run = run_recipe(parse_recipe(recipe), tmp_path / "run", until="merge")
    assert run.expert(1, "base").model == home / "expert"
    assert not (run.expert(1, "base").folder / "expert").exists()
    base, expert, minus = (load_file(home / n / "model.safetensors") for n in ("base", "expert", "minus"))
    vector = load_file(run.expert(2, "base").model / "model.safetensors")
    merged = load_file(run.merged(2, run.recipe.merge[0]).model / "model.safetensors")
    scale = run.merged(2, run.recipe.merge[0]).record("merge")["scale"]
    for name, b in base.items():
        torch.testing.assert_close(vector[name], b + (expert[name] - minus[name]), rtol=0, atol=1e-6)
        both = (expert[name] - b) + (expert[name] - minus[name])
        torch.testing.assert_close(merged[name], b + scale * both, rtol=0, atol=1e-5)


def test_until_merge_scores_nothing_and_a_later_run_goes_on(small: Data, tmp_path: Path) -> None:
    recipe = parse_recipe({**small, "stages": small["stages"][:1]})
    run = run_recipe(recipe, tmp_path / "run", until="merge")
    assert run.merged(1, recipe.merge[0]).is_done("merge")
    assert not list(run.folder.rglob("score.json"))
    assert not run.is_complete()
    before = times(run.folder)
    run = run_recipe(recipe, tmp_path / "run")
    after = times(run.folder)
    assert {f: after[f] for f in before} == before
    assert run.is_complete()


def test_start_from_overrides_what_the_paper_used(small: Data, tmp_path: Path) -> None:
    merge = [{"rule": "magmax", "start_from": "base"}, {"rule": "opcm", "start_from": "merged", "name": "mine"}]
    run = run_recipe(parse_recipe({**small, "merge": merge}), tmp_path / "run", until="merge")
    assert listing(run.folder / "stages/02-b/experts") == {"base", "merged-mine"}
    first = run.merged(1, run.recipe.merge[1])
    assert run.expert(2, "merged-mine").record("train")["start"] == str(first.model)


def test_until_train_with_experts_that_start_from_the_merged_model(small: Data, tmp_path: Path) -> None:
    """They need the merge of the stage before, whatever --until says."""
    recipe = parse_recipe({**small, "merge": ["ema"]})
    run = run_recipe(recipe, tmp_path / "run", until="train")
    assert run.expert(2, "merged-ema").is_done("train")


def test_learning_rate_as_people_write_it(small: Data, tmp_path: Path) -> None:
    """PyYAML reads 1e-2 as a word, 1.0e-2 as a number; both must train alike."""
    text = yaml.safe_dump({**small, "stages": small["stages"][:1]}).replace(
        "learning_rate: 0.01", "learning_rate: 1e-2\n  logging_steps: 1\n  lr_scheduler_type: constant"
    )
    assert "1e-2" in text
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    run = run_recipe(load_recipe(path), tmp_path / "run", until="train")
    assert run.expert(1, "base").record("train")["log"][0]["learning_rate"] == 1e-2


def test_seed_makes_a_run_repeatable(small: Data, small_run: Run, tmp_path: Path) -> None:
    once = {**small, "stages": small["stages"][:1]}
    same = run_recipe(parse_recipe(once), tmp_path / "same", until="train")
    other = run_recipe(parse_recipe({**once, "seed": 1}), tmp_path / "other", until="train")
    digests = [r.expert(1, "base").record("train")["model_sha256"] for r in (small_run, same, other)]
    assert digests[0] == digests[1] != digests[2]
