"""Stages that learn from answers the model samples: GRPO with rewards, SDFT with demonstrations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.models import write_jsonl
from toys.trainings import Row, Training

from hf_contmerge.commands.main import main
from hf_contmerge.errors import DataError, RecipeError
from hf_contmerge.loop.plan.rehearsal import rehearse
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.plugins import _FILES, use_plugin
from hf_contmerge.train_strategies import get_strategy
from hf_contmerge.train_strategies.lora import Lora
from hf_contmerge.training.data import StageData, documents, load_stage_data
from hf_contmerge.training.limits import trainer_limits
from hf_contmerge.training.sampling import loading_by
from hf_contmerge.training.settings import data_checks, training_checks, trl_classes

VOWELS = """
from dataclasses import dataclass
from hf_contmerge.training.rewards import Reward

@dataclass
class Vowels(Reward):
    '''The share of these letters in an answer.'''
    letters: str = "aeiou"

    def score(self, answers):
        return [sum(letter in self.letters for letter in text) / max(1, len(text)) for text in answers.texts]
"""
GRPO: Row = {"learn": "grpo", "rewards": {"exact_match": {}}}
SDFT: Row = {"learn": "sdft"}
TEMPLATE = "{prompt} {privileged_context} "
SAMPLED: Row = {
    "max_completion_length": 8, "per_device_train_batch_size": 8, "num_generations": 4, "optim": "adamw_torch",
    "gradient_accumulation_steps": 1, "gradient_checkpointing": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def vowels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("plugins") / "vowel_rewards.py"
    file.write_text(VOWELS)
    use_plugin(file)
    yield file
    _FILES.pop(file.name)


def rows_of(count: int = 24) -> list[Row]:
    return [{"prompt": f"say {i}: ", "completion": "the quick brown fox", "answer": i % 3} for i in range(count)]


def talk_of(count: int = 24) -> list[Row]:
    def turn(role: str, text: str) -> list[Row]:
        return [{"role": role, "content": text}]

    return [
        {"prompt": turn("user", f"say {i}"), "completion": turn("assistant", "the fox"), "answer": "2.5"}
        for i in range(count)
    ]


def load(path: Path, base: Path, rows: list[Row], train: Row, **fields: Any) -> StageData:
    write_jsonl(path, rows)
    limits = trainer_limits(Train(**train), base, trust_remote_code=False)
    return load_stage_data(Dataset(path=str(path), **{"heldout": 4, **fields}), seed=0, limits=limits)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sampled")


# Data


def test_prompts_and_the_columns_of_rewards(base_folder: Path, tmp_path: Path) -> None:
    """Numbers become text; a prompt that is held out is not trained on, and is measured with its answer."""
    data = load(tmp_path / "prompts.jsonl", base_folder, rows_of(), GRPO)
    assert data.form == "prompts"
    assert data.train.column_names == ["prompt", "answer"]
    assert {*data.train["answer"]} == {"0", "1", "2"}
    texts = documents(data.heldout, data.form, chars=99, render=lambda turns: str(turns))
    assert all(text == row["prompt"] + row["answer"] for text, row in zip(texts, data.heldout, strict=True))  # pyright: ignore
    talk = load(tmp_path / "talk-prompts.jsonl", base_folder, talk_of(), GRPO)
    found = documents(talk.heldout, talk.form, chars=999, render=lambda turns: turns[-1]["content"])
    assert found == ["2.5"] * 4


def test_a_file_has_other_examples_for_each_way_to_learn(base_folder: Path, tmp_path: Path) -> None:
    """Whichever was read first, and is in the cache."""
    rows = [row | {"label": i % 2 == 0} for i, row in enumerate(rows_of())]
    ways: list[tuple[Row, list[str]]] = [
        (GRPO, ["prompt", "answer"]), ({"learn": "grpo", "rewards": {"repetition": {}}}, ["prompt"]),
        (SDFT, ["prompt", "completion"]), ({"learn": "kto"}, ["prompt", "completion", "label"]),
        ({}, ["prompt", "completion"]), (GRPO, ["prompt", "answer"]),
    ]  # fmt: skip
    for train, columns in ways:
        data = load(tmp_path / "one-file-for-all.jsonl", base_folder, rows, train)
        assert (data.train.column_names, len(data.train)) == (columns, 20)


def test_a_reward_may_read_any_column(base_folder: Path, tmp_path: Path) -> None:
    train = {"learn": "grpo", "rewards": {"exact_match": {"column": "completion"}, "overlong": {}}}
    data = load(tmp_path / "other-column.jsonl", base_folder, rows_of(), train)
    assert data.train.column_names == ["prompt", "completion"]
    rehearse(Train(**train, **SAMPLED), data, base_folder, "train")


def test_demonstrations(base_folder: Path, tmp_path: Path) -> None:
    data = load(tmp_path / "demonstrations.jsonl", base_folder, rows_of(), SDFT)
    assert (data.form, data.train.column_names) == ("demonstrations", ["prompt", "completion"])
    talk = talk_of()
    talk[3]["prompt"] += [{"role": "assistant", "content": "well"}]
    talk[5]["prompt"] = []
    data = load(tmp_path / "odd-talk.jsonl", base_folder, talk, SDFT)
    assert data.sources[0].left_out == {
        "have a prompt that does not end with the user's turn": 1, "have no turn": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("train", "rows", "message"),
    [
        (GRPO, [{"text": "a"}] * 9, "has the columns text; `learn: grpo` needs `prompt`, and the columns that its"),
        (GRPO, [{"prompt": "a", "anwser": "b"}] * 9, "Unknown column 'answer' in"),
        (GRPO, [{"prompt": "a", "answer": [1]}] * 9, "line 1: the column answer holds [1]; text or a number was"),
        (GRPO, [{"prompt": 7, "answer": "x"}] * 9, "line 1: the column prompt holds 7; text, or turns with"),
        (SDFT, [{"prompt": "a"}] * 9, "has the columns prompt; `learn: sdft` needs `prompt` and `completion`"),
    ],
)
def test_data_that_cannot_be(train: Row, rows: list[Row], message: str, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path / "wrong-prompts.jsonl", base_folder, rows, train)
    assert message in str(caught.value)


def test_rows_that_are_left_out(base_folder: Path, tmp_path: Path) -> None:
    rows = [*rows_of(), {"prompt": "", "answer": 1}, {"prompt": "x", "answer": None}]
    data = load(tmp_path / "gaps.jsonl", base_folder, rows, GRPO)
    assert data.sources[0].left_out == {"have an empty prompt": 1, "lack prompt or answer": 1}


# Settings


def refusal(train: Row, data: StageData, **run: Any) -> str:
    stage = {"name": "s", "dataset": "x.jsonl", "train": train}
    recipe = parse_recipe({"name": "x", "base_model": "b", "merge": ["average"], "stages": [stage], "train": run})
    with pytest.raises(RecipeError) as caught:
        [check() for check in data_checks(recipe, {"s": data})]
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": {}}, "`learn: grpo` needs `rewards`, such as `rewards: [exact_match]`"),
        ({"rewards": ["exakt_match"]}, "Unknown reward 'exakt_match' in rewards. Did you mean 'exact_match'?"),
        ({"rewards": {"exact_match": {"colum": "x"}}}, "unexpected keyword argument 'colum'"),
        ({"rewards": {"overlong": {"most": 0}}}, "overlong's most must be greater than or equal to 1; got 0"),
        ({"rewards": {"overlong": {"most": 5}}}, "overlong's margin 64 is larger than `most`, 5"),
        ({"reward_weights": [1, 2]}, "reward_weights has 2 numbers for 1 rewards"),
        ({"loss_type": "dft"}, "loss_type dft is for texts, not prompts (`learn: grpo`)"),
        ({"loss_type": "kto"}, "Unknown loss_type 'kto' in `learn: grpo`."),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect on prompts (`learn: grpo`). Remove it"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy has no effect on prompts (`learn: grpo`)."),
        ({"num_generations": 3}, "must be divisible by num_generations (3)"),
        (
            {"packing": True},
            "train of stage s sets packing. It is for texts and conversations, and this stage has others",
        ),
        ({"distillation_topk": 5}, "It is for demonstrations (`learn: sdft`), and this stage has others"),
    ],
)
def test_settings_of_grpo_that_cannot_be(fields: Row, message: str, base_folder: Path, home: Path) -> None:
    data = load(home / "grpo-settings.jsonl", base_folder, rows_of(), GRPO)
    assert message in refusal({**GRPO, **fields}, data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_model_kind": "bass"}, "Unknown teacher_model_kind 'bass' in `learn: sdft`. Did you mean 'base'?"),
        ({"teacher_prompt_template": "{prompt}"}, "must contain both `{prompt}` and `{privileged_context}`"),
        ({"teacher_prompt_template": TEMPLATE + "{prompt.__class__}"}, "must hold {prompt} and {privileged_context}"),
        ({"teacher_prompt_template": TEMPLATE + "{prompt:>99999999}"}, "and no other field or format"),
        ({"teacher_prompt_template": TEMPLATE + "{"}, "teacher_prompt_template: "),
        ({"distillation_mode": "sampled_token"}, "only supports reverse KL"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect on demonstrations (`learn: sdft`)."),
        ({"epsilon": 0.1}, "It is for prompts (`learn: grpo`), and this stage has others"),
    ],
)
def test_settings_of_sdft_that_cannot_be(fields: Row, message: str, base_folder: Path, home: Path) -> None:
    data = load(home / "sdft-settings.jsonl", base_folder, rows_of(), SDFT)
    assert message in refusal({**SDFT, **fields}, data)


@pytest.mark.parametrize(
    ("strategy", "parameters", "word"),
    [
        ("osf", {}, "osf"), ("lora", {"keep": True}, "lora with `keep`"), ("distill", {}, "distill"),
        ("refresh", {}, "refresh"), ("replay", {"within_batch": True}, "replay"),
    ],
)  # fmt: skip
def test_strategies_that_cannot_be(strategy: str, parameters: Row, word: str, base_folder: Path, home: Path) -> None:
    data = load(home / "grpo-strategies.jsonl", base_folder, rows_of(), GRPO)
    run = {"strategy": strategy, "parameters": parameters}
    assert f"{word} cannot be combined with prompts (`learn: grpo`)" in refusal(GRPO, data, **run)


def test_rewards_without_their_objective(base_folder: Path, home: Path) -> None:
    data = load(home / "sdft-rewards.jsonl", base_folder, rows_of(), SDFT)
    words = "train of stage s: rewards are for `learn: grpo`, and it is not set"
    assert words in refusal({**SDFT, "rewards": ["exact_match"]}, data)
    assert words in refusal(SDFT, data, rewards=["exact_match"])


def test_rewards_by_name_alone() -> None:
    assert Train(learn="grpo", rewards=["exact_match", "overlong"]).rewards == {"exact_match": {}, "overlong": {}}  # pyright: ignore
    assert Train(learn="grpo", rewards="exact_match").rewards == {"exact_match": {}}  # pyright: ignore


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("learn", [GRPO, SDFT], ids=["grpo", "sdft"])
def test_settings_that_can_be(learn: Row, strategy: str, base_folder: Path, home: Path) -> None:
    """Also a step of the trainer on a tiny model, before any work; a run's loss for texts is not theirs."""
    train = Train(**learn, strategy=(strategy,), loss_type="dft", max_length=9)  # pyright: ignore
    for name, rows in (("plain", rows_of()), ("turns", talk_of())):
        data = load(home / f"{train.learn}-{name}.jsonl", base_folder, rows, learn)
        for check in training_checks(train, base_folder, memory=False):
            check()
        rehearse(train, data, base_folder, "train")


# Rewards from files


def test_a_reward_of_a_file_needs_the_users_word(
    base_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without `--plugin` its name is unknown; what it gives is checked."""
    from hf_contmerge.runtime import plugins

    file = tmp_path / "bad_rewards.py"
    file.write_text(
        "from hf_contmerge.training.rewards import Reward\n"
        "class Broken(Reward):\n    def score(self, answers):\n        return [1 / 0]\n"
        "class Short(Reward):\n    def score(self, answers):\n        return [1.0]\n"
        "class Endless(Reward):\n    def score(self, answers):\n        return [float('inf')] * len(answers.texts)\n"
    )
    write_jsonl(tmp_path / "filed.jsonl", rows_of())
    recipe = {"name": "filed", "base_model": str(base_folder), "merge": ["average"], "plugins": [],
              "stages": [{"name": "s", "dataset": {"path": str(tmp_path / "filed.jsonl"), "heldout": 2}}],
              "train": {"max_steps": 1, **SAMPLED, **GRPO}}  # fmt: skip

    def told(reward: str, *words: str) -> str:
        recipe["train"]["rewards"] = [reward]
        (tmp_path / "filed.yml").write_text(json.dumps(recipe))
        assert main(["run", str(tmp_path / "filed.yml"), "--run", str(tmp_path / "run"), *words]) == 2
        return capfd.readouterr().err

    try:
        assert "Unknown reward 'broken'" in told("broken")
        given = ("--plugin", str(file))
        assert "The reward broken failed: ZeroDivisionError: division by zero." in told("broken", *given)
        assert "The reward short gives 1 numbers for 2 answers; one each." in told("short", *given)
        assert "The reward endless gives inf; a finite number or None was expected." in told("endless", *given)
    finally:
        plugins._FILES.pop(file.name, None)
    assert not list((tmp_path / "run").glob("stages/*/experts"))


# Training


def whole_and_broken(train: Training, parts: Any, **fields: Any) -> Row:
    """Train twice, the second time from a checkpoint of the first; both must have the same bytes and log."""
    fields = {**SAMPLED, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2, **fields}
    record = train("whole", parts(), **fields)
    left = train.home / "broken-checkpoints"
    left.mkdir()
    (train.home / "whole-checkpoints" / "checkpoint-5").rename(left / "checkpoint-5")
    broken = train("broken", parts(), **fields)
    assert train.bytes("broken") == train.bytes("whole")
    assert broken["log"] == record["log"]
    return record


def lora() -> Any:
    return {"lora": Lora(r=4)}


@pytest.mark.parametrize("parts", [dict, pytest.param(lora, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_answers_earn_more_of_a_reward(parts: Any, vowels: Path, base_folder: Path, tmp_path: Path) -> None:
    """GRPO for some seconds, killed between two samplings in the second epoch."""
    train = {"learn": "grpo", "rewards": {"vowels": {}}}
    data = load(tmp_path / "vowels.jsonl", base_folder, rows_of(12), train)
    fields = {"max_steps": 9, "learning_rate": 5e-2, "per_device_train_batch_size": 16, "steps_per_generation": 2,
              "beta": 0.01, "num_generations": 8}  # fmt: skip
    record = whole_and_broken(Training(tmp_path, base_folder, data), parts, **train, **fields)
    rewards = [point["reward"] for point in record["log"] if "reward" in point]
    assert record["log"][4]["epoch"] > 1
    if parts is dict:
        assert sum(rewards[-2:]) > 1.3 * sum(rewards[:2])
    assert record["tokens"] > 0
    assert {"kl", "rewards/vowels/mean", "entropy"} <= {*record["log"][0]}
    assert (
        load_file(base_folder / "model.safetensors").keys()
        == Training(tmp_path, base_folder, data).weights("whole").keys()
    )


def test_rewards_that_tell_no_answers_apart(base_folder: Path, tmp_path: Path) -> None:
    data = load(tmp_path / "never-right.jsonl", base_folder, rows_of(12), GRPO)
    with pytest.raises(
        DataError, match=r"zero in all 1 steps\. All answers to a prompt earned the same, as where none"
    ):
        Training(tmp_path, base_folder, data)("none", {}, **GRPO, **{**SAMPLED, "max_steps": 1})


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_grpo_at_another_temperature(temperature: float, vowels: Path, base_folder: Path, tmp_path: Path) -> None:
    """The loss is then of another distribution than the model's logits without it."""
    train = {"learn": "grpo", "rewards": {"vowels": {}}, "temperature": temperature}
    data = load(tmp_path / "warm.jsonl", base_folder, rows_of(12), train)
    record = Training(tmp_path, base_folder, data)("warm", {}, **train, **{**SAMPLED, "max_steps": 1})
    assert record["steps"] == 1


@pytest.mark.parametrize(
    ("parts", "teacher"),
    [
        (dict, "base"),
        pytest.param(dict, "ema", marks=pytest.mark.slow),
        pytest.param(lora, "base", marks=pytest.mark.slow),
    ],
    ids=["full", "moving teacher", "lora"],
)
def test_the_student_nears_its_teacher(parts: Any, teacher: str, base_folder: Path, tmp_path: Path) -> None:
    """SDFT for some seconds, killed between two samplings; a moving teacher is kept too."""
    data = load(tmp_path / "sdft-learns.jsonl", base_folder, rows_of(12), SDFT)
    fields = {"max_steps": 9, "learning_rate": 3e-3, "steps_per_generation": 2, "teacher_model_kind": teacher,
              "per_device_train_batch_size": 16}  # fmt: skip
    record = whole_and_broken(Training(tmp_path, base_folder, data), parts, **SDFT, **fields)
    losses = [point["loss"] for point in record["log"] if "loss" in point]
    if parts is dict and teacher == "base":
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_the_teacher_is_the_stages_start(base_folder: Path, tmp_path: Path) -> None:
    """TRL would load what the model's config names: another, where the stage starts from an adapter."""
    calls = []
    for form in ("prompts", "demonstrations"):
        trainer = trl_classes(form)[0]  # pyright: ignore
        home = __import__(trainer.__module__, fromlist=["x"])
        plain = home.create_model_from_path
        with loading_by(trainer, lambda form=form: calls.append(form)):
            home.create_model_from_path("unused", dtype=torch.float32)
        assert home.create_model_from_path is plain
    assert calls == ["prompts", "demonstrations"]


def test_replay_of_prompts(vowels: Path, base_folder: Path, tmp_path: Path) -> None:
    """Prompts of an earlier stage among the new ones, with the columns of their rewards."""
    data = load(tmp_path / "replayed-prompts.jsonl", base_folder, rows_of(12), GRPO)
    (tmp_path / "memory").mkdir()
    get_strategy("replay").remember(None, data.train, None, tmp_path / "memory")  # pyright: ignore
    mixed = get_strategy("replay", share=0.5).mix(data.train, tmp_path / "memory", seed=0)
    assert mixed.column_names == ["prompt", "answer"]
    assert len(mixed) == 16


@pytest.mark.slow
def test_a_run_that_learns_by_itself(
    vowels: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts, then demonstrations, then rewards: planned, trained, merged, scored; the plugin is in the record."""
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"the quick brown fox number {i} jumps over a lazy dog"} for i in range(20)]
    rows = {"texts": texts, "shown": rows_of(), "rewarded": rows_of()}
    for name, part in rows.items():
        write_jsonl(tmp_path / f"run-{name}.jsonl", part)
    learn: dict[str, Row] = {
        "texts": {},
        "shown": SDFT,
        "rewarded": {"learn": "grpo", "rewards": {"vowels": {"letters": "o"}}},
    }
    recipe = {
        "name": "itself", "base_model": str(base_folder), "merge": ["magmax"], "plugins": [str(vowels)],
        "train": {"max_steps": 2, "max_length": 64, "logging_steps": 1, "save_strategy": "no",
                  "per_device_train_batch_size": 4},
        "stages": [{"name": name, "dataset": {"path": f"run-{name}.jsonl", "heldout": 3},
                    "train": {**learn[name], **({"max_completion_length": 64} if learn[name] else {})}}
                   for name in rows],
    }  # fmt: skip
    Path("recipe.yml").write_text(json.dumps(recipe))
    given = ("--plugin", str(vowels))
    assert main(["plan", "recipe.yml", "--json", *given]) == 0
    plan = json.loads(capsys.readouterr().out)
    seconds = {p["stage"]: p["seconds"] for p in plan["phases"] if p["phase"] == "train"}
    assert seconds[2] > seconds[1]
    assert main(["run", "recipe.yml", *given]) == 0
    run = Run.open(parse_recipe(recipe), tmp_path / "runs" / "itself")
    shown, rewarded = (run.expert(t, "previous").record("train") for t in (2, 3))
    assert "sdft/distillation_loss" in shown["log"][-1]
    assert rewarded["settings"]["rewards"] == {"vowels": {"letters": "o"}}
    assert "rewards/vowels/mean" in rewarded["log"][-1]
    assert rewarded["versions"]["vowel_rewards.py"].startswith("sha256:")
    assert "vowel_rewards.py" not in shown["versions"]
