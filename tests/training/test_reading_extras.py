"""Columns next to conversations, by every way of reading: each row's own, with its place in errors, and in mixes."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.train_strategies.replay import in_form_of
from hf_contmerge.training.data import StageData, documents, load_stage_data

TOOLS = [
    [{"name": "get", "parameters": {"place": "text", "default": None}}],
    [{"name": "add", "parameters": {"n": 1}}, {"name": "stop"}],
    None,
]
WITHOUT_NULLS = [[{"name": "get", "parameters": {"place": "text"}}], TOOLS[1], None]


def talk(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": "answer"}]


def rows(count: int = 9) -> list[dict[str, Any]]:
    return [
        {"messages": talk(i), "tools": TOOLS[i % 3], "chat_template_kwargs": {"think": bool(i % 2)}, "id": i}
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {"path": str(path)}


def load(**fields: Any) -> StageData:
    return load_stage_data(Dataset.model_validate({"heldout": 2, **fields}), seed=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_each_row_keeps_its_own(kind: str, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = load(
        **write(tmp_path / f"extras.{kind}", rows()), **({"streaming": True, "max_examples": 7} if streaming else {})
    )
    expected = TOOLS if kind == "jsonl" else WITHOUT_NULLS
    for row in [*data.train, *data.heldout]:
        number = int(row["messages"][0]["content"].removeprefix("ask "))  # pyright: ignore
        tools = json.loads(row["tools"]) if row["tools"] else None  # pyright: ignore
        assert (tools, row["chat_template_kwargs"]) == (expected[number % 3], {"think": bool(number % 2)})  # pyright: ignore
    assert "these columns are not used: id" in caplog.text
    texts = documents(
        data.heldout, data.form, chars=999, render=lambda turns, **given: f"{turns[0]['content']} {given}"
    )
    assert all("'think'" in text for text in texts)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams come in file order, three rows at a time."""
    monkeypatch.setattr("hf_contmerge.training._rows._BUFFER", 1)
    monkeypatch.setattr("hf_contmerge.training._rows._CHUNK", 3)


@pytest.mark.usefixtures("small_parts")
def test_tools_that_begin_late_in_a_stream(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    late = [{"messages": talk(i), **({"tools": TOOLS[0], "id": i} if i > 5 else {})} for i in range(9)]
    data = load(**write(tmp_path / "late.jsonl", late), streaming=True, max_examples=7)
    for row in [*data.train, *data.heldout]:
        number = int(row["messages"][0]["content"].removeprefix("ask "))  # pyright: ignore
        assert (json.loads(row["tools"]) if row["tools"] else None) == (TOOLS[0] if number > 5 else None)  # pyright: ignore
    assert caplog.text.count("these columns are not used: id") == 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({"chosen": "yes", "rejected": "no"}, {"prompt": "Really?"}),
        ({"text": "words"}, {"messages": talk(1)}),
        ({"messages": talk(1)}, {"chat_template_kwargs": {"think": True}}),
    ],
)
def test_a_column_that_begins_late_in_a_stream_and_changes_the_form(early: Any, late: Any, tmp_path: Path) -> None:
    written = write(tmp_path / "late.jsonl", [early] * 7 + [early | late])
    [name] = late
    with pytest.raises(DataError, match=f"line 8 has {name}, which earlier rows of the stream lack"):
        load(**written, streaming=True, max_examples=7)


def test_lengths_are_those_of_the_turns(tmp_path: Path) -> None:
    assert len(load(**write(tmp_path / "lengths.jsonl", rows()), max_chars=12).train) == 7


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tools", "[", "line 5: the column tools is no JSON"),
        ("tools", {"name": "get"}, "line 5: the column tools must hold a list of tool definitions"),
        ("chat_template_kwargs", None, "line 5: the column chat_template_kwargs must hold a mapping"),
        ("chat_template_kwargs", {"think": None}, "line 5: the column chat_template_kwargs must hold a mapping"),
        ("chat_template_kwargs", {"other": 1}, "line 5: the column chat_template_kwargs must hold a mapping"),
    ],
)
def test_errors_name_the_row(name: str, value: Any, message: str, tmp_path: Path) -> None:
    wrong = rows()
    wrong[4][name] = value
    with pytest.raises(DataError, match=message):
        load(**write(tmp_path / "wrong.jsonl", wrong))


@pytest.mark.parametrize("order", [("plain", "calls"), ("calls", "plain")])
def test_mixes_and_replay_have_both_tools_and_any_turns(order: tuple[str, str], tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "get", "arguments": {"x": 1}}]}
    plain = [{"messages": talk(i), "tools": TOOLS[0]} for i in range(9)]
    calls = [{"messages": [*talk(100 + i)[:1], call]} for i in range(9)]
    paths = {"plain": write(tmp_path / "plain.jsonl", plain), "calls": write(tmp_path / "calls.jsonl", calls)}
    data = load(mix=[{**paths[name], "share": 0.5} for name in order])
    assert {(bool(r["tools"]), "tool_calls" in r["messages"][1]) for r in data.train} == {(True, False), (False, True)}  # pyright: ignore
    fresh, old = (load(**paths[name]).train for name in order)
    replayed = in_form_of(fresh, old, "memory")
    assert [r["messages"] for r in replayed] == [r["messages"] for r in old]  # pyright: ignore
    assert all(bool(row["tools"]) == (order[1] == "plain") for row in replayed)  # pyright: ignore


def test_prompts_of_text_with_answers_of_turns_are_split(tmp_path: Path) -> None:
    """The layout of many preference datasets on the Hub."""
    pairs = [{"prompt": f"ask {i}", "chosen": talk(i), "rejected": talk(i)} for i in range(9)]
    for kind in ("jsonl", "parquet"):
        row = load(**write(tmp_path / f"split.{kind}", pairs)).train[0]
        assert [turn["role"] for name in ("prompt", "chosen") for turn in row[name]] == ["user", "assistant"]
