"""Stages whose examples come from several datasets: how many of each, in which order, and what cannot be mixed."""

import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from toys.models import write_jsonl

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.shares import split_by_shares
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob

Row = dict[str, Any]
COUNTS = {"law": 40, "code": 100, "chat": 25}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name, count in COUNTS.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i:03d}", "n": i} for i in range(count)])
    return tmp_path


Load = Callable[..., StageData]


@pytest.fixture
def load(home: Path) -> Load:
    """Return a function that loads a mix of datasets by their shares, or by all of their fields."""

    def load(*, seed: int = 0, heldout: int = 8, max_examples: int | None = None, **parts: float | Row) -> StageData:
        mix = [
            {"path": str(home / f"{name}.jsonl"), **(part if isinstance(part, dict) else {"share": part})}
            for name, part in parts.items()
        ]
        spec = {"mix": mix, "heldout": heldout, "max_examples": max_examples}
        return load_stage_data(Dataset.model_validate(spec), seed=seed)

    return load


def counts(rows: datasets.Dataset) -> Counter[str]:
    return Counter(text.split()[0] for text in rows["text"])


def assert_sources_are_noted(data: StageData) -> None:
    for rows, places in ((data.train, data.train_sources), (data.heldout, data.heldout_sources)):
        named = [Path(data.sources[place].path).stem for place in places]
        assert named == [text.split()[0] for text in rows["text"]]
    assert [s.train for s in data.sources] == [data.train_sources.count(i) for i in range(len(data.sources))]
    assert [s.heldout for s in data.sources] == [data.heldout_sources.count(i) for i in range(len(data.sources))]


# How many of each


def test_a_mix_is_as_large_as_the_dataset_that_is_used_up_first(load: Load) -> None:
    """Of 40 law examples 6 are held out, and 34 are 0.75 of 45."""
    data = load(law=0.75, code=0.25)
    assert data.form == "text"
    assert data.train.column_names == ["text"]
    assert counts(data.heldout) == {"law": 6, "code": 2}
    assert counts(data.train) == {"law": 34, "code": 11}
    assert len({*data.train["text"], *data.heldout["text"]}) == 53
    assert_sources_are_noted(data)
    assert data.sources[0].left_out == {}
    assert data.sources[1].left_out == {"are more than the mix takes": 87}


@pytest.mark.parametrize(("most", "wanted"), [(20, (15, 5)), (21, (16, 5)), (1000, (34, 11))])
def test_size_of_its_own(most: int, wanted: tuple[int, int], load: Load) -> None:
    found = counts(load(law=0.75, code=0.25, max_examples=most).train)
    assert (found["law"], found["code"]) == wanted


def test_a_part_of_its_own_size(load: Load) -> None:
    """What a part may give at most decides as the rows of a smaller dataset would."""
    data = load(law={"share": 0.5, "max_examples": 10}, code=0.5)
    assert counts(data.train) == {"law": 10, "code": 10}
    assert data.sources[0].left_out == {"are more than `max_examples`": 26}


def test_every_row_is_accounted_for(home: Path, load: Load) -> None:
    rows = [{"text": text} for text in ("", "law 1", "law 02", *(f"law {i:03d}" for i in range(40)))]
    write_jsonl(home / "law.jsonl", rows + rows[3:])  # each example twice
    data = load(law={"share": 0.5, "min_chars": 7}, code=0.3, chat=0.2, max_examples=30)
    for source, read in zip(data.sources, (83, COUNTS["code"], COUNTS["chat"]), strict=True):
        assert source.train + source.heldout + sum(source.left_out.values()) == read
    assert data.sources[0].left_out == {
        "lack text": 1,
        "have not at least 7 characters": 2,
        "are copies of held-out ones": 4,
        "are more than the mix takes": 57,
    }


def test_whole_numbers_by_shares() -> None:
    assert split_by_shares(10, [0.7, 0.2, 0.1]) == [7, 2, 1]
    assert split_by_shares(10, [1 / 3] * 3) == [4, 3, 3]
    assert split_by_shares(2, [0.3, 0.3, 0.4]) == [1, 0, 1]
    draw = random.Random(0)
    for _ in range(300):
        weights = [draw.random() for _ in range(draw.randint(1, 6))]
        shares, count = [w / sum(weights) for w in weights], draw.randint(0, 500)
        parts = split_by_shares(count, shares)
        assert sum(parts) == count
        assert all(abs(part - count * share) < 1 for part, share in zip(parts, shares, strict=True))


# Which, and in which order


def test_seed_decides(load: Load) -> None:
    first, again, other = (load(law=0.75, code=0.25, seed=seed) for seed in (0, 0, 1))
    for part in ("train", "heldout"):
        assert getattr(first, part)["text"][:] == getattr(again, part)["text"][:] != getattr(other, part)["text"][:]
    assert first.train_sources == again.train_sources
    assert 0 < sum(first.train_sources[:20]) < 20  # one among the other, not one after the other


def test_a_dataset_alone_is_what_it_was(home: Path, load: Load) -> None:
    alone = load_stage_data(Dataset(path=str(home / "law.jsonl"), heldout=8), seed=0)
    mixed = load(law=1.0)
    assert mixed.train["text"][:] == alone.train["text"][:]
    assert mixed.heldout["text"][:] == alone.heldout["text"][:]
    assert (alone.train_sources, alone.heldout_sources) == ((0,) * 32, (0,) * 8)
    assert [(s.path, s.split, s.share, s.train, s.heldout, s.left_out) for s in alone.sources] == [
        (str(home / "law.jsonl"), "train", 1.0, 32, 8, {})
    ]


def test_what_one_part_holds_out_no_other_trains_on(home: Path, load: Load) -> None:
    write_jsonl(home / "copy.jsonl", [{"text": f"law {i:03d}"} for i in range(50)])  # another length, another order
    for seed in range(5):
        data = load(law=0.5, copy=0.5, seed=seed)
        assert not {*data.heldout["text"]} & {*data.train["text"]}
        copies = [s.left_out.get("are copies of held-out ones", 0) for s in data.sources]
        assert 1 <= sum(copies) <= 8  # fewer where both hold one out


def test_held_out_examples_of_a_split(home: Path) -> None:
    """Each part gives its share: from its own split where it has one."""
    for split, count in (("train", 20), ("test", 9)):
        (home / "folder").mkdir(exist_ok=True)
        write_jsonl(home / "folder" / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(count)])
    folder = {"path": str(home / "folder"), "share": 0.5, "heldout_split": "test"}
    mix = [folder, {"path": str(home / "law.jsonl"), "share": 0.5}]
    data = load_stage_data(Dataset.model_validate({"mix": mix, "heldout": 6}), seed=0)
    assert counts(data.heldout) == {"test": 3, "law": 3}
    assert counts(data.train) == {"train": 20, "law": 20}
    whole = load_stage_data(Dataset.model_validate({"mix": mix, "heldout": 0}), seed=0)
    assert counts(whole.heldout) == {"test": 9}
    small = [{**folder, "share": 0.05}, {**mix[1], "share": 0.95}]
    assert counts(load_stage_data(Dataset.model_validate({"mix": small, "heldout": 3}), seed=0).heldout) == {"law": 3}


def test_each_part_has_its_own_columns(home: Path) -> None:
    write_jsonl(home / "qa.jsonl", [{"q": f"qa {i}", "a": i} for i in range(10)])
    mix = [
        {"path": str(home / "law.jsonl"), "share": 0.5},
        {"path": str(home / "qa.jsonl"), "share": 0.5, "text": "{q}={a}"},
    ]
    data = load_stage_data(Dataset.model_validate({"mix": mix, "heldout": 0}), seed=0)
    assert data.train.column_names == ["text"]
    assert {text for text in data.train["text"] if text.startswith("qa")} == {f"qa {i}={i}" for i in range(10)}


def test_streams_in_a_mix(load: Load) -> None:
    data = load(law={"share": 0.5, "streaming": True, "max_examples": 10}, code=0.5)
    assert counts(data.train) == {"law": 10, "code": 10}
    assert_sources_are_noted(data)


def test_columns_that_differ_in_their_storage(home: Path) -> None:
    large = datasets.Features({"text": datasets.Value("large_string")})
    datasets.Dataset.from_dict({"text": [f"big {i}" for i in range(9)]}, features=large).save_to_disk(home / "big")
    before = sorted((home / "big").rglob("*"))
    mix = [{"path": str(home / name), "share": 0.5} for name in ("law.jsonl", "big")]
    data = load_stage_data(Dataset.model_validate({"mix": mix, "heldout": 2}), seed=0)
    assert counts(data.train) == {"law": 8, "big": 8}
    assert sorted((home / "big").rglob("*")) == before


# What cannot be mixed


def test_forms_must_agree(home: Path, load: Load) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    write_jsonl(home / "talk.jsonl", [{"messages": turns} for _ in range(9)])
    with pytest.raises(DataError) as caught:
        load(law=0.5, talk=0.5, heldout=0)
    assert str(caught.value).replace(str(home), "HOME") == (
        "The datasets of a mix must have one form: HOME/law.jsonl has text and HOME/talk.jsonl has messages. Name a "
        "column or a format with `text`, or leave one out."
    )


def test_types_must_agree(home: Path, load: Load) -> None:
    write_jsonl(home / "one.jsonl", [{"prompt": "a", "completion": "b"} for _ in range(9)])
    talk = [{"role": "user", "content": "hi"}]
    write_jsonl(home / "two.jsonl", [{"prompt": talk, "completion": talk} for _ in range(9)])
    with pytest.raises(DataError) as caught:
        load(one=0.5, two=0.5, heldout=0)
    told = str(caught.value).replace(str(home), "HOME")
    assert told.startswith(
        "The datasets of a mix must have columns of one type: HOME/two.jsonl cannot be read like HOME/"
    )
    assert told.endswith("Convert one of them, or leave it out.")


def test_a_share_that_comes_to_nothing(home: Path, load: Load) -> None:
    with pytest.raises(DataError) as caught:
        load(law=0.999, code=0.001)
    assert str(caught.value).replace(str(home), "HOME") == (
        "A mix of 32 examples has none of HOME/code.jsonl, whose share is 0.001. Raise `max_examples` or the share, or "
        "give more examples."
    )


def test_a_part_too_small_to_hold_anything_out(home: Path, load: Load) -> None:
    with pytest.raises(
        DataError, match=r"chat.jsonl has 25 examples, but 30 are to be held out and none would be left"
    ):
        load(chat=0.5, code=0.5, heldout=60)


# Training


def test_training_sees_no_source_and_the_record_has_the_counts(
    base_folder: Path, home: Path, load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_contmerge"):
        data = load(law={"share": 0.75, "min_chars": 3}, code=0.25)
    assert not caplog.messages
    (tmp_path / "expert").mkdir()
    settings = {"max_steps": 2, "max_length": 32, "learning_rate": 1e-3, "save_strategy": "no"}
    record = train_expert(
        TrainJob(start=base_folder, base=base_folder, data=data, train=Train(**settings), seed=0),
        tmp_path / "expert",
        checkpoints=tmp_path / "checkpoints",
    )
    assert record["examples"] == 45
    assert json.loads(json.dumps(record["sources"])) == [
        {"name": f"{name}.jsonl", "path": str(home / f"{name}.jsonl"), "config": None, "split": "train", "share": share,
         "train": train, "heldout": heldout, "left_out": left_out, "license": None}
        for name, share, train, heldout, left_out in [
            ("law", 0.75, 34, 6, {}), ("code", 0.25, 11, 2, {"are more than the mix takes": 87})]
    ]  # fmt: skip
    assert [(part["source"], part["examples"]) for part in record["mixed"]] == [("code.jsonl", 11), ("law.jsonl", 34)]
