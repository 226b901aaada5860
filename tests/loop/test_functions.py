"""`finetune_stage`, `merge_stage`, `score_stage` in a script: results, scripts that start again, mistakes."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from toys.models import TEXT, toy_llama, toy_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

from hf_contmerge import MergeState, TrainedExpert, finetune_stage, merge_stage, score_stage
from hf_contmerge.errors import ContmergeError, DataError, ModelError, RecipeError, RunError
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.runtime.records import read_record, write_record
from hf_contmerge.scoring.files import write_perplexity_task
from hf_contmerge.scoring.score import score_model

TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1e-2, "use_cpu": True}
WORDS = TEXT.split()


def texts(path: Path, *, seed: int, count: int = 12) -> Path:
    draw = random.Random(seed)
    return write_jsonl(path, [{"text": " ".join(draw.choices(WORDS, k=20))} for _ in range(count)])


@pytest.fixture(scope="module")
def home(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts, a task file, and two experts, the second trained from the first."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("law", "code")):
        texts(home / f"{name}.jsonl", seed=seed)
    write_perplexity_task(home / "tasks", "nurse", TEXT.strip().splitlines())
    return home


@pytest.fixture(scope="module")
def experts(home: Path, base_folder: Path) -> tuple[TrainedExpert, TrainedExpert]:
    how: dict[str, Any] = {"strategy": ["full", "replay"], "parameters": {"replay": {"examples": 4}}, **TRAIN}
    law = finetune_stage(base_folder, home / "law.jsonl", home / "experts/law", **how)
    return law, finetune_stage(law, str(home / "code.jsonl"), home / "experts/code", **how)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# Fine-tuning


def test_experts_are_models_that_know_their_base(experts: tuple[TrainedExpert, ...], base_folder: Path) -> None:
    law, code = experts
    assert (law.base, code.base) == (base_folder, base_folder)
    assert (law.steps, law.examples, code.examples) == (2, 12, 12)
    assert law.memory
    assert code.memory
    assert len(list(code.memory.rglob("*.parquet"))) == 2  # examples of both stages
    assert os.fspath(law) == str(law.folder)
    assert len({weights_sha256(f) for f in (base_folder, law.folder, code.folder)}) == 3
    assert not [p for p in law.folder.parent.iterdir() if p.name.startswith(".")]


def test_the_same_call_finds_what_it_has_made(experts: tuple[TrainedExpert, ...], home: Path) -> None:
    law, code = experts
    before = (code.folder / "model.safetensors").stat().st_mtime_ns
    how: dict[str, Any] = {"strategy": ["full", "replay"], "parameters": {"replay": {"examples": 4}}, **TRAIN}
    assert finetune_stage(law, home / "code.jsonl", home / "experts/code", **how) == code
    assert (code.folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match=r"with other settings: seed differ.*Choose another folder"):
        finetune_stage(law, home / "code.jsonl", home / "experts/code", seed=3, **how)


def test_an_expert_made_with_a_plugin_is_found_with_the_same_plugin_only(
    experts: tuple[TrainedExpert, ...], base_folder: Path, home: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(experts[0].folder, tmp_path / "law")
    file = copy / "contmerge" / "train.json"
    record = read_record(file, "")
    assert record["versions"]["torch"]
    record["versions"]["calm.py"] = "sha256:0"
    write_record(file, record)
    how: dict[str, Any] = {"strategy": ["full", "replay"], "parameters": {"replay": {"examples": 4}}, **TRAIN}
    with pytest.raises(RunError, match=r"law was made with the plugin calm\.py: add `--plugin calm\.py`"):
        finetune_stage(base_folder, home / "law.jsonl", copy, **how)


def test_rows_in_memory_are_those_of_a_file(base_folder: Path, home: Path, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_json(str(home / "law.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows, datasets.Dataset)
    for name, data in (("memory", rows), ("file", home / "law.jsonl")):
        finetune_stage(base_folder, data, tmp_path / name, **TRAIN)
    assert weights_sha256(tmp_path / "memory") == weights_sha256(tmp_path / "file")


def test_a_kept_adapter_is_scored_and_merged_by_the_base_that_it_names(
    base_folder: Path, home: Path, tmp_path: Path
) -> None:
    lora: dict[str, Any] = {"strategy": "lora", "parameters": {"r": 2, "keep": True}, **TRAIN}
    law = finetune_stage(base_folder, home / "law.jsonl", tmp_path / "law", **lora)
    assert (law.folder / "adapter_config.json").is_file()
    by_path = finetune_stage(str(law.folder), home / "code.jsonl", tmp_path / "code", **lora)
    assert by_path.base == base_folder
    merge_stage(tmp_path / "state", law, rule="average", export=tmp_path / "merged")
    scores = [
        score_stage(m, ["nurse"], tasks_folder=home / "tasks", dtype="float32") for m in (law, tmp_path / "merged")
    ]
    assert scores[0]["nurse"].value == pytest.approx(scores[1]["nurse"].value, rel=1e-5)
    whole = finetune_stage(base_folder, home / "law.jsonl", tmp_path / "whole", **TRAIN)
    with pytest.raises(RecipeError, match=r"parameters.keep: an adapter trained on .*whole is none of the base"):
        finetune_stage(whole, home / "code.jsonl", tmp_path / "other", **lora)


# Merging and scoring


def test_merging_is_that_of_a_state(experts: tuple[TrainedExpert, ...], base_folder: Path, tmp_path: Path) -> None:
    law, code = experts
    merge_stage(tmp_path / "state", law, rule="magmax", export=tmp_path / "one", lambda_=0.5)
    state = merge_stage(tmp_path / "state", code, stage="second", export=tmp_path / "two", dtype="bfloat16")
    ours = MergeState.create(tmp_path / "ours", base=base_folder, rule="magmax", **{"lambda": 0.5})
    ours.add(law.folder).export(tmp_path / "ours-one")
    ours.add(code.folder).export(tmp_path / "ours-two", dtype="bfloat16")
    assert [e.stage for e in state.log().experts] == ["law", "second"]
    for number in ("one", "two"):
        assert weights_sha256(tmp_path / number) == weights_sha256(tmp_path / f"ours-{number}")


def test_a_script_that_starts_again_folds_nothing_twice(experts: tuple[TrainedExpert, ...], tmp_path: Path) -> None:
    law, code = experts
    for _ in range(2):
        merge_stage(tmp_path / "state", law, rule="ema", export=tmp_path / "one")
        merge_stage(tmp_path / "state", code, rule="ema", export=tmp_path / "two", beta=0.5)
    assert len(MergeState.load(tmp_path / "state").log().experts) == 2
    with pytest.raises(RunError, match=r"already holds later experts \(code\)"):
        merge_stage(tmp_path / "state", law, export=tmp_path / "late")


def test_scores_are_those_of_the_loop(base_folder: Path, home: Path, tmp_path: Path) -> None:
    held = texts(tmp_path / "held.jsonl", seed=9)
    own: dict[str, Any] = {"name": "held", "kind": "perplexity", "dataset": str(held)}
    scores = score_stage(base_folder, ["nurse", own], tasks_folder=home / "tasks", dtype="float32", batch_size=4)
    assert list(scores) == ["nurse", "held"]
    assert len(scores["held"].gains) == 12
    how = Evaluate(dtype="float32", batch_size=4)
    wanted = score_model(base_folder, [Task(name="nurse")], task_folder=home / "tasks", evaluate=how, ranks=OneRank())[
        1
    ]
    assert scores["nurse"].gains == pytest.approx(wanted["nurse"].gains, rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained(base_folder).train()
    found = score_stage(model, ["nurse"], tasks_folder=home / "tasks", tokenizer=toy_tokenizer(), batch_size=4)
    assert found["nurse"].gains == pytest.approx(wanted["nurse"].gains, rel=1e-6)
    assert model.training
    with pytest.raises(RecipeError, match="a model in memory needs a tokenizer"):
        score_stage(model, ["nurse"], tasks_folder=home / "tasks")


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"learning_rat": 1e-5}, r"Unknown field 'learning_rat' in train. Did you mean 'learning_rate'"),
        ({"strategy": "lorra"}, r"Unknown strategy 'lorra'"),
        ({"strategy": "lora", "parameters": {"rr": 2}}, r"train.parameters: .*rr"),
        ({"output_dir": "x"}, r"output_dir is set by the run folder"),
        ({"base": "./nowhere"}, r"There is no model at ./nowhere"),
        ({"data": "nowhere.jsonl"}, r"There is no file nowhere"),
        ({"data": {"path": "x.jsonl", "texxt": "a"}}, r"Unknown field 'texxt'"),
        ({"data": datasets.Dataset.from_list([{"txt": "a"}])}, r"data has the columns txt; a stage needs"),
        ({"model": "./nothing"}, r"There is no model at ./nothing"),
    ],
    ids=["field", "strategy", "parameter", "ours", "base", "file", "dataset", "columns", "model"],
)
def test_bad_trainings(words: dict[str, Any], message: str, base_folder: Path, home: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "model": base_folder,
        "data": home / "law.jsonl",
        "out": tmp_path / "out",
        **TRAIN,
        **words,
    }
    with pytest.raises(ContmergeError, match=message):
        finetune_stage(**asked)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else(base_folder: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no expert of finetune_stage"):
        finetune_stage(base_folder, home / "law.jsonl", tmp_path / "out", **TRAIN)
    assert (tmp_path / "out" / "letter.txt").read_text() == "mine"


def test_bad_merges(experts: tuple[TrainedExpert, ...], expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = tmp_path / "state"
    with pytest.raises(RecipeError, match=r"holds no state yet\. To start one, pass base and rule"):
        merge_stage(state, expert_folders[0])
    with pytest.raises(RecipeError, match="Unknown rule 'magmx'"):
        merge_stage(state, experts[0], rule="magmx")
    merge_stage(state, experts[0], rule="magmax")
    other = toy_llama(tmp_path / "other", seed=3)
    for words, message in (
        ({"rule": "opcm"}, r"this call has rule 'opcm', not 'magmax'"),
        ({"lambda_": 0.1}, r"this call has lambda 0.1, not"),
        ({"alpha": 0.1}, r"Unknown parameter 'alpha'"),
        ({"base": other}, r"this call has base"),
    ):
        with pytest.raises(RecipeError, match=message):
            merge_stage(state, experts[1], **words)
    small = toy_llama(tmp_path / "small", seed=3, hidden=16)
    with pytest.raises(ModelError, match="has shape"):
        merge_stage(state, small)
    assert len(MergeState.load(state).log().experts) == 1


def test_bad_scores(base_folder: Path, home: Path) -> None:
    def score(*tasks: Any, **words: Any) -> Callable[[], Any]:
        return lambda: score_stage(base_folder, tasks, tasks_folder=home / "tasks", **words)

    for do, kind, message in (
        (score("nurse", limt=3), RecipeError, "Unknown field 'limt' in score_stage. Did you mean 'limit'"),
        (score("nurse", limit=0), RecipeError, r"score_stage.limit: .*greater than or equal to 1 \(got 0\)"),
        (score({"name": "x", "kind": "perplexity"}), RecipeError, "needs both `dataset` and `kind`"),
        (score({"name": "x", "kind": "perplexity", "dataset": "no.jsonl"}), DataError, "There is no file no.jsonl"),
    ):
        with pytest.raises(kind, match=message):
            do()


# Ranks

SCRIPT = """
import json, os, sys
from pathlib import Path
from hf_contmerge import finetune_stage, merge_stage, score_stage

base, home, out = sys.argv[1:]
law = finetune_stage(base, f"{home}/law.jsonl", f"{out}/law", max_steps=2, per_device_train_batch_size=1,
                     max_length=32, learning_rate=1e-2)
merge_stage(f"{out}/state", law, rule="magmax", export=f"{out}/merged")
held = {"name": "held", "kind": "perplexity", "dataset": f"{home}/code.jsonl"}
scores = score_stage(f"{out}/merged", ["nurse", held], tasks_folder=f"{home}/tasks", dtype="float32")
Path(f"{out}/scores{os.environ['RANK']}.json").write_text(json.dumps({n: s.value for n, s in scores.items()}))
"""


@pytest.mark.slow
def test_two_ranks_do_what_one_does(base_folder: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2", "--"]
    done = subprocess.run(
        [*torchrun, tmp_path / "script.py", base_folder, home, tmp_path],
        capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"scores{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    alone = finetune_stage(base_folder, home / "law.jsonl", tmp_path / "alone", **TRAIN)  # twice the batch
    start, one, two = weights(base_folder), weights(alone.folder), weights(tmp_path / "law")
    for name, tensor in one.items():
        assert torch.dist(two[name], tensor) <= 1e-3 * torch.dist(tensor, start[name])
    found = score_stage(tmp_path / "merged", ["nurse"], tasks_folder=home / "tasks", dtype="float32")
    assert found["nurse"].value == pytest.approx(told[0]["nurse"], rel=1e-6)
