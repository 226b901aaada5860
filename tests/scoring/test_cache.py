"""The cache of scores: the same is never measured twice, what has changed never gets an old answer."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys.models import toy_llama

from hf_contmerge.errors import ModelError
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.scores import Sample, TaskScore
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring._task_digest import TaskDigests, keep_own_listing
from hf_contmerge.scoring.cache import JsonStore, ScoreCache, digest, file_sha256, remembered, stamp
from hf_contmerge.scoring.files import write_choice_task, write_perplexity_task
from hf_contmerge.scoring.keys import ScoreRequest, model_key, score_keys
from hf_contmerge.scoring.known import known_scores
from hf_contmerge.scoring.locate import ModelFolders
from hf_contmerge.scoring.score import score_model

ROWS = [{"query": f"the {a}", "choices": ["fox", "dog"], "gold": 0} for a in ("quick", "lazy", "red", "brown")]
KEY = digest("a key")


def age(path: Path) -> Path:
    """Make a file look as if it had been written a minute ago: what is younger is looked at again."""
    then = time.time() - 60
    os.utime(path, (then, then))
    return path


# The store


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    store = JsonStore(tmp_path / "new")
    assert store.find(KEY) is None
    for value in ({"a": [1, 0.1 + 0.2, -1e-300, None]}, "naïve — 漢字", [0]):
        store.keep(KEY, value)
        assert JsonStore(tmp_path / "new").find(KEY) == value
    assert store.find(digest("another")) is None


def test_bytes_of_an_entry_repeat(tmp_path: Path) -> None:
    for name in ("a", "b"):
        JsonStore(tmp_path / name).keep(KEY, {"x": 1})
    (first,), (second,) = ([p for p in (tmp_path / name).rglob("*") if p.is_file()] for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_damaged_entries_count_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = JsonStore(tmp_path)
    store.keep(KEY, {"gains": list(range(50))})
    path = next(p for p in tmp_path.rglob("*.json.gz"))
    whole = path.read_bytes()
    other = gzip.compress(json.dumps({"format": 1, "key": digest("another"), "value": 1}).encode())
    cut = [whole[:n] for n in (0, 5, len(whole) // 2, len(whole) - 1)]
    flipped = [bytes([*whole[:i], whole[i] ^ 255, *whole[i + 1 :]]) for i in (0, 12, len(whole) // 2, len(whole) - 6)]
    for damaged in (*cut, *flipped, other, gzip.compress(b"[]"), gzip.compress(b"{")):
        path.write_bytes(damaged)
        caplog.clear()
        assert store.find(KEY) is None
        assert "as missing" in caplog.text
    store.keep(KEY, 1)
    assert store.find(KEY) == 1


def test_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = JsonStore(tmp_path / "file")
    store.keep(KEY, 1)
    assert "Cannot write the score cache" in caplog.text
    assert "HF_CONTMERGE_CACHE" in caplog.text
    assert store.find(KEY) is None


def test_many_writers_at_once(tmp_path: Path) -> None:
    """Readers see one of the values, whole; nothing but the entry is left."""
    values = [{"writer": i, "gains": [float(i)] * 2000} for i in range(8)]
    store = JsonStore(tmp_path)
    store.keep(KEY, values[0])

    def write_and_read(value: dict[str, Any]) -> list[Any]:
        seen = []
        for _ in range(20):
            store.keep(KEY, value)
            seen.append(store.find(KEY))
        return seen

    with ThreadPoolExecutor(8) as pool:
        assert all(found in values for seen in pool.map(write_and_read, values) for found in seen)
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".gz"]


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert JsonStore.open().folder is None  # as conftest.py says, for all tests
    monkeypatch.setenv("HF_CONTMERGE_CACHE", str(tmp_path / "x"))
    assert JsonStore.open().folder == tmp_path / "x"
    assert JsonStore.open(use=False).folder is None
    monkeypatch.delenv("HF_CONTMERGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert JsonStore.open().folder == tmp_path / ".cache/hf_contmerge/scores"
    assert list(tmp_path.iterdir()) == []


# What was made of files


def test_file_is_read_once_until_it_is_touched(tmp_path: Path) -> None:
    store, path, calls = JsonStore(tmp_path / "cache"), tmp_path / "x", []

    def read() -> str:
        calls.append(1)
        return path.read_text()

    path.write_text("one")
    assert remembered(store, "words", [path], read) == "one"
    assert remembered(store, "words", [path], read) == "one"
    assert len(calls) == 2  # it was young: it might have been written again within one tick of the clock
    age(path)
    for _ in range(3):
        assert remembered(store, "words", [path], read) == "one"
    assert len(calls) == 3
    path.write_text("two")
    assert remembered(store, "words", [path], read) == "two"
    assert remembered(store, "letters", [path], lambda: "else") == "else"


@pytest.mark.parametrize("how", ["in place", "with its times put back", "replaced", "through a link"])
def test_same_size_other_bytes(how: str, tmp_path: Path) -> None:
    path, store = age_of(tmp_path / "x", "aaaa"), JsonStore(tmp_path / "cache")
    if how == "through a link":
        other = age_of(tmp_path / "y", "bbbb")
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "x")
    before, times = file_sha256(path, store), path.stat()
    assert file_sha256(path, store) == before
    if how == "replaced":
        age_of(tmp_path / "new", "bbbb").replace(path)
    elif how == "through a link":
        path.unlink()
        path.symlink_to(other)
    else:
        time.sleep(0.02)  # more than a tick
        path.write_text("bbbb")
        if how == "with its times put back":
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_sha256(path, store) != before


def age_of(path: Path, text: str) -> Path:
    path.write_text(text)
    return age(path)


def test_stamp_of_files_that_come_and_go(tmp_path: Path) -> None:
    one, two = age_of(tmp_path / "1", "x"), age_of(tmp_path / "2", "x")
    assert len({stamp(files)[0] for files in ([one], [two], [one, two], [])}) == 4


# Keys of models


@pytest.fixture
def model(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


def request(tasks: Path, *names: str, **evaluate: Any) -> ScoreRequest:
    how = Evaluate.model_validate({"dtype": "float32", **evaluate})
    return ScoreRequest([Task(name=n) for n in names], tasks, how)


def key_of(folder: Path, **evaluate: Any) -> str:
    found = model_key(ModelFolders(folder), request(folder, **evaluate), JsonStore(None))
    assert found
    return found.sha256


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CHANGES: dict[str, Callable[[Path], object]] = {
    "one weight": lambda m: save_file(
        {**(w := load_file(m / "model.safetensors")), "model.norm.weight": w["model.norm.weight"] * 1.001},
        m / "model.safetensors", metadata={"format": "pt"},
    ),
    "config": lambda m: edit_json(m / "config.json", rms_norm_eps=1e-3),
    "generation settings": lambda m: edit_json(m / "generation_config.json", repetition_penalty=2.0),
    "tokenizer": lambda m: edit_json(m / "tokenizer.json", truncation=None, extra=1),
    "chat template": lambda m: (m / "chat_template.jinja").write_text("{{ messages }}"),
    "model code": lambda m: (m / "modeling_x.py").write_text("x = 1"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_model_has_another_key(change: str, model: Path) -> None:
    before = key_of(model)
    CHANGES[change](model)
    assert key_of(model) != before


def test_copy_of_a_model_has_the_same_key(model: Path, base_folder: Path) -> None:
    """Also one whose weights are in other files, and whose config names another version of transformers."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, model / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    edit_json(model / "config.json", transformers_version="0.0", dtype="float64")
    assert key_of(model) == key_of(base_folder)


def test_dtype_is_a_part_of_the_key(base_folder: Path, tmp_path: Path) -> None:
    half = toy_llama(tmp_path / "half", seed=0, dtype=torch.bfloat16)
    keys = {key_of(f, dtype=d) for f in (half, base_folder) for d in ("float32", "bfloat16")}
    assert len(keys) == 4
    assert key_of(base_folder, dtype="auto") == key_of(base_folder, dtype="float32")  # a toy is too small for bfloat16


def test_auto_is_one_dtype_unless_others_round(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM and tensor parallelism load files themselves: one in float32 stays in float32 there."""
    monkeypatch.setattr("hf_contmerge.runtime.device.bf16_pays", lambda _numel: True)
    half = toy_llama(tmp_path / "half", seed=0, dtype=torch.bfloat16)
    store, found = JsonStore(tmp_path / "cache"), {}
    for words in ({}, {"backend": "vllm"}, {"parallel": "tensor"}, {"parallel": "layers"}):
        for name, folder in (("half", half), ("wide", base_folder)):
            key = model_key(ModelFolders(folder), request(folder, dtype="auto", **words), store)
            assert key
            found[(name, *words.values())] = key.dtype
    assert {what for what, dtype in found.items() if dtype == "float32"} == {("wide", "vllm"), ("wide", "tensor")}


def test_weights_are_read_only_where_that_is_allowed(model: Path, tmp_path: Path) -> None:
    store = JsonStore(tmp_path / "cache")
    for path in model.iterdir():
        age(path)
    what = ModelFolders(model), request(model, dtype="auto"), store
    assert model_key(*what, read=False) is None
    found = model_key(*what)
    assert model_key(*what, read=False) == found
    (model / "model.safetensors").touch()
    assert model_key(*what, read=False) is None


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        key_of(tmp_path)


# Digests of tasks


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks as we write them, and some as a user may write them."""
    folder = tmp_path / "tasks"
    write_perplexity_task(folder, "texts", ["the quick brown fox", "a lazy dog"])
    write_choice_task(folder, "choice", ROWS)
    choice = yaml.safe_load((folder / "choice.yaml").read_text())
    (folder / "code").mkdir()
    (folder / "code/utils.py").write_text("def prepare(docs):\n    return docs\n")
    theirs: dict[str, Any] = {
        "both": {"group": "both", "task": ["texts", "choice"]},
        "nested": {"group": "nested", "task": ["both", {"task": "choice", "num_fewshot": 1}]},
        "tagged": {**choice, "task": "tagged", "tag": "some_tag"},
        "child": {"include": "choice.yaml", "task": "child", "num_fewshot": 1},
        "hub": {**choice, "task": "hub", "dataset_path": "Owner/HubSet", "dataset_kwargs": {}},
        "web": {**choice, "task": "web", "dataset_kwargs": {"data_files": {"test": "https://x.org/a.json"}}},
        "loop": {"group": "loop", "task": ["loop"]},
    }
    for name, fields in theirs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    (folder / "code/coded.yaml").write_text(
        yaml.safe_dump({**choice, "task": "coded"}) + "process_docs: !function utils.prepare\n"
    )
    return folder


KNOWN = ("texts", "choice", "both", "nested", "tagged", "some_tag", "child", "coded")


def task_digest(folder: Path, name: str) -> str | None:
    return TaskDigests.open([folder], JsonStore(None)).sha256(name)


def test_tasks_that_files_tell(tasks: Path) -> None:
    found = {name: task_digest(tasks, name) for name in KNOWN}
    assert None not in found.values()
    assert len(set(found.values())) == len(KNOWN)


@pytest.mark.parametrize("name", ["hub", "web", "loop", "nowhere"])
def test_tasks_that_files_do_not_tell(name: str, tasks: Path) -> None:
    assert task_digest(tasks, name) is None


def test_tasks_of_another_folder(tasks: Path, tmp_path: Path) -> None:
    before = {name: task_digest(tasks, name) for name in KNOWN}
    moved = tasks.rename(tmp_path / "moved")
    for path in moved.rglob("*.yaml"):
        path.write_text(path.read_text().replace(str(tasks), str(moved)))
    assert {name: task_digest(moved, name) for name in KNOWN} == before


def test_other_data(tasks: Path) -> None:
    before = {name: task_digest(tasks, name) for name in KNOWN}
    write_choice_task(tasks, "choice", [*ROWS[:-1], {**ROWS[-1], "gold": 1}])
    after = {name: task_digest(tasks, name) for name in KNOWN}
    assert {name for name in KNOWN if after[name] == before[name]} == {"texts"}


CHANGED: dict[str, tuple[str, str, str, set[str]]] = {
    "settings": (
        "choice.yaml",
        "doc_to_text: query",
        "doc_to_text: 'Q: {{query}}'",
        {"choice", "both", "nested", "child"},
    ),
    "a group": ("both.yaml", "- choice", "- tagged", {"both", "nested"}),
    "an override": ("nested.yaml", "num_fewshot: 1", "num_fewshot: 2", {"nested"}),
    "code": ("code/utils.py", "docs\n", "docs.select([0])\n", {"coded"}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_other_words(what: str, tasks: Path) -> None:
    file, old, new, touched = CHANGED[what]
    before = {name: task_digest(tasks, name) for name in KNOWN}
    text = (tasks / file).read_text()
    assert old in text
    (tasks / file).write_text(text.replace(old, new))
    assert {name for name in KNOWN if task_digest(tasks, name) != before[name]} == touched


def test_dataset_of_the_hub(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commit, as `datasets` names the folder that it has prepared; with two of them it is not known which."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub/Owner___hub_set/default/0.0.0"
    (place / ("a" * 40)).mkdir(parents=True)
    first = task_digest(tasks, "hub")
    (place / ("a" * 40)).rename(place / ("b" * 40))
    assert first != task_digest(tasks, "hub") != None  # noqa: E711
    (place / ("a" * 40)).mkdir()
    assert task_digest(tasks, "hub") is None


def brought(folders: list[Path], store: JsonStore) -> TaskDigests:
    """List tasks as lm-eval does when one of its own is meant, remember them, and forget all but that."""
    from lm_eval.tasks import TaskManager

    keep_own_listing(store, TaskManager(include_path=[str(f) for f in folders], include_defaults=not folders)._index)
    return TaskDigests.open([], store)


def test_tasks_that_lm_eval_brings(tasks: Path, tmp_path: Path) -> None:
    """They are listed once it has been loaded. Here, a few stand for its thousands."""
    assert TaskDigests.open([], JsonStore(tmp_path)).sha256("choice") is None
    digests = brought([tasks], JsonStore(tmp_path))
    for name in KNOWN:
        assert digests.sha256(name) == task_digest(tasks, name)


@pytest.mark.slow
def test_all_tasks_that_lm_eval_brings(tmp_path: Path) -> None:
    """Their data lies on the Hub, and is not here."""
    digests = brought([], JsonStore(tmp_path))
    own = digests.listings[-1]
    assert own.files["hellaswag"].name == "hellaswag.yaml"
    assert len(own.tags["ai2_arc"]) == 2
    assert digests.sha256("hellaswag") is None


# Scores


def score(value: float = 0.5) -> TaskScore:
    sample = Sample((value, 1.0), (1.0, 1.0))
    return TaskScore("accuracy", "acc", sample.utility, sample.utility, sample.stderr(), *_pair(sample), {"key": "k"})


def _pair(sample: Sample) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return sample.gains, sample.weights


def test_scores_come_back(tmp_path: Path) -> None:
    cache = ScoreCache(JsonStore(tmp_path))
    assert cache.find(KEY) is None
    cache.keep(KEY, score())
    assert cache.find(KEY) == score()
    assert ScoreCache(JsonStore(tmp_path), here=lambda _: score(0.7)).find(KEY) == score(0.7)
    cache.store.keep(KEY, {"block": "accuracy", "of another": "version"})
    assert cache.find(KEY) is None


SETTINGS: tuple[dict[str, Any], ...] = ({}, {"limit": 2}, {"max_length": 64}, {"chat_template": True})


def test_settings_are_a_part_of_the_key(base_folder: Path, tasks: Path) -> None:
    keys = set()
    for settings in SETTINGS:
        what = request(tasks, "choice", "texts", **settings)
        model = model_key(ModelFolders(base_folder), what, JsonStore(None))
        assert model
        keys |= set(score_keys(model, what, JsonStore(None)).values())
    assert len(keys) == 2 * len(SETTINGS)
    few = ScoreRequest([Task(name="choice", num_fewshot=1)], tasks, Evaluate(dtype="float32"))
    part = ScoreRequest([Task(name="choice")], tasks, Evaluate(dtype="float32"), part="test")
    for what in (few, part):
        keys |= set(score_keys(model, what, JsonStore(None)).values())
    assert len(keys) == 2 * len(SETTINGS) + 2
    same = request(tasks, "choice", "texts", batch_size=3, cache=False)
    assert set(score_keys(model, same, JsonStore(None)).values()) <= keys


def measured(folder: Path, tasks: Path, cache: ScoreCache, *names: str, **evaluate: Any) -> dict[str, TaskScore]:
    trusted = evaluate.pop("trust_remote_code", False)
    how = Evaluate.model_validate({"dtype": "float32", "batch_size": 4, **evaluate})
    wanted = [Task(name=n) for n in names]
    return score_model(
        folder, wanted, task_folder=tasks, evaluate=how, ranks=OneRank(), cache=cache, trust_remote_code=trusted
    )[1]


class Counting(ScoreCache):
    """Counts what is kept: what was measured."""

    kept = 0

    def keep(self, key: str, score: TaskScore) -> None:
        super().keep(key, score)
        Counting.kept += 1


def test_nothing_is_measured_twice(base_folder: Path, tasks: Path, tmp_path: Path) -> None:
    cache, Counting.kept = Counting(JsonStore(tmp_path / "cache")), 0
    first = measured(base_folder, tasks, cache, "texts")
    assert Counting.kept == 1
    assert measured(base_folder, tasks, cache, "texts") == first
    assert Counting.kept == 1
    both = measured(base_folder, tasks, cache, "choice", "texts")
    assert Counting.kept == 2
    assert both["texts"] == first["texts"]
    copy = Path(shutil.copytree(base_folder, tmp_path / "copy"))
    seen = known_scores(ModelFolders(copy), request(tasks, "texts", "choice"), cache)
    assert seen
    assert not seen.missing([Task(name="texts"), Task(name="choice")])
    without = measured(base_folder, tasks, ScoreCache(JsonStore(None)), "texts", "choice")
    assert {n: s.gains for n, s in without.items()} == {n: s.gains for n, s in both.items()}


def test_what_has_changed_is_measured_again(model: Path, tasks: Path, tmp_path: Path) -> None:
    cache, Counting.kept = Counting(JsonStore(tmp_path / "cache")), 0
    first = measured(model, tasks, cache, "texts")["texts"]
    CHANGES["one weight"](model)
    second = measured(model, tasks, cache, "texts")["texts"]
    assert first.gains != second.gains
    write_perplexity_task(tasks, "texts", ["the quick brown fox", "a lazy hen"])
    third = measured(model, tasks, cache, "texts")["texts"]
    assert third.gains[0] == pytest.approx(second.gains[0], rel=1e-6)
    assert third.gains[1] != second.gains[1]
    assert Counting.kept == 3


def test_task_that_files_do_not_tell_is_measured_and_not_kept(base_folder: Path, tasks: Path, tmp_path: Path) -> None:
    """Its code may be of any version."""
    choice = yaml.safe_load((tasks / "choice.yaml").read_text())
    text = yaml.safe_dump({**choice, "task": "far"}) + "process_docs: !function copy.copy\n"
    (tasks / "far.yaml").write_text(text)
    cache, Counting.kept = Counting(JsonStore(tmp_path / "cache")), 0
    found = measured(base_folder, tasks, cache, "far", trust_remote_code=True)
    assert found["far"].details["key"] is None
    assert len(found["far"].gains) == len(ROWS)
    assert Counting.kept == 0


def test_keys_are_found_without_torch(base_folder: Path, tasks: Path, tmp_path: Path) -> None:
    """In a process that has seen the weights before."""
    store = JsonStore(tmp_path / "cache")
    model = Path(shutil.copytree(base_folder, tmp_path / "model"))
    for path in model.iterdir():
        age(path)
    found = known_scores(ModelFolders(model), request(tasks, "texts", "both", dtype="auto"), ScoreCache(store))
    script = f"""
import sys
from pathlib import Path
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.scoring.cache import JsonStore, ScoreCache
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.known import known_scores
from hf_contmerge.scoring.locate import ModelFolders
tasks = [Task(name="texts"), Task(name="both")]
model = ModelFolders(Path({str(model)!r}))
request = ScoreRequest(tasks, Path({str(tasks)!r}), Evaluate())
print(known_scores(model, request, ScoreCache(JsonStore(Path({str(tmp_path / "cache")!r}))), read=False).keys)
print(sorted(set(sys.modules) & {{"torch", "transformers", "lm_eval", "datasets", "pyarrow", "numpy"}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found
    assert done.stdout.splitlines() == [str(found.keys), "[]"]
