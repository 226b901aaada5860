"""Replay that a stage's start model writes: which documents, from which forms, killed and on several ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.models import write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import DataError, ModelError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.report.card import model_card
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.testing.toys import toy_tokenizer
from hf_contmerge.train_strategies import get_strategy
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.synthesis import PART, _distinct, _Writer, with_synthesis, write_parts

Row = dict[str, Any]
LIGHT = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 48, "save_strategy": "no", "logging_steps": 1}
TURNS = {"question": [{"role": "user", "content": "what lays eggs"}],
         "answer": [{"role": "assistant", "content": "the hen"}]}  # fmt: skip
ROWS: dict[str, Row] = {
    "text": {"text": "the court may refuse a claim"},
    "prompt_completion": {"prompt": "two and two: ", "completion": "four"},
    "messages": {"messages": [*TURNS["question"], *TURNS["answer"]]},
    "turns": {"prompt": TURNS["question"], "completion": TURNS["answer"]},
}


def data_of(home: Path, kind: str, count: int = 12, **fields: Any) -> StageData:
    path = write_jsonl(home / f"synthesis-{kind}.jsonl", [ROWS[kind]] * count)
    return load_stage_data(Dataset(path=str(path), **{"heldout": 0, **fields}), seed=0)


def job_of(base: Path, data: StageData, *, count: int = 20, **fields: Any) -> TrainJob:
    replay = {"synthesise": count, "synthesise_tokens": 12, "share": 0.5, **fields}
    train = Train.model_validate({**LIGHT, "strategy": "replay", "parameters": replay})
    return TrainJob(start=base, base=base, data=data, train=train, seed=3)


def documents(folder: Path) -> str:
    return (folder / "documents.jsonl").read_text()


# Documents


@pytest.mark.parametrize("kind", list(ROWS))
def test_documents_in_the_form_of_the_stage(kind: str, base_folder: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path, kind)
    job = with_synthesis(job_of(base_folder, data), tmp_path / "synthesised", OneRank())
    assert job.written
    assert job.written.form == data.form
    assert job.written.train.features == data.train.features
    assert 0 < len(job.written.train) <= 20 == len(documents(tmp_path / "synthesised").splitlines())
    assert len(job.written.train) + sum(job.written.sources[0].left_out.values()) == 20
    tokenizer = toy_tokenizer()
    for row in map(json.loads, documents(tmp_path / "synthesised").splitlines()):
        turns = [text for value in row.values() for text in ([value] if isinstance(value, str) else
                 [turn["content"] for turn in value])]  # fmt: skip
        assert all(len(tokenizer(text)["input_ids"]) <= 3 * 12 for text in turns)  # pyright: ignore
        assert not any(word in text for text in turns for word in tokenizer.all_special_tokens)


def test_the_documents_are_the_models(base_folder: Path, tmp_path: Path) -> None:
    """Their mean likelihood is that of sampling: minus the entropy, token by token."""
    wanted = get_strategy("replay", synthesise=8, synthesise_tokens=48).synthesis()
    assert wanted
    writer = _Writer.open(job_of(base_folder, data_of(tmp_path, "text")), wanted)
    drawn: list[float] = []
    plain = writer.model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        logs = writer.model(found).logits.log_softmax(-1)[:, :-1]
        chosen, entropy = logs.gather(-1, found[:, 1:, None]).squeeze(-1), -(logs.exp() * logs).sum(-1)
        real = (found[:, :-1] != toy_tokenizer().eos_token_id).cummin(-1).values
        drawn.extend((chosen + entropy)[real].tolist())
        return found

    writer.model.generate = watched
    for seed in range(4):
        writer.write(PART, seed)
    mean, spread = sum(drawn) / len(drawn), torch.tensor(drawn).std() / len(drawn) ** 0.5
    assert abs(mean) < 4 * spread


def test_the_seed_decides(base_folder: Path, tmp_path: Path) -> None:
    """The caller's random numbers go on as if nothing had been drawn."""
    data = data_of(tmp_path, "text")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with_synthesis(job_of(base_folder, data), tmp_path / "one", OneRank())
    assert torch.equal(torch.rand(1), expected)
    with_synthesis(job_of(base_folder, data), tmp_path / "two", OneRank())
    other = job_of(base_folder, data)
    with_synthesis(TrainJob(**{**vars(other), "seed": 4}), tmp_path / "three", OneRank())
    assert documents(tmp_path / "one") == documents(tmp_path / "two") != documents(tmp_path / "three")


def test_parts_of_any_rank_in_any_order(base_folder: Path, tmp_path: Path) -> None:
    """As several ranks write them, and after kills in between; a half-written file is none."""
    job, whole, parts = job_of(base_folder, data_of(tmp_path, "text")), tmp_path / "whole", tmp_path / "parts-of"
    with_synthesis(job, whole, OneRank())
    (parts / "parts").mkdir(parents=True)
    (parts / "settings.json").write_text((whole / "settings.json").read_text())
    write_parts(job, parts, [(2, 4), (0, PART)])
    (parts / "parts" / ".000001.jsonl.part").write_text('{"text": "half')
    with_synthesis(job, parts, OneRank())
    assert documents(parts) == documents(whole)
    assert sorted(path.name for path in parts.iterdir()) == ["documents.jsonl", "settings.json"]


def test_documents_of_other_settings_are_not_taken(base_folder: Path, tmp_path: Path) -> None:
    data, folder = data_of(tmp_path, "text"), tmp_path / "synthesised"
    with_synthesis(job_of(base_folder, data), folder, OneRank())
    first = documents(folder)
    with_synthesis(job_of(base_folder, data, temperature=0.5), folder, OneRank())
    assert documents(folder) != first


# What is dropped


def test_blank_and_repeated_documents(tmp_path: Path) -> None:
    rows = [{"text": t} for t in ("a", " \n", "b", "a", "")]
    assert _distinct(rows) == ([{"text": "a"}, {"text": "b"}], {"are empty": 2, "repeat another": 1})
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}
    assert _distinct([talk])[1] == {"are empty": 1}


def test_held_out_documents_of_any_stage_are_dropped(base_folder: Path, tmp_path: Path) -> None:
    job, folder = job_of(base_folder, data_of(tmp_path, "text")), tmp_path / "synthesised"
    written = with_synthesis(job, folder, OneRank()).written
    assert written
    held = [written.train[i]["text"] for i in (0, 3)]
    path = write_jsonl(tmp_path / "synthesis-heldout.jsonl", [{"text": t} for t in (*held, "x", "y")])
    other = StageData("text", job.data.train, load_stage_data(Dataset(path=str(path), heldout=0), seed=0).train)
    again = with_synthesis(TrainJob(**{**vars(job), "others": (other,)}), folder, OneRank()).written
    assert again
    assert len(again.train) == len(written.train) - 2
    assert again.sources[0].left_out["are copies of held-out ones"] == 2
    assert not {*held} & {*again.train["text"]}


def test_nothing_left(base_folder: Path, tmp_path: Path) -> None:
    job, folder = job_of(base_folder, data_of(tmp_path, "text"), count=2), tmp_path / "synthesised"
    with_synthesis(job, folder, OneRank())
    (folder / "documents.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(DataError, match=r"None of the 2 documents .* \(2 are empty\)\. Raise `synthesise`, or leave"):
        with_synthesis(job, folder, OneRank())


# Runs


def recipe(home: Path, base: Path, replay: Row, kind: str = "text", **train: Any) -> Row:
    path = write_jsonl(home / f"synthesis-run-{kind}.jsonl", [{**ROWS[kind]} for _ in range(12)])
    return {
        "name": "written", "base_model": str(base), "merge": [{"rule": "average", "start_from": "previous"}],
        "stages": [{"name": n, "dataset": {"path": str(path), "heldout": 0},
                    "tasks": []} for n in ("a", "b")],
        "train": {**LIGHT, **train, "strategy": ["full", "replay"], "parameters": {"replay": replay}},
        "evaluate": {"cache": False},
    }  # fmt: skip


REPLAY = {"synthesise": 10, "synthesise_tokens": 12, "share": 0.5}


def test_a_run_whose_models_write_their_replay(
    base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both stages, from the start; nothing is remembered, and the record vouches for the documents."""
    with caplog.at_level("INFO"):
        run = run_recipe(parse_recipe(recipe(tmp_path, base_folder, REPLAY)), tmp_path / "run")
    first, second = (run.expert(t, "previous") for t in (1, 2))
    for place in (first, second):
        record = place.record("train")
        found = record["synthesised"]
        assert found["written"] == 10 == len(documents(place.synthesised).splitlines())
        assert found["used"] == 10 - sum(found["left_out"].values())
        assert len(found["examples"]) == 3
        counts = {m["source"]: m["examples"] for m in record["mixed"]}
        assert counts == {"synthesised": 12, "synthesis-run-text.jsonl": 12}
        assert record["mixed"][0]["loss"]
        assert not place.memory.exists()
        assert "synthesised/documents.jsonl" in record["files"]
    assert documents(first.synthesised) != documents(second.synthesised)
    assert caplog.text.count("the start model writes 10 documents") == 2
    assert caplog.text.count("replay wrote: ") == 6
    report = (run.folder / "report" / "report.md").read_text()
    assert "Written by a stage's start model" in report
    assert " ".join(first.record("train")["synthesised"]["examples"][0].split())[:20] in report
    assert "`synthesised` (documents that the stage's start model wrote)" in model_card(run, run.recipe.merge[0])
    (first.synthesised / "documents.jsonl").write_text("{}")
    assert first.damaged("train") == [first.synthesised / "documents.jsonl"]


@pytest.mark.parametrize(
    ("replay", "kind", "train", "words"),
    [
        ({**REPLAY, "examples": 5}, "text", {}, "keeps no memory and draws `share`; remove `examples`"),
        ({"synthesise": 5, "share": 0.0}, "text", {}, "remove `share: 0`"),
        ({"synthesise": 0}, "text", {}, "replay's synthesise must be greater than or equal to 1"),
        ({"synthesise": True}, "text", {}, "replay's synthesise must be a valid integer; got True"),
        (REPLAY, "pairs", {}, "replay's `synthesise` writes texts and conversations, and the stage has preference"),
        (REPLAY, "labelled", {"learn": "kto"}, "and the stage has unpaired"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_before_any_work(
    replay: Row, kind: str, train: Row, words: str, base_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = {"pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
            "labelled": {"prompt": "a", "completion": "b", "label": True}}  # fmt: skip
    ROWS.update(rows)
    data = recipe(tmp_path, base_folder, replay, kind, **train)
    (tmp_path / "recipe.yml").write_text(json.dumps(data))
    assert main(["run", str(tmp_path / "recipe.yml"), "--run", str(tmp_path / "run")]) == 2
    told = capfd.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert not list((tmp_path / "run").glob("stages/*/experts"))


def test_a_template_that_changes_the_words(base_folder: Path, tmp_path: Path) -> None:
    from hf_contmerge.training.synthesis import _frame

    tokenizer = toy_tokenizer().__class__.from_pretrained(base_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | lower }}{% endfor %}"
    with pytest.raises(ModelError, match="does not show a user's words unchanged"):
        _frame(tokenizer)


def test_a_plan_counts_the_writing(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for count in (10, 1000):
        data = recipe(tmp_path, base_folder, {**REPLAY, "synthesise": count})
        (tmp_path / "recipe.yml").write_text(json.dumps(data))
        assert main(["plan", str(tmp_path / "recipe.yml"), "--json"]) == 0
        phases = json.loads(capsys.readouterr().out)["phases"]
        found.append(next(p for p in phases if p["phase"] == "train"))
    assert found[1]["seconds"] > 2 * found[0]["seconds"]
    assert found[1]["disk_kept_bytes"] - found[0]["disk_kept_bytes"] == 990 * 12 * 5


SCRIPT = """
import os, signal, sys
from hf_contmerge.training import synthesis
plain = synthesis.write_atomically
def write(path, text, kill=int(sys.argv[1])):
    plain(path, text)
    if path.name == f"{kill:06d}.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
synthesis.write_atomically = write
from hf_contmerge.commands.main import main
main(["run", sys.argv[2], "--run", sys.argv[3], "--until", "train"])
"""


@pytest.mark.slow
def test_killed_while_writing_and_continued(base_folder: Path, tmp_path: Path) -> None:
    """The expert and the documents have the bytes of a run that was not killed."""
    data = recipe(tmp_path, base_folder, {**REPLAY, "synthesise": 30})
    (tmp_path / "recipe.yml").write_text(json.dumps(data))
    for name, kill in (("whole", -1), ("killed", 1)):
        order = [sys.executable, "-c", SCRIPT, str(kill), str(tmp_path / "recipe.yml"), str(tmp_path / name)]
        code = subprocess.run(order, check=False, env=os.environ, capture_output=True).returncode
        assert code == (-signal.SIGKILL if kill >= 0 else 0)
    killed = next((tmp_path / "killed").glob("stages/01*/experts/*/synthesised"))
    assert sorted(path.name for path in (killed / "parts").iterdir()) == ["000000.jsonl", "000001.jsonl"]
    assert main(["run", str(tmp_path / "recipe.yml"), "--run", str(tmp_path / "killed"), "--until", "train"]) == 0
    one, other = (sorted((tmp_path / name).glob("stages/*/experts/*/*/*")) for name in ("whole", "killed"))
    assert [path.name for path in one] == [path.name for path in other]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))
