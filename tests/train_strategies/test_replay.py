"""Replay: what is remembered within which budget, what is mixed in, what cannot be mixed."""

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset as Rows
from toys.models import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.errors import DataError
from hf_contmerge.loop.plan.checks import check_replay
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.train_strategies import get_strategy
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob

Row = dict[str, Any]
TURNS = [{"role": "user", "content": "what lays eggs"}, {"role": "assistant", "content": "the hen"}]


def texts(stage: str, count: int) -> Rows:
    return Rows.from_list([{"text": f"{stage} {i}"} for i in range(count)])


def remember(data: Rows, memory: Path | None, out: Path, model: Any = None, **parameters: Any) -> Path:
    out.mkdir()
    get_strategy("replay", **parameters).remember(model, data, memory, out)
    return out


def kept(memory: Path) -> list[list[str]]:
    """Return the texts that are remembered of each stage."""
    return [list(Rows.from_parquet(str(path))["text"]) for path in sorted(memory.iterdir())]  # pyright: ignore


# What is remembered


def test_the_stages_share_the_memory(tmp_path: Path) -> None:
    """Each keeps the ones with its lowest keys, so that a later memory holds the first of an earlier one."""
    memory, before = None, []
    for number, stage in enumerate("abc", 1):
        memory = remember(texts(stage, 50), memory, tmp_path / stage, examples=12)
        now = kept(memory)
        assert [len(rows) for rows in now] == [12 // number] * number
        assert all(len({*rows}) == len(rows) and all(r.startswith(s) for r in rows) for s, rows in zip("abc", now))  # noqa: B905
        assert [rows[: 12 // number] for rows in before] == now[:-1]
        before = now


def test_what_is_remembered_does_not_depend_on_the_order(tmp_path: Path) -> None:
    data = texts("a", 50)
    one = remember(data, None, tmp_path / "one", examples=10)
    two = remember(data.select(range(49, -1, -1)), None, tmp_path / "two", examples=10)
    assert kept(one) == kept(two)
    assert (one / "000.parquet").read_bytes() == (two / "000.parquet").read_bytes()
    assert kept(one)[0] != data["text"][:10]


def test_small_stage_is_remembered_whole_at_most(tmp_path: Path) -> None:
    memory = remember(texts("a", 3), None, tmp_path / "a")
    assert sorted(kept(memory)[0]) == ["a 0", "a 1", "a 2"]


def test_budget_in_tokens(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    data = Rows.from_list(
        [{"text": "the quick brown fox " * (1 + i % 5)} | {"text": f"{i} " * (1 + i % 7)} for i in range(60)]
    )
    memory = remember(data, None, tmp_path / "a", model, tokens=100)
    first = kept(memory)[0]
    assert 80 < sum(len(tokenizer(t)["input_ids"]) for t in first) <= 100
    memory = remember(data, memory, tmp_path / "b", model, tokens=100)
    for rows in kept(memory):
        assert 30 < sum(len(tokenizer(t)["input_ids"]) for t in rows) <= 50
    assert first[: len(kept(memory)[0])] == kept(memory)[0]


def test_conversations_are_remembered(base_folder: Path, tmp_path: Path) -> None:
    data = Rows.from_list([{"messages": [*TURNS, {"role": "user", "content": f"and {i}"}]} for i in range(20)])
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    memory = remember(data, None, tmp_path / "a", model, tokens=60)
    mixed = get_strategy("replay", share=0.5).mix(data.select([0]), memory, seed=0)
    assert len(mixed) == 2
    assert all(row in data["messages"] for row in mixed["messages"])


# What is mixed in


def test_share_of_the_examples(tmp_path: Path) -> None:
    memory = remember(texts("b", 40), remember(texts("a", 40), None, tmp_path / "a"), tmp_path / "b")
    fresh = texts("c", 90)
    mixed = get_strategy("replay", share=0.25).mix(fresh, memory, seed=3)["text"]
    old = [t for t in mixed if not t.startswith("c")]
    assert len(old) == len({*old}) == 30
    assert {t[0] for t in old} == {"a", "b"}
    assert sorted(t for t in mixed if t.startswith("c")) == sorted(fresh["text"])
    quarters = [sum(not t.startswith("c") for t in mixed[i : i + 30]) for i in range(0, 120, 30)]
    assert min(quarters) >= 3  # among the new ones, not after them


def test_small_memory_is_gone_through_again(tmp_path: Path) -> None:
    memory = remember(texts("a", 40), None, tmp_path / "a", examples=4)
    mixed = get_strategy("replay", share=0.5).mix(texts("b", 10), memory, seed=0)["text"]
    counts = [mixed.count(t) for t in {t for t in mixed if t.startswith("a")}]
    assert sorted(counts) == [2, 2, 3, 3]


def test_mixing_is_seeded(tmp_path: Path) -> None:
    memory = remember(texts("a", 40), None, tmp_path / "a")
    one, same, other = (
        get_strategy("replay", share=0.3).mix(texts("b", 20), memory, seed=s)["text"][:] for s in (0, 0, 1)
    )
    assert one == same != other


def test_without_a_past_or_a_share(tmp_path: Path) -> None:
    fresh = texts("a", 5)
    assert get_strategy("replay").mix(fresh, None, seed=0) is fresh
    memory = remember(texts("b", 5), None, tmp_path / "b")
    assert get_strategy("replay", share=0.0).mix(fresh, memory, seed=0) is fresh


def test_heldout_documents_never_get_in(base_folder: Path, tmp_path: Path) -> None:
    """Through a stage of training: what is remembered is of the training examples, which the held-out ones are not."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"the quick brown fox jumps over {i} dogs"} for i in range(30)])
    data = load_stage_data(Dataset(path=str(path), heldout=10), seed=0)
    light = {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 16, "save_strategy": "no"}
    train = Train.model_validate({"strategy": "replay", **light})
    (tmp_path / "out").mkdir()
    train_expert(
        TrainJob(start=base_folder, base=base_folder, data=data, train=train, seed=0),
        tmp_path / "out",
        checkpoints=tmp_path / "checkpoints",
        memory_out=tmp_path / "memory",
    )
    (remembered,) = kept(tmp_path / "memory" / "replay")
    assert sorted(remembered) == sorted(data.train["text"])
    assert not {*remembered} & {*data.heldout["text"]}


# Forms


def mixed_form(old: Row, fresh: Row, tmp_path: Path) -> list[Row]:
    """Return an old example as it is mixed with a new one."""
    memory = remember(Rows.from_list([old]), None, tmp_path / "memory")
    mixed = get_strategy("replay", share=0.5).mix(Rows.from_list([fresh]), memory, seed=0)
    return [row for row in mixed if row != fresh]


PAIR, TEXT, TALK = {"prompt": "2 and 2?", "completion": " four"}, {"text": "the hen"}, {"messages": TURNS}


@pytest.mark.parametrize(
    ("old", "fresh", "becomes"),
    [(PAIR, TEXT, {"text": "2 and 2? four"}), (TEXT, PAIR, {"prompt": "", "completion": "the hen"})],
    ids=["a pair is text", "text is a completion"],
)
def test_forms_that_can_be_mixed(old: Row, fresh: Row, becomes: Row, tmp_path: Path) -> None:
    assert mixed_form(old, fresh, tmp_path) == [becomes]


@pytest.mark.parametrize(("old", "fresh"), [(TALK, TEXT), (TEXT, TALK), (TALK, PAIR), (PAIR, TALK)])
def test_forms_that_cannot_be_mixed(old: Row, fresh: Row, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        mixed_form(old, fresh, tmp_path)
    assert str(caught.value).startswith(f"replay cannot mix the examples of {tmp_path}/memory/000.parquet (")
    assert str(caught.value).endswith(
        "Give all of them one form (text, messages, or prompt and completion), or leave replay out."
    )


def test_forms_are_checked_before_anything_is_trained(tmp_path: Path) -> None:
    forms = {"a": TEXT, "b": PAIR, "c": TALK}
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", [row] * 2) for name, row in forms.items()}
    data: dict[str, StageData] = {
        name: load_stage_data(Dataset(path=str(path), heldout=0), seed=0) for name, path in paths.items()
    }

    def recipe(names: str, strategy: str) -> Any:
        stages = [{"name": n, "dataset": {"path": str(paths[n]), "heldout": 0}} for n in names]
        return parse_recipe(
            {"name": "x", "base_model": "y", "stages": stages, "merge": ["ema"], "train": {"strategy": strategy}}
        )

    check_replay(recipe("ab", "replay"), data)
    check_replay(recipe("abc", "full"), data)
    with pytest.raises(DataError, match=r"of .*/a\.jsonl \(text: str\) with new ones \(messages: list\)"):
        check_replay(recipe("abc", "replay"), data)


# Parameters


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"share": 1.0}, "replay's share must be less than 1; got 1.0"),
        ({"examples": 0}, "replay's examples must be greater than or equal to 1; got 0"),
        ({"examples": 5, "tokens": 5}, "replay has both `examples` and `tokens`; give the memory one size"),
    ],
)
def test_what_cannot_be(parameters: Row, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        get_strategy("replay", **parameters)
