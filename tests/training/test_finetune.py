"""One stage of fine-tuning on a toy Llama: the expert, what the loss covers, training that was killed, bad settings."""

import json
import logging
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from toys.architectures import ARCHITECTURES, MIXTURE, Tiny, build
from toys.models import toy_llama, toy_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_contmerge.errors import ContmergeError, ModelError, RecipeError, ResourceError
from hf_contmerge.models.layout import check_same_layout
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.train_strategies import strategy_names
from hf_contmerge.training._log import OnLog
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.settings import (
    _check_launch,
    check_positions,
    make_strategies,
    sft_settings,
    training_checks,
)

Row = dict[str, Any]
LIGHT = {
    "per_device_train_batch_size": 4, "max_steps": 8, "max_length": 32, "learning_rate": 1e-2, "logging_steps": 1,
    "save_strategy": "no",
}  # fmt: skip
LORA = {"strategy": "lora", "parameters": {"r": 4, "lora_dropout": 0.1}}
MUTE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template as most models have it: it does not mark the assistant's turns."""


def sentences(path: Path, *, count: int = 40) -> Path:
    draw, words = random.Random(0), ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    return write_jsonl(path, [{"text": " ".join(draw.choices(words, k=20))} for _ in range(count)])


def load(path: Path) -> StageData:
    return load_stage_data(Dataset(path=str(path), heldout=2), seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    return load(sentences(tmp_path_factory.mktemp("data") / "x.jsonl"))


@pytest.fixture
def train(base_folder: Path, data: StageData, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that trains an expert in `tmp_path/<name>` and returns its record."""

    def train(
        name: str, *, base: Path = base_folder, start: Path | None = None, seed: int = 0, rows: StageData = data,
        on_log: OnLog = lambda _step, _point: None, **fields: Any,
    ) -> dict[str, Any]:  # fmt: skip
        (tmp_path / name).mkdir()
        return train_expert(
            TrainJob(start=start or base, base=base, data=rows, train=Train(**{**LIGHT, **fields}), seed=seed),
            tmp_path / name,
            checkpoints=tmp_path / f"{name}_checkpoints",
            on_log=on_log,
        )

    return train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses_of(record: Row) -> list[float]:
    return [entry["loss"] for entry in record["log"] if "loss" in entry]


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# The expert


@pytest.mark.parametrize("strategy", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False])
def test_expert(strategy: Row, tied: bool, train: Callable[..., Row], tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=1, tied=tied, dtype=torch.bfloat16)
    before = weights(base)
    record = train("expert", base=base, **strategy)
    losses = losses_of(record)
    assert len(losses) == record["steps"] == 8
    assert record["loss"] == losses[-1]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert record["examples"] == 38
    expert = weights(tmp_path / "expert")
    assert {n: t.shape for n, t in expert.items()} == {n: t.shape for n, t in before.items()}
    assert {t.dtype for t in expert.values()} == {torch.float32}
    check_same_layout(base, tmp_path / "expert")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "expert", dtype="auto")
    assert model.dtype is torch.float32
    assert all(torch.equal(t, expert[n]) for n, t in model.state_dict().items() if n in expert)
    assert same(base, base)
    changed = {n for n in before if not torch.equal(before[n].float(), expert[n])}
    assert changed == ({n for n in before if "proj" in n} if strategy else set(before))


@pytest.mark.parametrize("strategy", [LORA, {"strategy": "osf"}], ids=["lora", "osf"])
def test_factors_on_16_bits_keep_their_update(strategy: Row, train: Callable[..., Row], tmp_path: Path) -> None:
    """Its factors are float32; folded in, they are rounded once, and the record says what the file keeps."""
    base = toy_llama(tmp_path / "base", seed=1, dtype=torch.bfloat16)
    record = train(
        "expert", base=base, **{**strategy, "learning_rate": 1e-5, "model_init_kwargs": {"dtype": "bfloat16"}}
    )
    before, after = weights(base), weights(tmp_path / "expert")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert record["trained_in"] == "float32"
    assert record["stored"]["rounding"] == "stochastic"
    assert record["stored"]["nbytes"] == sum(t.nbytes for t in after.values())
    assert {n for n in before if not torch.equal(before[n], after[n])} <= {n for n in before if "proj" in n}
    assert record["stored"]["survival"] == pytest.approx(1, abs=0.15)


def test_training_in_16_bits_is_named(
    train: Callable[..., Row], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = toy_llama(tmp_path / "base", seed=1, dtype=torch.bfloat16)
    wide = toy_llama(tmp_path / "wide", seed=1)
    loading = {"model_init_kwargs": {"dtype": "bfloat16"}}
    assert train("expert", base=base)["trained_in"] == "float32"
    record = train("half", base=base, **loading)
    assert record["trained_in"] == "bfloat16"
    assert "stored" not in record
    loaded = {
        "auto": {"model_init_kwargs": {"dtype": "auto"}},
        "bfloat16": loading,
        "none": {},
        "lora": {**LORA, **loading},
    }
    warned = []
    for name, fields in loaded.items():
        for start in (base, wide):
            caplog.clear()
            for check in training_checks(Train(**{**LIGHT, **fields}), start):
                check()
            if caplog.messages:
                warned.append((name, start.name))
                assert caplog.messages[0].startswith("train.model_init_kwargs.dtype: weights in bfloat16 are rounded")
    assert warned == [("auto", "base"), ("bfloat16", "base"), ("bfloat16", "wide")]


def test_companions_are_the_base_models(train: Callable[..., Row], tmp_path: Path, base_folder: Path) -> None:
    """Also where training goes on from another model; only the dtype in the config is the expert's own."""
    base = toy_llama(tmp_path / "base", seed=1, dtype=torch.bfloat16)
    train("expert", base=base, start=base_folder)
    ours, theirs = ({p.name: p for p in f.iterdir()} for f in (tmp_path / "expert", base))
    assert ours.keys() == theirs.keys()
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} < ours.keys()
    for name in ours.keys() - {"config.json", "model.safetensors"}:
        assert ours[name].read_bytes() == theirs[name].read_bytes()
    values = json.loads(ours["config.json"].read_text())
    assert values["dtype"] == "float32"
    assert {**values, "dtype": "bfloat16"} == json.loads(theirs["config.json"].read_text())


def test_training_starts_from_the_start(train: Callable[..., Row], tmp_path: Path, base_folder: Path) -> None:
    """A learning rate of zero gives the model back, not the base's weights."""
    start = toy_llama(tmp_path / "start", seed=5)
    train("expert", start=start, learning_rate=0.0, max_steps=1)
    assert same(tmp_path / "expert", start)
    assert not same(tmp_path / "expert", base_folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{}, LORA], ids=["full", "lora"])
def test_seed(strategy: Row, train: Callable[..., Row], tmp_path: Path) -> None:
    train("one", **strategy)
    torch.rand(3)  # whatever was drawn before must not matter
    train("same", **strategy)
    train("other", seed=1, **strategy)
    assert same(tmp_path / "one", tmp_path / "same")
    assert not same(tmp_path / "one", tmp_path / "other")


def test_tokens_are_counted_without_padding(train: Callable[..., Row], base_folder: Path, data: StageData) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    whole = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in data.train.to_list())  # and its EOS
    record = train("expert", max_steps=-1, num_train_epochs=2, per_device_train_batch_size=3)
    assert record["tokens"] == 2 * whole
    assert record["steps"] == 2 * math.ceil(math.ceil(whole / 32) / 3)


def test_loss_of_training_too_short_to_be_logged(train: Callable[..., Row]) -> None:
    record = train("expert", logging_steps=100)
    assert losses_of(record) == [record["loss"]]
    assert record["log"][-1]["step"] == record["steps"]
    assert 0 < record["loss"] < 10


def test_a_step_with_a_checkpoint_is_logged(train: Callable[..., Row]) -> None:
    """A resumed training cannot know the losses since the last log, so none may be open where it begins."""
    record = train("expert", logging_steps=3, save_strategy="steps", save_steps=4)
    assert [point["step"] for point in record["log"]] == [3, 4, 6, 8]
    assert not [name for point in record["log"] for name in point if name.endswith(("runtime", "per_second"))]


# What the loss covers


def labels_of(base: Path, path: Path, out: Path, *, template: str | None = "the base's", **fields: Any) -> list[Row]:
    """Return each training example as SFTTrainer collates it: all of its text, and the text that the loss covers."""
    data, tokenizer = load(path), AutoTokenizer.from_pretrained(base)
    if template != "the base's":
        tokenizer.chat_template = template
    settings = sft_settings(Train(**{"max_length": 64, **fields}), data, tokenizer, numel=0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(output_dir=str(out), per_device_train_batch_size=2, **settings),
        train_dataset=data.train,
        processing_class=tokenizer,
    )
    found = []
    for batch in trainer.get_train_dataloader():
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            assert torch.equal(labels[labels != -100], ids[labels != -100])
            found.append({"text": tokenizer.decode(ids[mask == 1]), "trained": tokenizer.decode(ids[labels != -100])})
    return found


def talk(path: Path) -> Path:
    def turn(role: str, content: str) -> Row:
        return {"role": role, "content": content}

    return write_jsonl(path, [
        {"messages": [turn("user", f"what lays eggs {i}"), turn("assistant", f"the hen {i}"),
                      turn("user", "and two"), turn("assistant", "it is four")]}
        for i in range(6)
    ])  # fmt: skip


def test_all_of_packed_text_is_trained_on(base_folder: Path, tmp_path: Path) -> None:
    """The documents follow each other without a gap, each with its end; the blocks are shuffled, unless asked."""
    path = sentences(tmp_path / "x.jsonl")
    found = labels_of(base_folder, path, tmp_path, train_sampling_strategy="sequential")
    assert all(row["trained"] == row["text"] for row in found)
    assert "".join(row["text"] for row in found) == "".join(f"{r['text']}<|eos|>" for r in load(path).train.to_list())
    shuffled = labels_of(base_folder, path, tmp_path)
    assert shuffled != found
    assert sorted(row["trained"] for row in shuffled) == sorted(row["text"] for row in found)


def test_loss_covers_the_assistants_turns(base_folder: Path, tmp_path: Path) -> None:
    found = labels_of(base_folder, talk(tmp_path / "x.jsonl"), tmp_path)
    assert len(found) == 4
    for row in found:
        i = row["text"].split("what lays eggs ")[1][0]
        assert row["trained"] == f"the hen {i}<|im_end|>it is four<|im_end|>"


def test_template_that_does_not_mark_the_assistant(
    base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        found = labels_of(base_folder, talk(tmp_path / "x.jsonl"), tmp_path, template=MUTE)
    assert all(row["trained"] == row["text"] for row in found)
    assert caplog.messages == [
        f"The chat template of {base_folder} does not mark the assistant's turns ({{% generation %}}), so the loss "
        "covers whole conversations"
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_length": 33}, "max_length is 33. Set `max_length: 32`, or less."),
        ({}, "max_length is 1024. Set `max_length: 32`, or less."),
        ({"max_length": None}, "max_length is not set, so that no example is cut. Set `max_length: 32`, or less."),
        ({"max_length": 32}, None),
    ],
)
def test_texts_beyond_a_table_of_positions(fields: Row, said: str | None, data: StageData, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(
        tmp_path
    )
    words = {"name": "x", "base_model": "b", "merge": ["average"], "stages": [{"name": "s", "dataset": "x.jsonl"}]}
    recipe = parse_recipe({**words, "train": fields})
    if said is None:
        check_positions(recipe, {"s": data}, tmp_path)
        return
    with pytest.raises(RecipeError) as caught:
        check_positions(recipe, {"s": data}, tmp_path)
    assert str(caught.value) == f"train of stage s: {tmp_path} has a table of 32 positions, and {said}"


def test_conversations_without_a_template(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        labels_of(base_folder, talk(tmp_path / "x.jsonl"), tmp_path, template=None)
    assert str(caught.value) == (
        f"The tokenizer of {base_folder} has no chat template, which a stage with `messages` needs. Set "
        "`train.chat_template_path`, or give the stage `prompt` and `completion`, or `text`."
    )


def test_loss_covers_completions(base_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}: what lays eggs? Answer:", "completion": f" the hen {i}"} for i in range(6)]
    found = labels_of(base_folder, write_jsonl(tmp_path / "x.jsonl", rows), tmp_path)
    assert len(found) == 4
    for row in found:
        prompt, _, completion = row["text"].partition(" the hen")
        assert prompt.endswith("Answer:")
        assert row["trained"] == f" the hen{completion}"
        assert completion.endswith("<|eos|>")


def test_recipe_overrides_what_the_form_suggests(base_folder: Path, tmp_path: Path) -> None:
    found = labels_of(base_folder, talk(tmp_path / "x.jsonl"), tmp_path, assistant_only_loss=False)
    assert all(row["trained"] == row["text"] for row in found)


def test_a_gradient_in_a_step_that_is_not_logged(base_folder: Path, train: Callable[..., Row], tmp_path: Path) -> None:
    """Most blocks have parts of prompts alone. Also after a kill behind all steps that have a gradient."""
    words = "the quick brown fox jumps over a lazy dog " * 4
    rows = [{"prompt": words, "completion": f" the fox {i}"} for i in range(40)]
    blocks = {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "per_device_train_batch_size": 1}
    sparse = {"rows": load(write_jsonl(tmp_path / "x.jsonl", rows)), "max_steps": 9, "logging_steps": 9}
    saved = {"save_strategy": "steps", "save_steps": 7, "save_total_limit": 2}
    train("whole", **blocks, **sparse, **saved)
    left = tmp_path / "broken_checkpoints" / "checkpoint-7"
    left.parent.mkdir()
    (tmp_path / "whole_checkpoints" / "checkpoint-7").rename(left)
    logged = json.loads((left / "trainer_state.json").read_text())["log_history"]
    assert [(entry["step"], entry["grad_norm"] > 0) for entry in logged] == [(3, True), (7, False)]
    record = train("broken", **blocks, **sparse, **saved)
    assert [(point["step"], point["grad_norm"]) for point in record["log"]] == [(7, 0.0), (9, 0.0)]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# Training that was killed

KILLED = """
import json, os, re, signal, sys
from pathlib import Path
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train

order = json.loads(sys.stdin.read())

def hook(event, args):
    if event in ("open", "os.mkdir") and re.search(order["pattern"], f"{event} {args[0]}"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
base, out = Path(order["base"]), Path(order["out"])
data = load_stage_data(Dataset(path=order["data"], heldout=2), seed=0)
job = TrainJob(start=base, base=base, data=data, train=Train(**order["train"]))
train_expert(job, out, checkpoints=out.with_name(out.name + "_checkpoints"))
"""
MOMENTS = {
    "the third checkpoint is begun": r"os.mkdir.*checkpoint-6",
    "the third checkpoint is half written": r"open.*checkpoint-6/trainer_state.json",
    "nothing is left but to save the expert": r"open.*/broken/config.json",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "moment", "left", "lost"),
    [
        ({}, "the third checkpoint is begun", {"checkpoint-4"}, 4),
        (LORA, "the third checkpoint is half written", {"checkpoint-4", "checkpoint-6"}, 4),
        (LORA, "nothing is left but to save the expert", {"checkpoint-8"}, 0),
    ],
)
def test_killed_training_goes_on(
    strategy: Row, moment: str, left: set[str], lost: int, train: Callable[..., Row], base_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The weights are bit for bit those of training that was never broken, and only the lost steps are done again."""
    path = sentences(tmp_path / "x.jsonl")
    saving = {"save_strategy": "steps", "save_steps": 2, **strategy}
    whole = train("whole", rows=load(path), **saving)
    order = {
        "pattern": MOMENTS[moment], "base": str(base_folder), "out": str(tmp_path / "broken"), "data": str(path),
        "train": {**LIGHT, **saving},
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", KILLED], input=json.dumps(order), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = tmp_path / "broken_checkpoints"
    assert {p.name for p in checkpoints.glob("checkpoint-*")} == left
    if "half" in moment:
        (checkpoints / "checkpoint-6/trainer_state.json").write_text('{"best_metric": nu')
    shutil.rmtree(tmp_path / "broken", ignore_errors=True)  # as the run folder does before it trains again
    told = list[int]()
    record = train("broken", rows=load(path), on_log=lambda step, _: told.append(step), **saving)
    assert told == list(range(record["steps"] - lost + 1, record["steps"] + 1))
    assert same(tmp_path / "broken", tmp_path / "whole")
    assert [record[k] for k in ("steps", "tokens", "loss")] == [whole[k] for k in ("steps", "tokens", "loss")]
    assert record["log"] == whole["log"]


# Bad settings


def refused(kind: type[ContmergeError], start: Path, **fields: Any) -> str:
    with pytest.raises(ContmergeError) as caught:
        [check() for check in training_checks(Train(**fields), start)]
    assert type(caught.value) is kind
    return str(caught.value)


SETTINGS: list[tuple[Row, str]] = [
    (
        {"strategy": "ful"},
        f"Unknown strategy 'ful' in train. Did you mean 'full'? Known: {', '.join(strategy_names())}.",
    ),
    (
        {"parameters": {"r": 4}},
        "train.parameters: Full.__init__() got an unexpected keyword argument 'r' (strategy full)",
    ),
    (
        {"strategy": "lora", "parameters": {"rank": 4}},
        "train.parameters: LoraConfig.__init__() got an unexpected keyword argument 'rank' (strategy lora)",
    ),
    (
        {"strategy": "lora", "parameters": {"layers_to_transform": [0]}},
        "train.parameters: `layers_to_transform` cannot be used when `target_modules` is a str. (strategy lora)",
    ),
    (
        {"optim": "adamm"},
        "train: adamm is not a valid OptimizerNames, please select one of ",
    ),
]


@pytest.mark.parametrize(("fields", "message"), SETTINGS, ids=[" ".join(f) for f, _ in SETTINGS])
def test_setting_that_cannot_be(fields: Row, message: str, base_folder: Path) -> None:
    assert refused(RecipeError, base_folder, **fields).startswith(message)


MIXTURES = [tiny for tiny in ARCHITECTURES if tiny.kind == MIXTURE]


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("tiny", MIXTURES, ids=lambda tiny: tiny.name)
def test_mixture_learns_with_its_router_loss(
    tiny: Tiny, strategy: str, train: Callable[..., Row], tmp_path: Path
) -> None:
    """TRL reads the number of experts by a name that some configurations lack."""
    tokenizer, base = toy_tokenizer(), tmp_path / "mixture"
    model = build(tiny, vocab_size=len(tokenizer))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    record = train("expert", base=base, strategy=strategy, max_steps=2)
    text = model.config.get_text_config()
    with_router = getattr(text, "router_aux_loss_coef", 0) != 0 and hasattr(text, "output_router_logits")
    assert all((entry.get("aux_loss", 0) > 0) == with_router for entry in record["log"])
    if strategy == "full":
        assert json.loads((tmp_path / "expert/config.json").read_text()) == json.loads(
            (base / "config.json").read_text()
        )


LAUNCHES: list[tuple[dict[str, str], list[str], Row, str | None]] = [
    ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, ["full", "distill", "ewc"], {}, "distill and ewc cannot work"),
    ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, ["osf"], {}, "osf cannot work where the weights are shared"),
    ({"ACCELERATE_USE_FSDP": "1", "WORLD_SIZE": "2"}, ["osf"], {}, "osf cannot work where the weights are shared"),
    ({"ACCELERATE_USE_FSDP": "true"}, ["full", "distill"], {}, None),  # a single rank has all weights
    ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, ["full", "anchor"], {}, None),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["full", "anchor"], {}, "anchor cannot work under DeepSpeed"),
    ({}, ["lora", "migu"], {"deepspeed": "zero3.json"}, "migu cannot work under DeepSpeed"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["lora", "replay"], {}, None),
    ({}, ["full", "refresh"], {"fp16": True}, "refresh looks at gradients before the step, and `fp16` scales them"),
    ({}, ["full", "anchor"], {"fp16": True}, None),
]


@pytest.mark.parametrize(("env", "strategy", "fields", "message"), LAUNCHES)
def test_launch_that_a_strategy_cannot_have(
    env: dict[str, str], strategy: list[str], fields: Row, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    strategies = make_strategies(Train(strategy=strategy))
    if message is None:
        _check_launch(strategies, fields, "train of stage x")
        return
    with pytest.raises(RecipeError, match=f"^train of stage x: {message}"):
        _check_launch(strategies, fields, "train of stage x")


def test_unknown_field(base_folder: Path) -> None:
    message = refused(RecipeError, base_folder, learning_rat=1e-3)
    assert message.startswith("Unknown field 'learning_rat' in train. Did you mean 'learning_rate'? Known: ")
    assert "'strategy'" in refused(RecipeError, base_folder, stratgy="lora")


def test_good_settings(base_folder: Path) -> None:
    for fields in ({}, LIGHT, {**LIGHT, **LORA}):
        for check in training_checks(Train(**fields), base_folder):
            check()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"bias": "some"}, "Requested bias: some, is not implemented."),
        ({"target_modules": ["nope"]}, "Target modules {'nope'} not found in the base model."),
    ],
)
def test_lora_that_does_not_fit_the_model(parameters: Row, message: str, train: Callable[..., Row]) -> None:
    with pytest.raises(RecipeError) as caught:
        train("expert", strategy="lora", parameters=parameters)
    assert str(caught.value).startswith(f"train.parameters: {message}")
    assert str(caught.value).endswith(" (strategy lora)")


def test_too_little_memory(tmp_path: Path) -> None:
    """A model of which there is only the header, in a sparse file: a tenth as many parameters as memory has bytes."""
    columns = psutil.virtual_memory().total // 10 // 1024
    size = 2 * 1024 * columns
    header = {"w": {"dtype": "BF16", "shape": [1024, columns], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        os.truncate(file.fileno(), 8 + len(text) + size)
    assert Weights(tmp_path).numel() == 1024 * columns
    message = refused(ResourceError, tmp_path)
    have = psutil.virtual_memory().total / 2**30
    assert message == (
        f"Training {tmp_path} with strategy full needs about {16 * 1024 * columns / 2**30:.1f} GiB and this machine "
        f"has {have:.1f} GiB. Use `strategy: lora`, a smaller model, or more GPUs."
    )
    for check in training_checks(Train(strategy="lora"), tmp_path):
        check()
