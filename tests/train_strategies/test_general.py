"""General data among a stage's examples: how many, in which order, from where, at which loss, and what is refused."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset as Rows
from safetensors.torch import load_file
from toys.models import write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import DataError, RecipeError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.shares import in_blocks
from hf_contmerge.train_strategies import SOURCE, StageTools, get_strategy
from hf_contmerge.train_strategies.replay import from_source
from hf_contmerge.training.data import StageData, load_stage_data, name_sources
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.general import with_general
from hf_contmerge.training.job import TrainJob

Row = dict[str, Any]
LIGHT = {"max_steps": 3, "per_device_train_batch_size": 4, "max_length": 16, "save_strategy": "no", "logging_steps": 1}


def texts(name: str, count: int, words: int = 1) -> Rows:
    rows = [{"text": " ".join([f"{name}{i:03d}"] * (1 + i % words))} for i in range(count)]
    return from_source(Rows.from_list(rows), [name] * count)


def remembered(home: Path, count: int) -> Path:
    memory = home / "memory"
    memory.mkdir()
    get_strategy("replay").remember(None, texts("old", count).remove_columns(SOURCE), None, memory)  # pyright: ignore
    return memory


def mixed(fresh: Rows, memory: Path | None, general: Rows, *, batch: int = 0, **parameters: Any) -> list[str]:
    """Return the sources of the examples in their order."""
    strategy = get_strategy("replay", general="unused.jsonl", **parameters)
    words = lambda rows: [len(row["text"].split()) for row in rows]  # noqa: E731
    strategy.tools = StageTools(general=general, batch=batch, count_tokens=words)
    rows = strategy.mix(fresh, memory, seed=3)
    named = [text[:3] for text in rows["text"]]
    assert [{"replay": "old"}.get(s, s) for s in rows[SOURCE]] == named
    return named


# How many


@pytest.mark.parametrize("within_batch", [False, True])
def test_shares_to_one_example(within_batch: bool, tmp_path: Path) -> None:
    memory, draw = remembered(tmp_path, 60), random.Random(0)
    for _ in range(25):
        share, general = draw.uniform(0, 0.6), draw.uniform(0, 0.39)
        past = memory if draw.random() < 0.7 else None
        fresh, batch = texts("new", draw.randint(5, 80)), draw.randint(2, 16)
        fields = {"share": share, "general_share": general, "within_batch": within_batch}
        found = mixed(fresh, past, texts("gen", 40), batch=batch, **fields)
        counts = Counter(found)
        assert counts["new"] == len(fresh)
        assert abs(counts["gen"] - len(found) * general) < 1
        assert abs(counts["old"] - len(found) * (share if past else 0)) < 1
        if within_batch:
            blocks = [found[i : i + batch] for i in range(0, len(found) - batch + 1, batch)]
            assert all(abs(b.count(s) - batch * counts[s] / len(found)) < 1 for b in blocks for s in counts)


def test_blocks_hold_any_parts_to_one_place() -> None:
    draw = random.Random(1)
    for _ in range(300):
        counts, block = [draw.randint(0, 50) for _ in range(draw.randint(1, 5))], draw.randint(1, 20)
        order = list(in_blocks(counts, block))
        assert [order.count(i) for i in range(len(counts))] == counts
        for start in range(0, len(order) - block + 1, block):
            part = order[start : start + block]
            assert all(abs(part.count(i) - block * n / len(order)) < 1 for i, n in enumerate(counts))


@pytest.mark.parametrize("within_batch", [False, True])
def test_shares_of_tokens(within_batch: bool, tmp_path: Path) -> None:
    """General documents are three times as long here, so that fewer of them make the share."""
    fresh, general = texts("new", 90), texts("gen", 90, words=5)
    found = mixed(fresh, None, general, general_share=0.25, share_of="tokens", within_batch=within_batch)
    assert 8 <= found.count("gen") <= 13
    strategy = get_strategy("replay", general="x", general_share=0.25, share_of="tokens", within_batch=within_batch)
    strategy.tools = StageTools(general=general, count_tokens=lambda rows: [len(r["text"].split()) for r in rows])
    rows = strategy.mix(fresh, None, seed=3)
    tokens = [(len(text.split()), text[:3]) for text in rows["text"]]
    total, of_general = (sum(n for n, name in tokens if name in names) for names in (("new", "gen"), ("gen",)))
    assert abs(of_general - 0.25 * total) <= 5
    if within_batch:  # at every place, to one or two documents
        sums = [
            sum(n for n, name in tokens[:i] if name == "gen") - 0.25 * sum(n for n, _ in tokens[:i]) for i in (40, 70)
        ]
        assert all(abs(gap) <= 5 for gap in sums)


def test_small_general_data_comes_again_and_stages_see_other_parts() -> None:
    assert mixed(texts("new", 10), None, texts("gen", 3), general_share=0.5).count("gen") == 10
    drawn = []
    for stage in (1, 2):
        strategy = get_strategy("replay", general="x", general_share=0.5)
        strategy.tools, strategy.stage = StageTools(general=texts("gen", 100)), stage
        drawn.append({t for t in strategy.mix(texts("new", 10), None, seed=0)["text"] if t.startswith("gen")})
    assert [len(d) for d in drawn] == [10, 10]
    assert len(drawn[0] & drawn[1]) < 8


def test_general_share_of_zero_is_plain_replay(tmp_path: Path) -> None:
    memory, fresh = remembered(tmp_path, 20), texts("new", 30)
    plain = get_strategy("replay", share=0.3).mix(fresh, memory, seed=0)
    with_none = get_strategy("replay", share=0.3, general="x", general_share=0.0).mix(fresh, memory, seed=0)
    assert plain["text"][:] == with_none["text"][:]
    assert get_strategy("replay", general="x", general_share=0.0).mix(fresh, None, seed=0) is fresh


# What is loaded


def stage(home: Path, name: str, rows: Sequence[Row], **fields: Any) -> StageData:
    path = write_jsonl(home / f"{name}.jsonl", rows)
    return load_stage_data(Dataset(path=str(path), **{"heldout": 0, **fields}), seed=0)


def general_train(path: Path | str, **fields: Any) -> Train:
    parameters = {"general": {"path": str(path)}, **fields}
    return Train.model_validate({"strategy": "replay", "parameters": parameters, **LIGHT})


@pytest.mark.parametrize("form", ["text", "prompt_completion", "messages"])
def test_held_out_documents_of_any_stage_are_dropped_and_counted(form: str, tmp_path: Path) -> None:
    def row(name: str, i: int) -> Row:
        if form == "messages":
            turns = [{"role": "user", "content": name}, {"role": "assistant", "content": str(i)}]
            return {"messages": turns}
        return {"text": f"{name} {i}"} if form == "text" else {"prompt": "", "completion": f"{name} {i}"}

    one = stage(tmp_path, "one-general", [row("one", i) for i in range(20)], heldout=6)
    two = stage(tmp_path, "two-general", [row("two", i) for i in range(20)], heldout=4)
    rows = [row(name, i) for name in ("one", "two", "gen") for i in range(20)]
    if form == "prompt_completion":  # general text becomes completions
        rows = [{"text": r["completion"]} for r in rows]
    path = write_jsonl(tmp_path / f"general-{form}.jsonl", rows)
    data = with_general(one, general_train(path), [one, two], seed=0)
    assert data.general
    assert data.general.form == form
    assert len(data.general.train) == 50 == data.general.sources[0].train == len(data.general.train_sources)
    assert data.general.sources[0].left_out == {"are copies of held-out ones": 10}
    kept = [json.dumps(r, sort_keys=True) for r in data.general.train]
    assert not {json.dumps(r, sort_keys=True) for part in (one, two) for r in part.heldout} & {*kept}


def written(form: str, prompt: str, answer: str, spaces: str = " ") -> Row:
    """Return one document in some form."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {
        "text": {"text": f"{prompt}{spaces}{answer}\n"},
        "pair": {"prompt": prompt, "completion": f"{spaces}{answer}"},
        "messages": {"messages": turns},
        "turns": {"prompt": turns[:1], "completion": turns[1:]},
    }[form]


@pytest.mark.parametrize(
    ("own", "other"),
    [("pair", "text"), ("text", "pair"), ("text", "text"), ("messages", "turns"), ("turns", "messages")],
)
def test_a_held_out_document_in_other_columns_is_dropped(own: str, other: str, tmp_path: Path) -> None:
    """`other` is the form of the general data, of another stage's held-out documents, and of the stage's own."""

    def rows(form: str, name: str, spaces: str) -> list[Row]:
        return [written(form, f"{name} {i}", str(i), spaces) for i in range(20)]

    one = stage(tmp_path, "own", rows(own, "own", " "), heldout=6)
    two = stage(tmp_path, "two", rows(other, "two", " "), heldout=4)
    form = own if {own, other} & {"messages"} else other  # others become the stage's form
    path = write_jsonl(
        tmp_path / "mixed-in.jsonl", [r for name in ("own", "two", "gen") for r in rows(form, name, "  ")]
    )
    data = with_general(one, general_train(path), [one, two], seed=0)
    assert data.general
    assert data.general.sources[0].left_out == {"are copies of held-out ones": 10}
    assert len(data.general.train) == 50


def test_sources_have_different_names(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/x", "b/x", "c")]
    for folder in folders:
        folder.mkdir(parents=True)
    rows = [{"text": "x"}]
    parts = [stage(folder, "train", rows) for folder in folders]
    alone, memory = stage(tmp_path, "other", rows), stage(tmp_path, "third", rows)
    memory = replace(memory, sources=(replace(memory.sources[0], path="replay"),))
    found = name_sources(*parts, None, alone, alone, memory, taken="replay")
    two = [["a/x/train.jsonl"], ["b/x/train.jsonl"], ["c/train.jsonl"], []]
    assert found[:4] == two
    assert len({name for names in found for name in names} | {"replay"}) == 7


def test_general_data_that_is_all_held_out(tmp_path: Path) -> None:
    one = stage(tmp_path, "whole", [{"text": f"x {i}"} for i in range(9)], heldout=3)
    path = write_jsonl(tmp_path / "twins.jsonl", [dict(row) for row in one.heldout])  # pyright: ignore
    with pytest.raises(DataError, match=r"twins\.jsonl: all general examples are held-out ones of the stages"):
        with_general(one, general_train(path), [one], seed=0)


def test_general_data_may_be_a_mix(tmp_path: Path) -> None:
    one = stage(tmp_path, "fresh-mix", [{"text": f"x {i}"} for i in range(9)])
    parts = [write_jsonl(tmp_path / f"part-{n}.jsonl", [{"text": f"{n} {i}"} for i in range(30)]) for n in "ab"]
    mix = [{"path": str(part), "share": share} for part, share in zip(parts, (0.25, 0.75), strict=True)]
    train = Train.model_validate({"strategy": "replay", "parameters": {"general": {"mix": mix}}})
    data = with_general(one, train, [], seed=0)
    assert data.general
    names = name_sources(data.general, taken="")[0]
    assert Counter(names[place] for place in data.general.train_sources) == {"part-a.jsonl": 10, "part-b.jsonl": 30}


def test_licences_of_the_sources(tmp_path: Path) -> None:
    (tmp_path / "licensed").mkdir()
    write_jsonl(tmp_path / "licensed" / "train.jsonl", [{"text": "a b"}] * 4)
    (tmp_path / "licensed" / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\n# Data\n")
    for fields, expected in [({}, "mit, cc-by-4.0"), ({"license": "apache-2.0"}, "apache-2.0")]:
        spec = Dataset(path=str(tmp_path / "licensed"), heldout=0, **fields)
        assert load_stage_data(spec, seed=0).sources[0].license == expected
    for text in ("# no front matter", "---\nlanguage: en\n---\n", ""):
        (tmp_path / "licensed" / "README.md").write_text(text)
        assert load_stage_data(Dataset(path=str(tmp_path / "licensed"), heldout=0), seed=0).sources[0].license is None


# Training


def trained(data: StageData, base: Path, out: Path, train: Train, **fields: Any) -> Row:
    out.mkdir()
    job = TrainJob(start=base, base=base, data=data, train=train, seed=0, **fields)
    return train_expert(job, out / "expert", checkpoints=out / "checkpoints")


def lines(name: str, count: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    words = {"law": "court claim party notice", "general": "the quick brown fox jumps over dogs"}[name].split()
    return [{"text": " ".join(draw.choices(words, k=12))} for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"packing": False},
        pytest.param({"packing": True, "packing_strategy": "bfd"}, marks=pytest.mark.slow),
        {"packing": False, "gradient_accumulation_steps": 2, "strategy": ["full", "replay", "distill"]},
    ],
    ids=["wrapped", "rows", "bfd", "rows with a strategy's loss"],
)
def test_loss_of_each_source(fields: Row, base_folder: Path, tmp_path: Path) -> None:
    """The whole loss lies between those of the sources, and counting them changes nothing in training."""
    one = stage(tmp_path, "law-loss", lines("law", 40))
    path = write_jsonl(tmp_path / "general-loss.jsonl", lines("general", 40, 1))
    replay = {"general": str(path), "general_share": 0.5}
    several = "strategy" in fields
    train = Train.model_validate(
        {"strategy": "replay", "parameters": {"replay": replay} if several else replay, **LIGHT, **fields}
    )
    data = with_general(one, train, [], seed=0)
    record = trained(data, base_folder, tmp_path / "run", train)
    names = {"law-loss.jsonl", "general-loss.jsonl"}
    assert {m["source"] for m in record["mixed"]} == names
    assert [m["examples"] for m in record["mixed"]] == [40, 40]
    points = [point for point in record["log"] if "loss" in point]
    assert len(points) == 3
    for point in points:
        losses = [point[f"loss_{name}"] for name in names]
        assert len({*losses}) == 2
        if not several:
            assert min(losses) - 1e-4 <= point["loss"] <= max(losses) + 1e-4
    assert record["mixed"][0]["loss"] == points[-1]["loss_general-loss.jsonl"]
    if several:
        return
    rows = [{"text": text} for text in mixed_texts(train, data)]
    plain = stage_of(rows, tmp_path)
    alone = trained(
        plain, base_folder, tmp_path / "plain", Train.model_validate({"strategy": "full", **LIGHT, **fields})
    )
    assert [p["loss"] for p in alone["log"] if "loss" in p] == [p["loss"] for p in points]
    assert "mixed" not in alone
    one_file, other = (load_file(tmp_path / d / "expert" / "model.safetensors") for d in ("run", "plain"))
    assert all((one_file[name] == other[name]).all() for name in one_file)


def test_the_record_of_general_data(base_folder: Path, tmp_path: Path) -> None:
    """Files of one name in two folders are two sources; held-out copies are counted, and the record is JSON."""
    for name in ("own", "gen"):
        (tmp_path / name).mkdir()
    one = stage(tmp_path / "own", "train", lines("law", 20), heldout=4)
    twins = [dict(row) for row in one.heldout]  # pyright: ignore
    path = write_jsonl(tmp_path / "gen" / "train.jsonl", [*lines("general", 20, 1), *twins])
    train = general_train(path, general_share=0.5)
    record = trained(with_general(one, train, [one], seed=0), base_folder, tmp_path / "run", train)
    assert json.loads(json.dumps(record)) == record
    assert record["general_sources"][0]["left_out"] == {"are copies of held-out ones": 4}
    names = ["gen/train.jsonl", "own/train.jsonl"]
    assert [m["source"] for m in record["mixed"]] == names
    assert [s["name"] for s in (*record["general_sources"], *record["sources"])] == names
    assert {f"loss_{name}" for name in names} <= record["log"][0].keys()


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"packing": False}, [32, 8]),
        ({"packing": True, "packing_strategy": "bfd"}, [32, 8]),
        ({"packing": True, "packing_strategy": "wrapped"}, [258, 8]),
    ],
    ids=["rows", "bfd", "wrapped"],
)
def test_shares_of_tokens_are_of_those_that_are_trained_on(
    fields: Row, counts: list[int], base_folder: Path, tmp_path: Path
) -> None:
    """A document of 129 tokens counts as `max_length` (16) where it is cut; the general ones have 4."""
    one = stage(tmp_path, "own-long", [{"text": "law " * 63 + str(i % 10)} for i in range(8)])
    path = write_jsonl(tmp_path / "gen-short.jsonl", [{"text": f"{i % 10} gen"} for i in range(40)])
    train = general_train(path, general_share=0.5, share_of="tokens")
    train = Train.model_validate({**train.model_dump(exclude_unset=True), **fields})
    record = trained(with_general(one, train, [one], seed=0), base_folder, tmp_path / "run", train)
    assert [m["examples"] for m in record["mixed"]] == counts


def test_losses_of_sources_with_smoothed_labels(base_folder: Path, tmp_path: Path) -> None:
    one = stage(tmp_path, "law-smooth", lines("law", 12))
    path = write_jsonl(tmp_path / "general-smooth.jsonl", lines("general", 12, 1))
    train = general_train(path, general_share=0.5)
    train = Train.model_validate({**train.model_dump(exclude_unset=True), "label_smoothing_factor": 0.1})
    record = trained(with_general(one, train, [one], seed=0), base_folder, tmp_path / "run", train)
    assert all(m["loss"] > 0 for m in record["mixed"])


def test_losses_of_sources_are_without_the_weights_of_tokens(base_folder: Path, tmp_path: Path) -> None:
    """asft weighs each token by its probability, a few thousandths here."""
    one = stage(tmp_path, "law-weighed", lines("law", 12))
    path = write_jsonl(tmp_path / "general-weighed.jsonl", lines("general", 12, 1))
    losses = []
    for strategy in (["replay"], ["replay", "asft"]):
        parameters = {"replay": {"general": str(path), "general_share": 0.5}}
        fields = {"strategy": strategy, "parameters": parameters, **LIGHT, "max_steps": 1}
        train = Train.model_validate(fields)
        out = tmp_path / "-".join(strategy)
        record = trained(with_general(one, train, [one], seed=0), base_folder, out, train)
        losses.append({m["source"]: m["first_loss"] for m in record["mixed"]})
    assert min(losses[0].values()) > 1
    assert losses[1] == losses[0]


def mixed_texts(train: Train, data: StageData) -> list[str]:
    assert data.general
    strategy = get_strategy("replay", **train.parameters)
    strategy.tools = StageTools(general=data.general.train)
    return list(strategy.mix(data.train, None, seed=0)["text"])


def stage_of(rows: list[Row], home: Path) -> StageData:
    """Return examples in exactly this order."""
    loaded = stage(home, "in-order", rows)
    return StageData("text", Rows.from_list(rows), loaded.heldout, loaded.sources, loaded.train_sources)


def test_each_batch_holds_the_shares(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the trainer's collator gets them, over two epochs and accumulated micro-batches."""
    from hf_contmerge.training._sources import _Collator

    one = stage(tmp_path, "law-batches", lines("law", 30))
    path = write_jsonl(tmp_path / "general-batches.jsonl", lines("general", 40, 1))
    fields = {"packing": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 5, "max_steps": 8}
    train = Train.model_validate({**LIGHT, **fields, "strategy": "replay", "parameters": {
        "general": str(path), "general_share": 0.25, "within_batch": True}})  # fmt: skip
    seen: list[int] = []
    plain = _Collator.__call__

    def watched(self: Any, examples: list[Row]) -> Row:
        batch = plain(self, examples)
        seen.append(sum(max(e[SOURCE]) == 0 for e in examples))  # general-batches.jsonl comes first
        return batch

    monkeypatch.setattr(_Collator, "__call__", watched)
    trained(with_general(one, train, [], seed=0), base_folder, tmp_path / "run", train)
    steps = [sum(seen[i : i + 2]) for i in range(0, 8, 2)]
    assert steps == [2, 3, 2, 3] or steps == [3, 2, 3, 2]


# Whole runs, and what is refused


def recipe(home: Path, replay: Row, **train: Any) -> Row:
    for name, seed in (("law", 2), ("general", 3)):
        write_jsonl(home / f"run-{name}.jsonl", lines(name, 40, seed))
    return {
        "name": "general", "base_model": str(home / "base"), "merge": [{"rule": "average", "start_from": "previous"}],
        "stages": [{"name": n, "dataset": {"path": str(home / "run-law.jsonl"), "heldout": 4}} for n in ("a", "b")],
        "train": {**LIGHT, **train, "strategy": ["full", "replay"], "parameters": {"replay": replay}},
        "evaluate": {"cache": False},
    }  # fmt: skip


@pytest.fixture
def home(base_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "base").symlink_to(base_folder)
    return tmp_path


@pytest.mark.slow
def test_a_run_with_general_data_from_the_first_stage(home: Path) -> None:
    general = {"path": str(home / "run-general.jsonl"), "license": "cc0-1.0"}
    data = recipe(home, {"general": general, "general_share": 0.2, "share": 0.1})
    run = run_recipe(parse_recipe(data), home / "run")
    first, second = (run.expert(t, "previous").record("train") for t in (1, 2))
    counts = [{m["source"]: m["examples"] for m in r["mixed"]} for r in (first, second)]
    assert counts == [
        {"run-general.jsonl": 9, "run-law.jsonl": 36},
        {"replay": 5, "run-general.jsonl": 10, "run-law.jsonl": 36},
    ]
    assert first["general_sources"][0]["train"] == 40
    assert first["general_sources"][0]["license"] == "cc0-1.0"
    report = (run.folder / "report" / "report.md").read_text()
    assert "run-general.jsonl" in report
    assert "cc0-1.0" in report
    from hf_contmerge.report.card import model_card

    card = model_card(run, run.recipe.merge[0])
    assert "run-general.jsonl` (split train, licence cc0-1.0, general data)" in card
    assert "run-law.jsonl` (split train, licence not stated)" in card


@pytest.mark.parametrize(
    ("replay", "words"),
    [
        ({"share": 0.5, "general_share": 0.5, "general": "x.jsonl"}, "leave nothing for the new examples: 0.5 + 0.5"),
        ({"share": 0.95, "general": "x.jsonl"}, "leave nothing for the new examples: 0.95 + 0.1 must be less than 1"),
        ({"general_share": 0.5}, "replay has `general_share` without `general`"),
        ({"general": 7}, "replay's general: must be a path or a dataset's fields; got 7"),
        ({"general": {"paht": "x"}}, "Unknown field 'paht'"),
        ({"general": {"path": "x", "heldout": 4}}, "nothing of general data is held out"),
        ({"general": {"mix": [{"path": "x", "share": 0.5}]}}, "the shares of a mix must sum to 1; 0.5 = 0.5"),
        ({"general": "x.jsonl", "share_of": "words"}, "replay's share_of must be 'examples' or 'tokens'"),
        ({"general": "HOME/missing.jsonl"}, "There is no file"),
        ({"general": "HOME/talk.jsonl"}, "replay cannot mix the examples of HOME/talk.jsonl (messages: list) with new"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_any_work(
    replay: Row, words: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(
        home / "talk.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3,
    )
    data = recipe(home, json.loads(json.dumps(replay).replace("HOME", str(home))), max_length=64)
    (home / "recipe.yml").write_text(json.dumps(data))
    assert main(["run", str(home / "recipe.yml"), "--run", str(home / "run")]) == 2
    told = capfd.readouterr().err
    assert words.replace("HOME", str(home)) in told
    assert "Traceback" not in told
    assert not list((home / "run").glob("stages/*/experts"))


def test_a_sampler_that_would_undo_the_order(home: Path) -> None:
    data = recipe(home, {"within_batch": True, "share": 0.5}, train_sampling_strategy="random")
    with pytest.raises(RecipeError, match=r"`within_batch`\), which train_sampling_strategy: random would undo"):
        run_recipe(parse_recipe(data), home / "run")


def test_general_data_in_a_rung(home: Path) -> None:
    data = recipe(home, {})
    data["guard"] = {"ladder": [{"do": "replay", "parameters": {"general": "x.jsonl"}}]}
    with pytest.raises(RecipeError, match=r"guard\.ladder\.0: a rung cannot name `general` data"):
        run_recipe(parse_recipe(data), home / "run")
