"""Two ranks on two processor cores: the same scores, the same experts, the same loop as on one.

`torchrun` starts the ranks, with gloo between them, as nodes of GPUs would be started.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys import ROOT
from toys.models import TEXT, perturbed, write_jsonl

from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.scores import TaskScore, load_scores
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring.files import write_answer_task, write_choice_task, write_perplexity_task
from hf_contmerge.scoring.score import score_model
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob

Row = dict[str, Any]
SCRIPT = ROOT / "hf_contmerge" / "train.py"
TWO = ROOT / "recipes" / "accelerate" / "cpu2.yaml"
RANKS = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
TRAIN = {
    "max_steps": 4, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1.0e-2, "logging_steps": 1,
    "save_strategy": "no",
}  # fmt: skip


def launched(words: Sequence[str | Path], ranks: int, timeout: float) -> subprocess.CompletedProcess[str]:
    start = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--"]
    return subprocess.run([*start, *words], capture_output=True, text=True, env=RANKS, timeout=timeout)


def torchrun(*words: str | Path, ranks: int = 2) -> str:
    """Run a script on some ranks; return what they printed."""
    done = launched(words, ranks, 300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*words: str | Path) -> str:
    """Run a script on two ranks, see it fail, and return the one line that says why."""
    done = launched(words, 2, 120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert len(lines) == 1, done.stderr
    return lines[0]


# Scores

SCORE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.runtime.launching import join_ranks
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.score import score_loaded, score_model

read = []  # the size of each batch that the model reads

def count(module, args, output):
    if isinstance(module, torch.nn.Embedding):
        read.append(len(args[0]))

torch.nn.modules.module.register_module_forward_hook(count)
ranks = join_ranks()[1].ranks
for path in sys.argv[1:]:
    read.clear()
    order = json.loads(Path(path).read_text())
    tasks = [Task(**t) for t in order["tasks"]]
    how = {"task_folder": Path(order["task_folder"]), "evaluate": Evaluate(**order["evaluate"]), "ranks": ranks}
    if order.get("in_memory"):
        model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32).train()
        request = ScoreRequest(tasks, how["task_folder"], how["evaluate"])
        tokenizer = AutoTokenizer.from_pretrained(order["model"])
        digest, scores = "", score_loaded(model, tokenizer, request, ranks=ranks)
        assert model.training
    else:
        key, scores = score_model(Path(order["model"]), tasks, **how)
        digest = key.sha256
    Path(f"{path}.{ranks.rank}").write_text(
        json.dumps([digest, {n: s.to_json() for n, s in scores.items()}, sum(read)])
    )
"""
SUBJECTS = ("fox", "dog", "law", "hen", "claim", "court", "pulse", "nurse", "list")
COUNTS = {"odd": 7, "even": 4, "one": 1}
"""Task name -> number of documents: some not divisible by the ranks, one fewer than them."""


@pytest.fixture(scope="module")
def order(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Row:
    """What to score, as the script above reads it."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    words = TEXT.split()
    for name, count in COUNTS.items():
        write_perplexity_task(
            folder, name, [" ".join(draw.choices(words, k=draw.randrange(5, 40))) for _ in range(count)]
        )
    rows = [{"query": f"A court may refuse the {s}", "choices": list("abc"), "gold": i % 3}
            for i, s in enumerate(SUBJECTS)]  # fmt: skip
    write_choice_task(folder, "choice", rows)
    written = [{"query": f"The nurse and the {s}", "gold": "end"} for s in SUBJECTS]
    write_answer_task(folder, "written", written, max_new_tokens=4, stop=["."])
    group = {"group": "both", "task": ["odd", "one"]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    names = (*COUNTS, "both", "written")
    tasks = [*({"name": n} for n in names), {"name": "choice", "num_fewshot": 1}, {"name": "fewer", "num_fewshot": 0}]
    (folder / "fewer.yaml").write_text(yaml.safe_dump({"group": "fewer", "task": ["choice"]}))
    return {
        "model": str(base_folder), "task_folder": str(folder), "tasks": tasks,
        "evaluate": {"dtype": "float32", "batch_size": 2, "cache": False},
    }  # fmt: skip


def on_one_rank(order: Row) -> tuple[str, dict[str, TaskScore]]:
    key, scores = score_model(
        Path(order["model"]), [Task(**t) for t in order["tasks"]], task_folder=Path(order["task_folder"]),
        evaluate=Evaluate(**order["evaluate"]), ranks=OneRank(),
    )  # fmt: skip
    return key.sha256, scores


@pytest.fixture(scope="module")
def alone(order: Row) -> tuple[str, dict[str, TaskScore]]:
    return on_one_rank(order)


def measured(folder: Path, *orders: Row, ranks: int) -> list[list[tuple[str, dict[str, TaskScore], int]]]:
    """Return each rank's digest, scores and number of texts read, for each of some orders."""
    (folder / "score.py").write_text(SCORE)
    paths = [folder / f"order{i}" for i in range(len(orders))]
    for path, one in zip(paths, orders, strict=True):
        path.write_text(json.dumps(one))
    torchrun(folder / "score.py", *paths, ranks=ranks)
    every = [[json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(ranks)] for path in paths]
    return [[(digest, {n: TaskScore.from_json(s) for n, s in scores.items()}, read) for digest, scores, read in one]
            for one in every]  # fmt: skip


@pytest.fixture(scope="module")
def on_two_ranks(order: Row, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tasks measured by two ranks that share the documents, and by two that share each matrix."""
    tensor = {**order, "evaluate": {**order["evaluate"], "parallel": "tensor"}}
    return measured(tmp_path_factory.mktemp("two"), order, tensor, ranks=2)


@pytest.mark.slow
def test_scores_on_two_ranks(on_two_ranks: Any, alone: tuple[str, dict[str, TaskScore]]) -> None:
    assert_shared(on_two_ranks[0], alone[1], digest=alone[0])


@pytest.mark.slow
def test_scores_in_memory_on_three_ranks(order: Row, alone: tuple[str, dict[str, TaskScore]], tmp_path: Path) -> None:
    assert_shared(measured(tmp_path, {**order, "in_memory": True}, ranks=3)[0], alone[1], digest="")


@pytest.mark.slow
def test_scores_of_matrices_on_two_ranks(on_two_ranks: Any, alone: tuple[str, dict[str, TaskScore]]) -> None:
    """Each rank has half of each matrix and reads all that one process reads; only the order of sums differs."""
    (digest, found, read), (other_digest, nothing, other_read) = on_two_ranks[1]
    assert digest == other_digest == alone[0]
    assert not nothing
    assert_same_scores(found, alone[1])
    assert found["written"].answers == alone[1]["written"].answers
    assert read == other_read == sum(read for _, _, read in on_two_ranks[0])


def assert_shared(every: Any, wanted: Mapping[str, TaskScore], *, digest: str) -> None:
    """The ranks share the batches; the main process has all answers, in order, and each is one process's to the bit."""
    assert {d for d, _, _ in every} == {digest}
    assert [scores for _, scores, _ in every[1:]] == [{}] * (len(every) - 1)
    found = every[0][1]
    assert_same_scores(found, wanted)
    for name, score in wanted.items():
        assert (found[name].gains, found[name].answers) == (score.gains, score.answers), name
    assert {n: len(found[n].gains) for n in COUNTS} == COUNTS
    assert len(found["both"].gains) == COUNTS["odd"] + COUNTS["one"]
    assert len(set(found["written"].answers)) > 1
    work = [read for _, _, read in every]
    assert max(work) <= 1.5 * sum(work) / len(work)


def assert_same_scores(found: Mapping[str, TaskScore], wanted: Mapping[str, TaskScore]) -> None:
    assert found.keys() == wanted.keys()
    for name, score in wanted.items():
        assert found[name].gains == pytest.approx(score.gains, rel=1e-5), name
        assert found[name].weights == score.weights
        assert found[name].details["documents_sha256"] == score.details["documents_sha256"]
        reported = score.details["metrics"]
        assert found[name].details["metrics"] == {k: pytest.approx(v, rel=1e-4) for k, v in reported.items()}


# The loop


@pytest.fixture(scope="module")
def recipe(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, draw = tmp_path_factory.mktemp("home"), random.Random(0)
    words = TEXT.split()
    stages: list[Row] = []
    for i, name in enumerate("ab"):
        own = words[20 * i : 20 * i + 20]
        path = write_jsonl(home / f"{name}.jsonl", [{"text": " ".join(draw.choices(own, k=30))} for _ in range(24)])
        stages.append({"name": name, "dataset": {"path": str(path), "heldout": 3}})
    recipe = {
        "name": "ranks", "base_model": str(base_folder), "stages": stages, "train": TRAIN, "merge": ["magmax", "opcm"],
        "evaluate": {"dtype": "float32"},
    }  # fmt: skip
    path = home / "ranks.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The recipe, carried out on two ranks by the command of the documentation."""
    folder = tmp_path_factory.mktemp("run") / "run"
    accelerate = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", TWO]
    done = subprocess.run([*accelerate, SCRIPT, recipe, "--run", folder], capture_output=True, text=True, env=RANKS)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run.load(folder)


def test_loop_on_two_ranks(run: Run, recipe: Path) -> None:
    assert run.is_complete()
    experts = [run.expert(1, "base"), run.expert(2, "base"), run.expert(2, "previous")]
    merges = [run.merged(t, entry) for t in (1, 2) for entry in run.recipe.merge]
    assert [p.folder for _, p in run.places()][1:] == [
        p.folder for p in (experts[0], *merges[:2], *experts[1:], *merges[2:])
    ]
    assert all(p.is_done("train") and p.is_done("score") for p in experts)
    assert all(p.is_done("merge") and p.is_done("score") for p in merges)
    assert run.base.record("score")["processes"] == 2
    assert not [p for p in run.folder.rglob(".*") if p.name not in (".lock", ".report.lock")]
    assert (run.folder / "report" / "index.html").is_file()


@pytest.mark.slow
def test_a_complete_run_is_left_as_it_is_by_two_ranks(run: Run, recipe: Path) -> None:
    times = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file()}
    printed = torchrun(SCRIPT, recipe, "--run", run.folder)
    assert printed.count(f"{run.folder} is complete.") == 1
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file()} == times


def test_merges_are_those_of_one_process(run: Run, tmp_path: Path) -> None:
    """Both ranks share the weights of a merge; the result is that of this process alone, byte for byte."""
    base = Weights(run.base_model)
    for entry in run.recipe.merge:
        rule, experts = get_rule(entry.rule), list[Path]()
        for t in run.stage_numbers():
            place = run.merged(t, entry)
            experts.append(run.expert(t, "base" if t == 1 else place.record("merge")["start_from"]).model)
            out = tmp_path / f"{entry.name}{t}"
            out.mkdir()
            found = merge_experts(rule, base, [open_expert(e, base) for e in experts], merged_out=Output(out))
            record, norms = place.record("merge"), found.norms
            assert weights_sha256(out) == record["model_sha256"] == weights_sha256(place.model)
            assert record["norms"] == {"experts": list(norms.experts), "running": norms.running}
            assert record["scale"] == found.scale
            assert record["processes"] == 2


@pytest.mark.slow
def test_an_expert_that_is_damaged_ends_all_ranks(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    """One line, soon, and what was done before is kept."""
    broken = perturbed(base_folder, tmp_path / "broken", seed=9, size=0.01)
    values = load_file(broken / "model.safetensors")
    values["model.norm.weight"][3] = float("nan")
    save_file(values, broken / "model.safetensors", metadata={"format": "pt"})
    stages = [{"name": "a", "expert": str(expert_folders[0])}, {"name": "b", "expert": str(broken)}]
    recipe = {"name": "bad", "base_model": str(base_folder), "stages": stages, "merge": ["magmax"]}
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(recipe))
    told = refused(SCRIPT, tmp_path / "bad.yml", "--run", tmp_path / "run", "--until", "merge")
    assert f"model.norm.weight in {broken} has 1 values that are NaN or infinite" in told
    run = Run.load(tmp_path / "run")
    assert [run.merged(t, run.recipe.merge[0]).is_done("merge") for t in (1, 2)] == [True, False]


@pytest.mark.slow
def test_written_replay_is_that_of_one_process(recipe: Path, tmp_path: Path) -> None:
    """The ranks share the documents that the start model writes."""
    settings = ["train.strategy=[full, replay]", "train.parameters.replay.synthesise=20", "train.max_steps=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    texts = []
    for ranks in (1, 2):
        torchrun(SCRIPT, recipe, "--run", tmp_path / f"{ranks}", "--until", "train", *words, ranks=ranks)
        (file,) = (tmp_path / f"{ranks}" / "stages" / "01-a").rglob("documents.jsonl")
        texts.append(file.read_bytes())
    assert texts[0].count(b"\n") == 20
    assert texts[0] == texts[1]


OTHER = """
import os, sys
from pathlib import Path

if os.environ["RANK"] == "1":  # as on a machine that was installed on another day
    sys.path.insert(0, str(Path(__file__).parent / "other"))
from hf_contmerge.train import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_of_unequal_versions_end_before_the_start(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(OTHER)
    installed = tmp_path / "other" / "lm_eval-0.0.7.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.0.7\n")
    told = refused(tmp_path / "other.py", recipe, "--run", tmp_path / "run")
    assert "Rank 1 (on " in told
    assert f"have different versions: lm_eval 0.0.7 and {version('lm_eval')}. Their scores are not comparable." in told
    assert not list((tmp_path / "run" / "stages").rglob("*.json"))


def test_scores_of_the_loop(run: Run) -> None:
    """The base model and the last merged one give the same scores when one rank measures them."""
    last = run.merged(2, run.recipe.merge[1])
    for place, model in ((run.base, run.base_model), (last, last.model)):
        found = load_scores(place)
        order = {
            "model": str(model),
            "task_folder": str(run.tasks), "tasks": [{"name": n} for n in found],
            "evaluate": {"dtype": "float32"},
        }  # fmt: skip
        assert_same_scores(found, on_one_rank(order)[1])


def test_expert_is_that_of_one_rank_with_twice_the_batch(run: Run, base_folder: Path, tmp_path: Path) -> None:
    """Two ranks take batches in turn from one shuffled order, so two batches of 2 are one batch of 4.

    The loss is the mean over the tokens of both, so the gradient is the same but for the order of its sums.
    """
    spec = run.stage(1).dataset
    assert spec
    (tmp_path / "expert").mkdir()
    record = train_expert(
        TrainJob(
            start=base_folder,
            base=base_folder,
            data=load_stage_data(spec, seed=0),
            seed=0,
            train=Train(**{**TRAIN, "per_device_train_batch_size": 4}),
        ),
        tmp_path / "expert",
        checkpoints=tmp_path / "checkpoints",
    )
    place = run.expert(1, "base")
    theirs = place.record("train")
    assert (theirs["steps"], theirs["tokens"]) == (record["steps"], record["tokens"])
    ours, others = ([e["loss"] for e in r["log"] if "loss" in e] for r in (record, theirs))
    assert len(ours) == TRAIN["max_steps"]
    assert others == pytest.approx(ours, rel=1e-4)
    base, one, two = (load_file(f / "model.safetensors") for f in (base_folder, tmp_path / "expert", place.model))
    for name, tensor in one.items():
        assert torch.dist(two[name], tensor) <= 1e-4 * torch.dist(tensor, base[name])
