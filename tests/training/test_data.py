"""Datasets as users have them: every kind of file and form, what is held out of them, and what is wrong with them."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from toys.hub_server import Hub, Repo, hub_server
from toys.models import write_jsonl

from hf_contmerge.errors import ContmergeError, DataError, ResourceError
from hf_contmerge.run.recipe.parts import Dataset, Task
from hf_contmerge.training.data import StageData, documents, load_stage_data, task_rows

Row = dict[str, Any]
ROWS: list[Row] = [{"text": f"document number {i}", "n": i} for i in range(12)]
TEXTS = {row["text"] for row in ROWS}
TURNS = [{"role": "user", "content": "what lays eggs"}, {"role": "assistant", "content": "the hen"}]


def load(path: Path | str, *, seed: int = 0, **fields: Any) -> StageData:
    return load_stage_data(Dataset(path=str(path), **{"heldout": 3, **fields}), seed=seed)


def texts(data: datasets.Dataset) -> list[str]:
    return list(data["text"])


def refused(kind: type[ContmergeError], ask: Callable[[], Any], folder: Path) -> str:
    """Return the message of the error, with FOLDER for the test's own folder."""
    with pytest.raises(ContmergeError) as caught:
        ask()
    assert type(caught.value) is kind
    return str(caught.value).replace(str(folder), "FOLDER")


# Kinds of file


def _json(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def _jsonl(path: Path) -> None:
    write_jsonl(path, ROWS)


def _parquet(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(path)


def _csv(path: Path) -> None:
    path.write_text("text,n\n" + "".join(f'"{row["text"]}",{row["n"]}\n' for row in ROWS))


def _txt(path: Path) -> None:
    path.write_text("".join(f"{row['text']}\n" for row in ROWS))


def _saved(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)


def _saved_splits(path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)


def _folder(path: Path) -> None:
    path.mkdir()
    write_jsonl(path / "train.jsonl", ROWS)


KINDS: dict[str, Callable[[Path], None]] = {
    "x.json": _json, "x.jsonl": _jsonl, "x.JSONL": _jsonl, "x.parquet": _parquet, "x.csv": _csv, "x.txt": _txt,
    "saved": _saved, "saved_splits": _saved_splits, "folder": _folder,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_file(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    data = load(tmp_path / name)
    assert data.form == "text"
    assert data.train.column_names == data.heldout.column_names == ["text"]
    assert (len(data.train), len(data.heldout)) == (9, 3)
    assert {*texts(data.train), *texts(data.heldout)} == TEXTS


@pytest.mark.parametrize("name", ["saved", "folder", "x.parquet"])
def test_nothing_is_written_beside_the_data(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    load(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _jsonl(tmp_path / "x.jsonl")
    assert len(load("~/x.jsonl").train) == 9


# Forms


def test_messages(tmp_path: Path) -> None:
    rows = [{"messages": [{**TURNS[0], "content": f"say {i}"}, TURNS[1]], "text": "other", "n": i} for i in range(6)]
    data = load(write_jsonl(tmp_path / "x.jsonl", rows))
    assert data.form == "messages"
    assert data.train.column_names == ["messages"]
    assert data.train[0]["messages"] in [row["messages"] for row in rows]


def test_messages_in_a_column_of_another_name(tmp_path: Path) -> None:
    rows = [{"talk": [{**TURNS[0], "content": f"say {i}"}, TURNS[1]], "text": "other"} for i in range(6)]
    data = load(write_jsonl(tmp_path / "x.jsonl", rows), messages="talk")
    assert data.form == "messages"
    assert data.train.column_names == ["messages"]
    both = [{"messages": TURNS, "chosen": TURNS, "rejected": TURNS, "prompt": str(i)} for i in range(6)]
    path = write_jsonl(tmp_path / "both.jsonl", both)
    assert load(path, heldout=0, messages="messages").form == "messages"
    assert load(path, heldout=0).form == "preference"


@pytest.mark.parametrize("column", ["x", [{"from": "human", "value": "x"}]])
def test_messages_that_are_none(column: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"talk": column}])
    message = refused(DataError, lambda: load(path, messages="talk"), tmp_path)
    assert message.startswith(
        "FOLDER/x.jsonl, line 1: the column talk must hold conversations, lists of turns with `role` and "
    )


def test_prompt_and_completion(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} and {i}?", "completion": f" {2 * i}", "text": "other"} for i in range(6)]
    data = load(write_jsonl(tmp_path / "x.jsonl", rows))
    assert data.form == "prompt_completion"
    assert data.train.column_names == ["prompt", "completion"]
    assert documents(data.heldout, data.form, chars=100, render=_fail) == [
        f"{row['prompt']}{row['completion']}" for row in data.heldout.to_list()
    ]


@pytest.mark.parametrize(
    ("text", "first"), [("body", "b0"), ("{question} -> {answer}", "q0 -> 0"), ("{answer:03d}", "000")]
)
def test_text_is_a_column_or_a_format(text: str, first: str, tmp_path: Path) -> None:
    rows = [{"body": f"b{i}", "question": f"q{i}", "answer": i, "messages": TURNS} for i in range(6)]
    data = load(write_jsonl(tmp_path / "x.jsonl", rows), text=text)
    assert data.form == "text"
    assert data.train.column_names == ["text"]
    assert first in {*texts(data.train), *texts(data.heldout)}


def test_documents_are_cut_and_conversations_rendered(tmp_path: Path) -> None:
    def render(messages: list[Row]) -> str:
        return "|".join(m["content"] for m in messages)

    plain = datasets.Dataset.from_list([{"text": "abcdef"}, {"text": "ab"}])
    assert documents(plain, "text", chars=4, render=_fail) == ["abcd", "ab"]
    talk = datasets.Dataset.from_list([{"messages": TURNS}])
    assert documents(talk, "messages", chars=100, render=render) == ["what lays eggs|the hen"]
    split = datasets.Dataset.from_list([{"prompt": TURNS[:1], "completion": TURNS[1:]}])
    assert documents(split, "prompt_completion", chars=14, render=render) == ["what lays eggs"]


def _fail(messages: list[Row]) -> str:
    raise AssertionError(f"there is no conversation to render here: {messages}")


# What is held out


@pytest.mark.parametrize("copies", [1, 4])
def test_no_held_out_document_is_trained_on(copies: int, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS * copies)
    for seed in range(5):
        data = load(path, seed=seed)
        held = set(texts(data.heldout))
        assert len(data.heldout) == 3
        assert not held & set(texts(data.train))
        assert len(data.train) == copies * (12 - len(held))


def test_copies_of_conversations_are_held_out_too(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"say {i % 4}"}, TURNS[1]]} for i in range(12)]
    data = load(write_jsonl(tmp_path / "x.jsonl", rows))
    said = [{row["messages"][0]["content"] for row in part.to_list()} for part in (data.train, data.heldout)]
    assert said[0]
    assert not said[0] & said[1]


def test_seed_decides_the_order(tmp_path: Path) -> None:
    _jsonl(tmp_path / "x.jsonl")
    first, again, other = (load(tmp_path / "x.jsonl", seed=s) for s in (0, 0, 1))
    assert texts(first.train) == texts(again.train) != texts(other.train)
    assert texts(first.heldout) == texts(again.heldout) != texts(other.heldout)


def test_max_examples_leaves_the_held_out_ones_as_they_are(tmp_path: Path) -> None:
    _jsonl(tmp_path / "x.jsonl")
    few, all_of_them = load(tmp_path / "x.jsonl", max_examples=4), load(tmp_path / "x.jsonl")
    assert texts(few.train) == texts(all_of_them.train)[:4]
    assert texts(few.heldout) == texts(all_of_them.heldout)
    assert len(load(tmp_path / "x.jsonl", max_examples=100).train) == 9


def test_nothing_held_out(tmp_path: Path) -> None:
    _jsonl(tmp_path / "x.jsonl")
    data = load(tmp_path / "x.jsonl", heldout=0)
    assert (len(data.train), len(data.heldout)) == (12, 0)


@pytest.mark.parametrize(("heldout", "held"), [(2, 2), (0, 5), (32, 5)])
def test_split_of_its_own(heldout: int, held: int, tmp_path: Path) -> None:
    """Its documents are taken out of the training ones, where they stand there as well; 0 means all of them."""
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [*ROWS[:2], *({"text": f"test {i}", "n": i} for i in range(3))])
    data = load(tmp_path, heldout=heldout, heldout_split="test")
    assert len(data.heldout) == held
    assert not set(texts(data.heldout)) & set(texts(data.train))
    assert set(texts(data.train)) == TEXTS - set(texts(data.heldout))


def test_part_of_a_file(tmp_path: Path) -> None:
    _jsonl(tmp_path / "x.jsonl")
    data = load(tmp_path / "x.jsonl", split="train[:6]", heldout=1)
    assert {*texts(data.train), *texts(data.heldout)} == {row["text"] for row in ROWS[:6]}


# Length and streams


def test_examples_that_are_too_short_or_too_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"body": "x" * n} for n in range(1, 21)])
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        data = load(path, text="body", min_chars=5, max_chars=12)
    assert sorted(map(len, [*texts(data.train), *texts(data.heldout)])) == list(range(5, 13))
    assert caplog.messages == [
        f"{path}: 12 of 20 rows are left out, for they have not at least 5 and at most 12 characters"
    ]


def test_length_is_that_of_prompt_and_answer(tmp_path: Path) -> None:
    """Of conversations that of all turns, of pairs that of the longer answer; templates add nothing."""
    talk = [{"messages": [TURNS[0], {**TURNS[1], "content": "x" * n}]} for n in range(10)]
    longest = len(TURNS[0]["content"]) + 6
    data = load(write_jsonl(tmp_path / "m.jsonl", talk), max_chars=longest, heldout=0)
    assert sorted(len(row["messages"][1]["content"]) for row in data.train.to_list()) == list(range(7))
    asked = [{"prompt": "1234", "completion": "x" * n} for n in range(10)]
    assert len(load(write_jsonl(tmp_path / "p.jsonl", asked), min_chars=10, heldout=0).train) == 4
    rivals = [{"prompt": "1234", "chosen": "x", "rejected": "x" * n} for n in range(1, 10)]
    assert len(load(write_jsonl(tmp_path / "r.jsonl", rivals), max_chars=8, heldout=0).train) == 4


def test_nothing_is_long_enough(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert refused(DataError, lambda: load(path, min_chars=500), tmp_path) == (
        "FOLDER/x.jsonl (split train) has no example that is left: 12 have not at least 500 characters."
    )


@pytest.mark.parametrize("name", [*KINDS])
def test_stream_of_any_kind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at the end of a Parquet stream
    KINDS[name](tmp_path / name)
    data = load(tmp_path / name, streaming=True, max_examples=6)
    assert (len(data.train), len(data.heldout)) == (6, 3)
    assert len({*texts(data.train), *texts(data.heldout)} & TEXTS) == 9
    again, other = (load(tmp_path / name, streaming=True, max_examples=6, seed=seed) for seed in (0, 1))
    assert texts(again.train) == texts(data.train) != texts(other.train)
    assert texts(again.heldout) == texts(data.heldout)


def test_stream_goes_on_until_there_are_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows that are left out do not count; where there are fewer than asked for, all are taken."""
    rows = [{"text": f"{i:05d} long enough" if i % 3 == 0 else "short" if i % 3 == 1 else None} for i in range(6000)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        data = load(path, streaming=True, max_examples=1500, min_chars=10, heldout=100)
    assert (len(data.train), len(data.heldout)) == (1500, 100)
    assert all(text.endswith("long enough") for text in (*texts(data.train), *texts(data.heldout)))
    assert {m.split(" of ")[1] for m in caplog.messages} == {
        "5000 rows are left out, for they lack text",
        "5000 rows are left out, for they have not at least 10 characters",
    }
    assert len(load(path, streaming=True, max_examples=9999, min_chars=10, heldout=100).train) == 1900


def test_stream_with_a_split_of_its_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [{"text": f"test {i}", "n": i} for i in range(9)])
    data = load(tmp_path, streaming=True, max_examples=5, heldout=4, heldout_split="test")
    assert (len(data.train), len(data.heldout)) == (5, 4)
    assert set(texts(data.train)) < TEXTS
    assert all(text.startswith("test") for text in texts(data.heldout))


@pytest.mark.parametrize(
    "name", ["empty.jsonl", "broken.jsonl", "columns.csv", "near.csv", "number.jsonl", "book.epub"]
)
def test_wrong_stream(name: str, tmp_path: Path) -> None:
    contents, fields, message = WRONG[name]
    (tmp_path / name).write_text(contents)
    ask = {**fields, "streaming": True, "max_examples": 3}
    assert refused(DataError, lambda: load(tmp_path / name, **ask), tmp_path) == message


FROM_HUB = """
import json, sys
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.run.recipe.parts import Dataset
for fields in json.loads(sys.argv[1]):
    data = load_stage_data(Dataset(path="me/law", heldout=3, **fields), seed=0)
    print(json.dumps([data.train["text"][:], data.heldout["text"][:]]))
"""


def from_hub(hub: Hub, *entries: Row) -> list[tuple[list[str], list[str]]]:
    """Load a dataset of the Hub in a process that may reach it; return each entry's training and held-out texts."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.folder / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FROM_HUB, json.dumps(entries)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_dataset_of_the_hub(tmp_path: Path) -> None:
    """Whole, a slice, another split; a stream leaves files where they are once it has enough."""
    with hub_server(tmp_path / "hub") as hub:
        hub.repos["datasets/me/law"] = Repo(private=False)
        shards = {
            f"train-{i:05d}-of-00080.jsonl": "".join(f'{{"text": "document {i} {j}"}}\n' for j in range(500))
            for i in range(80)
        }
        files = {**shards, "test-00000-of-00001.jsonl": "".join(f'{{"text": "test {i}"}}\n' for i in range(5))}
        hub.commit("datasets/me/law", "data", {path: hub.store(text.encode()) for path, text in files.items()})
        [(stream, held)] = from_hub(hub, {"streaming": True, "max_examples": 20})
        fetched = {r.rpartition("/")[2] for r in hub.requests if r.startswith("GET /datasets")}
        assert (len(stream), len(held)) == (20, 3)
        assert len(fetched) < 80
        whole, part = from_hub(hub, {"max_examples": 20}, {"split": "train[:10]", "heldout_split": "test"})
    assert len(whole[0]) == 20
    assert sorted(part[0]) == sorted(f"document 0 {i}" for i in range(10))
    assert len(part[1]) == 3
    assert all(text.startswith("test") for text in part[1])


# What is wrong


def test_rows_without_text_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [*ROWS[:6], {"text": None, "n": 1}, {"n": 2}, {"text": " \n", "n": 3}])
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        data = load(path)
    assert (len(data.train), len(data.heldout)) == (3, 3)
    assert caplog.messages == [f"{path}: 3 of 9 rows are left out, for they lack text"]
    assert len(load(path, text="{text} {n}").train) == 4


def test_prompt_may_be_blank(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": f"once upon {i} times"} for i in range(6)]
    assert len(load(write_jsonl(tmp_path / "x.jsonl", rows)).train) == 3


ASKED = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
IN_TEXT: dict[str, Row] = {
    "completion": {"prompt": "why", "completion": "so"},
    "chosen": {"prompt": "why", "chosen": "so", "rejected": "no"},
}
IN_TURNS: dict[str, Row] = {
    "completion": {"prompt": ASKED[:1], "completion": ASKED[1:]},
    "chosen": {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [{**ASKED[1], "content": "no"}]},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", IN_TEXT)
@pytest.mark.parametrize("first", ["text", "turns"])
def test_rows_of_one_file_are_all_text_or_all_turns(form: str, first: str, streaming: bool, tmp_path: Path) -> None:
    """Arrow has one type for a column: the second kind ended in an error of datasets'."""
    one, other = (IN_TEXT, IN_TURNS) if first == "text" else (IN_TURNS, IN_TEXT)
    path = write_jsonl(tmp_path / "x.jsonl", [*[one[form]] * 6, other[form]])
    ask = {"streaming": True, "max_examples": 7} if streaming else {}
    message = refused(DataError, lambda: load(path, **ask), tmp_path)
    here, earlier = ("turns", "text") if first == "text" else ("text", "turns")
    if streaming:  # shuffled
        assert re.fullmatch(
            r"FOLDER/x\.jsonl, line \d: prompt is (text here and turns|turns here and text) in earlier rows\. .*",
            message,
        )
    else:
        assert message == (
            f"FOLDER/x.jsonl, line 7: prompt is {here} here and {earlier} in earlier rows. Write all rows in one form."
        )


WRONG: dict[str, tuple[str, Row, str]] = {
    # file name: its contents, fields of the dataset entry, the message
    "empty.jsonl": ("", {}, "FOLDER/empty.jsonl (split train) is empty."),
    "newline.jsonl": ("\n", {}, "FOLDER/newline.jsonl (split train) is empty."),
    "empty.json": ("[]", {}, "FOLDER/empty.json (split train) is empty."),
    "header.csv": ("text,n\n", {}, "FOLDER/header.csv (split train) is empty."),
    "empty.txt": ("", {}, "FOLDER/empty.txt (split train) is empty."),
    "null.jsonl": ('{"text": null}\n', {}, "FOLDER/null.jsonl (split train) is empty."),
    "blank.jsonl": ('{"text": " "}\n' * 9, {}, "FOLDER/blank.jsonl (split train) is empty."),
    "few.txt": (
        "a\nb\nc\n",
        {"heldout": 3},
        "FOLDER/few.txt has 3 examples, but 3 are to be held out and none would be left to train on. Give more "
        "examples, or set `heldout` to a smaller number.",
    ),
    "same.txt": (
        "a\n" * 9,
        {},
        "FOLDER/same.txt has no example to train on once the held-out ones are removed.",
    ),
    "broken.jsonl": (
        '{"text": "a"}\n{"text": \n',
        {},
        "FOLDER/broken.jsonl, line 2: this is no JSON object (Expecting value at character 9). Correct it, or remove "
        "it.",
    ),
    "broken.parquet": (
        "text",
        {},
        "FOLDER/broken.parquet cannot be read (split train): Parquet file size is 4 bytes, smaller than the minimum "
        "file footer (8 bytes)",
    ),
    "columns.csv": (
        "body,n\nx,1\n",
        {},
        "FOLDER/columns.csv has the columns body, n; a stage needs `messages`, or `prompt` and `completion`, or "
        "`prompt`, `chosen` and `rejected`, or `text`. Name the text's column, or a format such as "
        "'{question}\\n{answer}', with `text`; that of conversations with `messages`.",
    ),
    "near.csv": (
        "body,n\nx,1\n",
        {"text": "bdy"},
        "Unknown column 'bdy' in FOLDER/near.csv. Did you mean 'body'? Known: body, n.",
    ),
    "far.csv": (
        "body,n\nx,1\n",
        {"text": "{body} {zzz}"},
        "Unknown column 'zzz' in FOLDER/far.csv. Known: body, n.",
    ),
    "number.jsonl": (
        '{"body": "x", "n": 1}\n',
        {"text": "n"},
        "FOLDER/number.jsonl, line 1: the column n holds 1, not text. Make text of it with a format: `text: '{n}'`.",
    ),
    "mixed.jsonl": (
        '{"text": "a"}\n\n{"text": 3}\n',
        {},
        "FOLDER/mixed.jsonl, line 3: the column text holds 3, not text. Make text of it with a format: "
        "`text: '{text}'`.",
    ),
    "format.csv": (
        "body,n\nx,1\n",
        {"text": "{body"},
        "`text` of FOLDER/format.csv is no format string: '{body' (expected '}' before end of string).",
    ),
    "split.txt": (
        "a\nb\nc\n",
        {"heldout_split": "test"},
        "FOLDER/split.txt cannot be read (split test): Unknown split \"test\". Should be one of ['train'].",
    ),
    "book.epub": (
        "a",
        {},
        "FOLDER/book.epub is of no kind that can be read. Give one of .json, .jsonl, .parquet, .csv, .tsv, .txt, "
        ".arrow.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file(name: str, tmp_path: Path) -> None:
    contents, fields, message = WRONG[name]
    (tmp_path / name).write_text(contents)
    assert refused(DataError, lambda: load(tmp_path / name, **fields), tmp_path) == message


def test_missing_file(tmp_path: Path) -> None:
    message = f"There is no file FOLDER/x.jsonl. Give a path from {Path.cwd()}, or an absolute one."
    assert refused(DataError, lambda: load(tmp_path / "x.jsonl"), tmp_path) == message


def test_missing_folder(tmp_path: Path) -> None:
    message = refused(DataError, lambda: load(tmp_path / "nowhere"), tmp_path)
    assert message.startswith("There is no dataset FOLDER/nowhere, here or on the Hub: ")


@pytest.mark.parametrize("name", ["text", "json", "imagefolder", "webdataset"])
def test_a_missing_folder_named_as_a_reader(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would read what it finds in the current folder."""
    for file in ("notes.txt", "other.jsonl", "x.tar"):
        (tmp_path / file).write_text('{"text": "found by chance"}\n' * 4)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no folder {name} in "):
        load(Path(name))
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.jsonl").write_text('{"text": "asked for"}\n' * 4)
    assert set(texts(load(Path(name), heldout=0).train)) == {"asked for"}


def test_unknown_split_of_a_folder(tmp_path: Path) -> None:
    _jsonl(tmp_path / "train.jsonl")
    _jsonl(tmp_path / "test.jsonl")
    assert refused(DataError, lambda: load(tmp_path, heldout_split="tset"), tmp_path) == (
        "FOLDER cannot be read (split tset): Unknown split \"tset\". Should be one of ['train', 'test']."
    )


def test_saved_dataset_has_no_splits(tmp_path: Path) -> None:
    _saved(tmp_path / "saved")
    assert refused(DataError, lambda: load(tmp_path / "saved", heldout_split="test"), tmp_path) == (
        "FOLDER/saved holds one dataset without splits, and so no 'test'. Remove `split` and `heldout_split`, or save "
        "a DatasetDict there."
    )


@pytest.mark.parametrize("name", ["owner/law", "law"])
def test_hub_without_network(name: str, tmp_path: Path) -> None:
    """conftest.py has set HF_HUB_OFFLINE; without a network it is the same ConnectionError."""
    assert refused(ResourceError, lambda: load(name), tmp_path) == (
        f"Cannot fetch the dataset {name}: no file of that name is here, and the Hub cannot be reached. "
        "Check the network and HF_HUB_OFFLINE, or name a local file."
    )


def test_unknown_quickstart_text(tmp_path: Path) -> None:
    message = refused(DataError, lambda: load("quickstart:bibel"), tmp_path)
    assert message.startswith("Unknown quickstart text 'bibel'.")


# Tasks made from datasets


def choices(path: Path, rows: list[Row], **columns: str) -> list[Row]:
    task = {"name": "mc", "kind": "multiple_choice", "dataset": str(write_jsonl(path, rows)), **columns}
    return task_rows(Task.model_validate(task))


def test_choice_rows(tmp_path: Path) -> None:
    rows = [{"ask": f"q{i}", "options": ["a", "b", "c"][: 2 + i % 2], "right": i % 2, "n": i} for i in range(40)]
    found = choices(tmp_path / "x.jsonl", rows, question="ask", choices="options", answer="right")
    assert found == [{"query": r["ask"], "choices": r["options"], "gold": r["right"]} for r in rows]


def test_perplexity_rows(tmp_path: Path) -> None:
    """As many documents as `heldout` says, cut to its characters, always the same ones."""
    _jsonl(tmp_path / "x.jsonl")
    dataset = Dataset(path=str(tmp_path / "x.jsonl"), heldout=5, heldout_chars=8)
    found = task_rows(Task(name="ppl", kind="perplexity", dataset=dataset))
    assert found == [{"text": "document"}] * 5
    whole = Task(name="ppl", kind="perplexity", dataset=dataset.model_copy(update={"heldout_chars": 100}))
    assert task_rows(whole) == task_rows(whole)
    assert {row["text"] for row in task_rows(whole)} < TEXTS


@pytest.mark.parametrize(("gold", "shown"), [(2, "2"), (-1, "-1"), (None, "None"), (0.5, "0.5"), ("c", "'c'")])
def test_answer_that_is_no_index(gold: Any, shown: str, tmp_path: Path) -> None:
    rows = [{"query": "q", "choices": ["a", "b"], "gold": gold}]
    assert refused(DataError, lambda: choices(tmp_path / "x.jsonl", rows), tmp_path) == (
        f"FOLDER/x.jsonl, line 1: gold must be the right choice or its index; got {shown} for 2 choices."
    )


def test_choices_that_are_no_list(tmp_path: Path) -> None:
    rows = [{"query": "q", "choices": "a b", "gold": 0}]
    assert refused(DataError, lambda: choices(tmp_path / "x.jsonl", rows), tmp_path) == (
        "FOLDER/x.jsonl, line 1: choices must be a list of continuations; got 'a b'."
    )


def test_task_without_its_column(tmp_path: Path) -> None:
    rows = [{"query": "q", "choices": ["a", "b"], "label": 0}]
    assert refused(DataError, lambda: choices(tmp_path / "x.jsonl", rows, answer="labl"), tmp_path) == (
        "Unknown column 'labl' in FOLDER/x.jsonl. Did you mean 'label'? Known: choices, label, query."
    )


def test_perplexity_of_conversations(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TURNS}])
    task = Task(name="ppl", kind="perplexity", dataset=Dataset(path=str(path)))
    assert refused(DataError, lambda: task_rows(task), tmp_path) == (
        "FOLDER/x.jsonl: a perplexity task needs text; name its column with `text`."
    )
