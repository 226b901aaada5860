"""ContinualMergeCallback in TRL's own trainers: the merge, the scores, training left as it is, mistakes told first."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from toys import TESTS
from toys.models import TEXT, toy_llama, toy_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_contmerge import ContinualMergeCallback, MergeState, score_stage
from hf_contmerge.errors import DataError, ModelError, RecipeError, RunError
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.scoring.files import write_choice_task, write_perplexity_task

WORDS = TEXT.split()
SCORE = {"dtype": "float32", "batch_size": 8}


def rows(seed: int) -> datasets.Dataset:
    draw = random.Random(seed)
    return datasets.Dataset.from_list([{"text": " ".join(draw.choices(WORDS, k=20))} for _ in range(12)])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_perplexity_task(folder, "nurse", TEXT.strip().splitlines())
    questions = [{"query": f"the {w}", "choices": list("abc"), "gold": i % 3} for i, w in enumerate(WORDS[:12])]
    write_choice_task(folder, "choice", questions)
    return folder


def trainer(model: Path, out: Path, *callbacks: TrainerCallback, seed: int = 0, peft: Any = None, **fields: Any) -> Any:
    how: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1e-2, "use_cpu": True,
        "bf16": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **fields,
    }  # fmt: skip
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model), args=SFTConfig(str(out), **how), train_dataset=rows(seed),
        processing_class=toy_tokenizer(), callbacks=list(callbacks), peft_config=peft,
    )  # fmt: skip


# The merge


@pytest.fixture(scope="module")
def home(base_folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, each in a trainer of its own; the second measures one task more and names neither base nor rule."""
    home = tmp_path_factory.mktemp("home")
    how = {"tasks_folder": tasks, **SCORE}
    first = ContinualMergeCallback(
        home / "state", base=base_folder, rule="magmax", export=home / "merged", tasks=["nurse"], score=how, lambda_=0.5
    )
    one = trainer(base_folder, home / "runs" / "law", first)
    one.train()
    (home / "history.json").write_text(json.dumps(one.state.log_history))
    how = {**how, "same_within": {"perplexity": 9.0}}
    second = ContinualMergeCallback(home / "state", export=home / "merged", tasks=["choice"], score=how)
    trainer(home / "merged" / "law", home / "runs" / "code", second, seed=1).train()
    return home


def test_two_stages_are_the_merge_of_a_state_bit_for_bit(home: Path, base_folder: Path, tmp_path: Path) -> None:
    experts = [home / "state" / "stages" / name / "expert" for name in ("law", "code")]
    state = MergeState.create(tmp_path / "state", base=base_folder, rule="magmax", **{"lambda": 0.5})
    state.add(experts[0]).export(tmp_path / "law")
    state.add(experts[1]).export(tmp_path / "code")
    for name in ("law", "code"):
        assert weights_sha256(home / "merged" / name) == weights_sha256(tmp_path / name)
    log = MergeState.load(home / "state").log()
    assert [e.stage for e in log.experts] == ["law", "code"]
    assert sorted(p.name for p in (home / "state" / "stages" / "law").iterdir()) == [
        "expert",
        "measured",
        "scores.json",
    ]


def test_training_is_as_without_the_callback(home: Path, base_folder: Path, tmp_path: Path) -> None:
    """lm-eval sets the random states before training begins; dropout and the order of the data must not notice."""
    plain = trainer(base_folder, tmp_path / "plain")
    plain.train()
    plain.save_model(str(tmp_path / "plain"))
    assert weights_sha256(tmp_path / "plain") == weights_sha256(home / "state" / "stages" / "law" / "expert")


def test_scores_and_what_was_forgotten(home: Path, tasks: Path) -> None:
    first, second = (json.loads((home / "state/stages" / n / "scores.json").read_text()) for n in ("law", "code"))
    assert list(first["scores"]["merged"]) == ["nurse"]
    assert list(second["scores"]["merged"]) == ["nurse", "choice"]
    assert list(second["scores"]["base"]) == ["nurse", "choice"]
    found = score_stage(home / "merged" / "code", ["nurse"], tasks_folder=tasks, dtype="float32")["nurse"]
    assert second["scores"]["merged"]["nurse"]["value"] == pytest.approx(found.value, rel=1e-6)
    row = second["forgetting"]["nurse"]
    rows = {"base": second["scores"]["base"], "law": first["scores"]["merged"]}
    best = max(rows, key=lambda name: rows[name]["nurse"]["utility"])
    assert row["best_after"] == best
    assert row["change"] == pytest.approx(found.utility - rows[best]["nurse"]["utility"])
    assert row["low"] <= row["change"] <= row["high"]
    assert row["seen"] == "the same"  # within the 9 nats of `same_within`
    assert second["forgetting"]["choice"]["best_after"] == "base"


def test_the_log_history_has_the_scores(home: Path) -> None:
    history = json.loads((home / "history.json").read_text())
    scores = json.loads((home / "state/stages/law/scores.json").read_text())["scores"]
    assert history[-1] == {f"law/{m}/nurse": scores[m]["nurse"]["value"] for m in scores} | {"step": 2}


def test_an_adapter_is_added_as_one(base_folder: Path, tmp_path: Path) -> None:
    callback = ContinualMergeCallback(tmp_path / "state", base=base_folder, rule="average", export=tmp_path / "merged")
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer(base_folder, tmp_path / "law", callback, peft=lora).train()
    state = MergeState.load(tmp_path / "state")
    assert [e.kind for e in state.log().experts] == ["adapter"]
    expert = tmp_path / "state" / "stages" / "law" / "expert"
    assert (expert / "adapter_model.safetensors").is_file()
    MergeState.create(tmp_path / "ours", base=base_folder, rule="average").add(expert).export(tmp_path / "wanted")
    assert weights_sha256(tmp_path / "wanted") == weights_sha256(tmp_path / "merged" / "law")


class Tracker(TrainerCallback):
    """A tracker of the trainer's, as its integrations are: what it is told goes into a file."""

    told: Path

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        with self.told.open("a") as file:
            file.write(json.dumps(logs) + "\n")


def test_trackers_are_told(base_folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "file", Tracker)
    monkeypatch.setattr(Tracker, "told", tmp_path / "told", raising=False)
    callback = ContinualMergeCallback(
        tmp_path / "state", base=base_folder, rule="ema", tasks=["choice"], score={"tasks_folder": tasks, **SCORE}
    )
    trainer(base_folder, tmp_path / "law", callback, report_to="file").train()
    last = json.loads((tmp_path / "told").read_text().splitlines()[-1])
    assert list(last) == ["law/base/choice", "law/expert/choice", "law/merged/choice"]


def test_tensorboard_shows_the_scores_in_the_trainers_own_run(base_folder: Path, tasks: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = ContinualMergeCallback(
        tmp_path / "state", base=base_folder, rule="ema", tasks=["choice"], score={"tasks_folder": tasks, **SCORE}
    )
    trainer(base_folder, tmp_path / "law", callback, report_to="tensorboard").train()
    folders = {path.parent for path in (tmp_path / "law").rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    events = event_accumulator.EventAccumulator(str(folders.pop()))
    events.Reload()
    assert [point.step for point in events.Scalars("train/law/merged/choice")] == [2]
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2]


# Mistakes, before the first step


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({"rule": None}, RecipeError, "holds no state yet. To start one, pass rule"),
        ({"base": None}, RecipeError, "holds no state yet. To start one, pass base"),
        ({"rule": "magmx"}, RecipeError, "Unknown rule 'magmx'"),
        ({"alpha": 1}, RecipeError, "magmax has no parameter 'alpha'"),
        ({"base": "./nowhere"}, ModelError, "There is no model at ./nowhere"),
        ({"stage": "a/b"}, RecipeError, "is not a valid stage name"),
        (
            {"tasks": [{"name": "x", "kind": "perplexity", "dataset": "no.jsonl"}]},
            DataError,
            "There is no file no",
        ),
    ],
    ids=["rule", "base", "unknown", "parameter", "nowhere", "stage", "task"],
)
def test_mistakes(
    words: dict[str, Any], kind: type[Exception], message: str, base_folder: Path, tmp_path: Path
) -> None:
    callback = ContinualMergeCallback(tmp_path / "state", **{"base": base_folder, "rule": "magmax", **words})
    begun = trainer(base_folder, tmp_path / "law", callback)
    with pytest.raises(kind, match=message):
        begun.train()
    assert begun.state.global_step == 0


def test_fields_that_are_unknown_are_told_when_the_callback_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Unknown field 'limt' in score_stage\. Did you mean 'limit'"):
        ContinualMergeCallback(tmp_path / "state", score={"limt": 2})


def test_a_model_that_does_not_fit_the_base(base_folder: Path, tmp_path: Path) -> None:
    def begin(model: Path, name: str, peft: Any = None, change: Callable[[Any], Any] | None = None) -> None:
        callback = ContinualMergeCallback(tmp_path / f"state-{name}", base=base_folder, rule="magmax")
        made = trainer(model, tmp_path / "out", callback, peft=peft)
        if change:
            change(made.model)
        made.train()

    other = toy_llama(tmp_path / "other", seed=2, hidden=16)
    with pytest.raises(ModelError, match=r"has shape \(384, 16\) in the model to train, \(384, 32\) in"):
        begin(other, "shape")
    with pytest.raises(ModelError, match=r"has model.layers.2.*which .*base lacks"):
        begin(toy_llama(tmp_path / "deep", seed=2, layers=3), "deep")
    with pytest.raises(ModelError, match=r"lacks model.layers.1.*of .*base"):
        begin(toy_llama(tmp_path / "flat", seed=2, layers=1), "flat")
    with pytest.raises(ModelError, match=r"has shape \(392, 32\) in the model to train"):
        begin(base_folder, "tokens", change=lambda model: model.resize_token_embeddings(392))
    with pytest.raises(ModelError, match="peft_type PROMPT_TUNING; only LORA"):
        begin(base_folder, "prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="was trained on"):
        begin(toy_llama(tmp_path / "twin", seed=2), "twin", LoraConfig(r=2, task_type="CAUSAL_LM"))


def test_a_stage_that_is_there_already(home: Path, base_folder: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"already has a stage law.*contmerge merge drop"):
        trainer(base_folder, tmp_path / "law", ContinualMergeCallback(home / "state")).train()
    (tmp_path / "merged" / "new").mkdir(parents=True)
    (tmp_path / "merged" / "new" / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match=r"The folder for the merged model, .*new, is not empty"):
        trainer(
            base_folder, tmp_path / "new", ContinualMergeCallback(home / "state", export=tmp_path / "merged")
        ).train()
    how = {"tasks_folder": tasks, **SCORE, "limit": 2}
    with pytest.raises(RecipeError, match="were measured with limit None, and now it is 2"):
        trainer(base_folder, tmp_path / "new", ContinualMergeCallback(home / "state", score=how)).train()


def test_weights_that_nobody_can_put_together(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = trainer(base_folder, tmp_path / "law", ContinualMergeCallback(tmp_path / "state", base=base_folder))
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(RecipeError, match=r"DEEPSPEED keeps the weights to itself.*FSDP2 or DDP"):
        begun.callback_handler.on_train_begin(begun.args, begun.state, begun.control)


# Ranks

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1], "loop"))]
import test_callback as t
from hf_contmerge import ContinualMergeCallback
from hf_contmerge.training.finetune import share_out_on_processors

base, tasks, out = map(Path, sys.argv[2:])
callback = ContinualMergeCallback(
    out / "state", base=base, rule="magmax", export=out / "merged", tasks=["nurse", "choice"],
    score={"tasks_folder": tasks, **t.SCORE},
)
trainer = t.trainer(base, out / "law", callback, per_device_train_batch_size=1)
share_out_on_processors(trainer)
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_two_ranks_do_what_one_does(
    env: dict[str, str], base_folder: Path, tasks: Path, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2", "--"]
    done = subprocess.run(
        [*torchrun, tmp_path / "script.py", TESTS, base_folder, tasks, tmp_path],
        capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true", **env}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expert = tmp_path / "state" / "stages" / "law" / "expert"
    start, one, two = (
        load_file(folder / "model.safetensors") for folder in (base_folder, home / "state/stages/law/expert", expert)
    )
    for name, tensor in one.items():  # two ranks with half the batch
        assert torch.dist(two[name], tensor) <= 1e-3 * torch.dist(tensor, start[name])
    MergeState.create(tmp_path / "ours", base=base_folder, rule="magmax").add(expert).export(tmp_path / "wanted")
    assert weights_sha256(tmp_path / "wanted") == weights_sha256(tmp_path / "merged" / "law")
    found = json.loads((tmp_path / "state/stages/law/scores.json").read_text())["scores"]
    wanted = score_stage(tmp_path / "merged" / "law", ["nurse", "choice"], tasks_folder=tasks, dtype="float32")
    assert {n: s["value"] for n, s in found["merged"].items()} == pytest.approx({n: s.value for n, s in wanted.items()})
