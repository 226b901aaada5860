"""Stages that learn from labelled answers, by TRL's KTOTrainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.models import write_jsonl
from toys.trainings import Row, Training
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.commands.main import main
from hf_contmerge.errors import DataError, RecipeError
from hf_contmerge.loop.plan.rehearsal import rehearse
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.train_strategies import get_strategy
from hf_contmerge.train_strategies.lora import Lora
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.limits import trainer_limits
from hf_contmerge.training.settings import data_checks, training_checks
from hf_contmerge.training.tokenizer import count_tokens

KTO: Row = {"learn": "kto", "optim": "adamw_torch", "gradient_accumulation_steps": 1}


def rows_of(count: int = 40) -> list[Row]:
    """Return a good and a bad answer to each question."""
    answers = {True: "the quick fox", False: "a lazy dog"}
    return [{"prompt": f"say {i // 2}: ", "completion": answers[i % 2 == 0], "label": i % 2 == 0} for i in range(count)]


def load(path: Path, base: Path, rows: list[Row] | str, **fields: Any) -> StageData:
    if isinstance(rows, str):
        path.write_text(rows)
    else:
        write_jsonl(path, rows)
    limits = trainer_limits(Train(learn="kto"), base, trust_remote_code=False)
    return load_stage_data(Dataset(path=str(path), **{"heldout": 4, **fields}), seed=0, limits=limits)


@pytest.fixture(scope="module")
def data(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StageData:
    return load(tmp_path_factory.mktemp("kto") / "x.jsonl", base_folder, rows_of())


# Data


def test_only_good_answers_are_held_out(data: StageData) -> None:
    assert data.form == "unpaired"
    assert data.heldout["label"] == [True] * 4
    assert data.train.column_names == ["prompt", "completion", "label"]
    assert sorted(data.train["label"]) == [False] * 20 + [True] * 16


@pytest.mark.parametrize("label", [True, False])
def test_a_label_is_no_text(label: bool, base_folder: Path) -> None:
    """Shares of tokens and plans count what is read."""
    row = {"prompt": "say: ", "completion": "the fox"}
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert count_tokens(tokenizer, {**row, "label": label}) == count_tokens(tokenizer, row)


def test_labels_of_files(base_folder: Path, tmp_path: Path) -> None:
    """Numbers and CSV; anything else has its line."""
    numbers = [{**row, "label": int(row["label"])} for row in rows_of()]
    text = "prompt,completion,label\n" + "".join(f"p{i},fox {i},{i % 2 == 0}\n" for i in range(20))
    for name, rows in (("numbers.jsonl", numbers), ("text.csv", text)):
        found = load(tmp_path / name, base_folder, rows)
        assert {*found.train["label"]} == {True, False}
        assert all(isinstance(label, bool) for label in found.train["label"])
    with pytest.raises(DataError, match=r"line 3: the column label holds 'good'; true for a good answer or false was"):
        load(tmp_path / "x.jsonl", base_folder, [*rows_of(2), {**rows_of()[0], "label": "good"}])


def test_rows_without_a_label_are_left_out(base_folder: Path, tmp_path: Path) -> None:
    found = load(tmp_path / "x.jsonl", base_folder, [*rows_of(), {**rows_of()[0], "label": None}])
    assert found.sources[0].left_out == {"lack prompt or completion or label": 1}


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}] * 9,
            {},
            "has the columns prompt, completion; `learn: kto` needs `prompt`",
        ),
        (rows_of(), {"text": "completion"}, "and neither `text` nor `messages`"),
        (rows_of(), {"heldout": 30}, "has 20 good answers, but 30 are to be held out. Lower `heldout`"),
    ],
)
def test_data_that_cannot_be(rows: list[Row], fields: Row, message: str, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path / "x.jsonl", base_folder, rows, **fields)
    assert message in str(caught.value)


def test_a_label_alone_makes_no_labelled_answers(tmp_path: Path) -> None:
    """Without `learn`, the columns decide as ever."""
    path = write_jsonl(tmp_path / "x.jsonl", rows_of())
    assert load_stage_data(Dataset(path=str(path)), seed=0).form == "prompt_completion"


# Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "dft"}, "loss_type dft is for texts, not labelled answers."),
        ({"loss_type": "sigmoid"}, "Unknown loss_type 'sigmoid' in `learn: kto`."),
        ({"per_device_train_batch_size": 1}, "needs per_device_train_batch_size 2 or more"),
        ({"train_sampling_strategy": "random"}, "Remove train_sampling_strategy"),
        (
            {"packing": True},
            "train of stage s sets packing. It is for texts and conversations, and this stage has others",
        ),
        ({"max_completion_length": 9}, "It is for prompts (`learn: grpo`) or demonstrations (`learn: sdft`), and this"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect on labelled answers. Remove it, or "),
        ({"label_smoothing": 0.1}, "It is for preference pairs, and this stage has others"),
    ],
)
def test_settings_that_cannot_be(fields: Row, message: str, data: StageData) -> None:
    stage = {"name": "s", "dataset": "x.jsonl", "train": {"learn": "kto", **fields}}
    recipe = parse_recipe({"name": "x", "base_model": "b", "merge": ["average"], "stages": [stage]})
    with pytest.raises(RecipeError) as caught:
        [check() for check in data_checks(recipe, {"s": data})]
    assert message in str(caught.value)


def test_settings_that_can_be(base_folder: Path, data: StageData) -> None:
    """Also one step of the trainer on a tiny model, before any work; a run's loss for texts is not KTO's."""
    train = Train(learn="kto", desirable_weight=2.0, beta=0.2, loss_type="dft", packing=True)  # pyright: ignore
    for check in training_checks(train, base_folder, memory=False):
        check()
    for strategy in ("full", "lora"):
        rehearse(train.model_copy(update={"strategy": (strategy,)}), data, base_folder, "train")


def test_strategies_that_need_texts(base_folder: Path, data: StageData, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"eaft needs the tokens of texts, and a stage has preferences"):
        Training(tmp_path, base_folder, data)("expert", {"eaft": get_strategy("eaft")}, **KTO)


# Training


def preference(folder: Path, base: Path) -> float:
    """Return by how much more likely the good answers are than the bad ones, in nats."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    found = 0.0
    for row in rows_of():
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]])
        start = len(tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():
            logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        found += float(logs[start - 1 :].sum()) * (1 if row["label"] else -1)
    return found / len(rows_of())


@pytest.mark.parametrize("carrier", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_good_answers_become_likelier_than_bad_ones(
    carrier: str, base_folder: Path, data: StageData, tmp_path: Path
) -> None:
    """A real training of some seconds; killed half-way, it ends with the same bytes."""
    train = Training(tmp_path, base_folder, data)
    parts: Any = {"lora": Lora(r=4)} if carrier == "lora" else {}
    fields = {**KTO, "learning_rate": 1e-2, "max_steps": 8, "beta": 0.5, "per_device_train_batch_size": 4,
              "save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}  # fmt: skip
    record = train("whole", parts, **fields)
    assert preference(tmp_path / "whole", base_folder) > preference(base_folder, base_folder) + 0.2
    assert {"rewards/margins", "kl"} <= {*record["log"][-1]}
    left = tmp_path / "broken-checkpoints"
    left.mkdir()
    (tmp_path / "whole-checkpoints" / "checkpoint-4").rename(left / "checkpoint-4")
    parts = {"lora": Lora(r=4)} if carrier == "lora" else {}
    broken = train("broken", parts, **fields)
    assert train.bytes("broken") == train.bytes("whole")
    assert broken["log"] == record["log"]
    assert load_file(base_folder / "model.safetensors").keys() == train.weights("whole").keys()


@pytest.mark.slow
def test_a_run_with_labelled_answers(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, trained after a stage of texts, merged and scored on the good answers that were held out."""
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"the quick brown fox number {i} jumps over a lazy dog"} for i in range(20)]
    files = [
        str(write_jsonl(tmp_path / name, rows)) for name, rows in (("texts.jsonl", texts), ("kto.jsonl", rows_of()))
    ]
    recipe = {
        "name": "thumbs", "base_model": str(base_folder), "merge": ["magmax"],
        "train": {"max_steps": 3, "max_length": 64, "logging_steps": 1, "save_strategy": "no", "packing": True},
        "stages": [
            {"name": "texts", "dataset": {"path": files[0], "heldout": 3}},
            {"name": "answers", "dataset": {"path": files[1], "heldout": 3},
             "train": {"learn": "kto", "learning_rate": 1e-3}},
        ],
    }  # fmt: skip
    Path("recipe.yml").write_text(json.dumps(recipe))
    assert main(["plan", "recipe.yml"]) == 0
    assert main(["run", "recipe.yml"]) == 0
    run = Run.open(parse_recipe(recipe), tmp_path / "runs" / "thumbs")
    record = run.expert(2, "previous").record("train")
    assert record["settings"]["learning_rate"] == 1e-3
    assert "rewards/margins" in record["log"][-1]
    held = [json.loads(line)["text"] for line in (run.tasks / "answers_heldout.jsonl").read_text().splitlines()]
    assert len(held) == 3
    assert all("quick fox" in text for text in held)
