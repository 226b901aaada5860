"""One changed byte anywhere in a run, a state or a model: found by `verify`, and never built upon."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.hub_server import WRITE_TOKEN, Hub, Repo, hub_server, reach
from toys.loras import lora
from toys.models import perturbed, toy_llama, write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RunError
from hf_contmerge.loop.functions import finetune_stage
from hf_contmerge.loop.proof import find_model, prove
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.loop.verify import verify_model, verify_run, verify_state
from hf_contmerge.merging.state import MergeState
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.records import read_record, record_text, write_record
from hf_contmerge.training._checkpoints import newest_checkpoint, seal_checkpoint

Data = dict[str, Any]
TRAIN = {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 32, "save_strategy": "no"}
SAMPLED = 3
"""Flips per file in the default suite."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert, an adapter, texts and questions."""
    home, draw = tmp_path_factory.mktemp("integrity"), random.Random(0)
    base = toy_llama(home / "base", seed=0)
    for seed, name in enumerate(("given", "other"), 1):
        perturbed(base, home / name, seed=seed, size=0.01)
    lora(base, home / "adapter", seed=3)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    for name in ("integrity-a", "integrity-b"):
        write_jsonl(home / f"{name}.jsonl", [{"text": " ".join(draw.choices(words, k=20))} for _ in range(12)])
    rows = [{"query": "the quick", "choices": ["brown", "fox"], "gold": i % 2} for i in range(4)]
    write_jsonl(home / "integrity-choice.jsonl", rows)
    return home


@pytest.fixture(scope="module")
def recipe(home: Path) -> Data:
    """A stage that is trained, with replay's memory, and one with a given expert."""
    choice = {"name": "choice", "kind": "multiple_choice", "dataset": str(home / "integrity-choice.jsonl")}
    return {
        "name": "integrity",
        "base_model": str(home / "base"),
        "stages": [
            {"name": "a", "dataset": {"path": str(home / "integrity-a.jsonl"), "heldout": 3}},
            {"name": "b", "expert": str(home / "given")},
        ],
        "train": {**TRAIN, "strategy": "replay"},
        "merge": ["magmax"],
        "evaluate": {"general_tasks": [choice]},
    }


@pytest.fixture(scope="module")
def made_run(recipe: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(parse_recipe(recipe), tmp_path_factory.mktemp("integrity-run") / "run").folder


@pytest.fixture(scope="module")
def made_state(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state of a full model and an adapter, with a written model below it."""
    folder = tmp_path_factory.mktemp("integrity-state") / "state"
    state = MergeState.create(folder, base=home / "base", rule="magmax").add(home / "given", home / "adapter")
    state.export(folder.with_name("merged"))
    return folder


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(made_run, tmp_path / "run", symlinks=True))
    Run.load(folder).settle()
    return folder


@pytest.fixture
def state(made_state: Path, tmp_path: Path) -> Path:
    shutil.copytree(made_state.with_name("merged"), tmp_path / "merged")
    return Path(shutil.copytree(made_state, tmp_path / "state"))


@contextlib.contextmanager
def flipped(file: Path, draw: random.Random) -> Iterator[None]:
    """Flip one bit of a file, and its times stay as they were."""
    data, times = file.read_bytes(), file.stat()
    place = draw.randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    yield
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def contmerge(*words: object) -> int:
    """Run a command in this process; return its exit code."""
    return main([str(word) for word in words])


# Flipped bits


def found(folder: Path, verify: Callable[[], list[Path]], *, flips: int, seed: int) -> tuple[int, list[str]]:
    """Return the number of flips in the files below a folder, and those that were missed."""
    draw, count, missed = random.Random(seed), 0, []
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size):
        for _ in range(flips):
            with flipped(file, draw):
                count += 1
                if file not in verify():
                    missed.append(str(file.relative_to(folder)))
    return count, missed


def damaged_in_run(folder: Path) -> list[Path]:
    try:
        run = Run.load(folder)
    except RunError as error:  # the frozen recipe: nothing else can be read without it
        return [Path(str(error).split(" ")[0])]
    return [damage.file for damage in verify_run(run).damages]


def damaged_in_state(folder: Path) -> list[Path]:
    return [damage.file for damage in verify_state(MergeState(folder)).damages]


@pytest.mark.parametrize("flips", [SAMPLED, pytest.param(25, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(flips: int, run: Path, state: Path, figure: Callable[..., None]) -> None:
    model = state.with_name("merged")
    whole = (damaged_in_run(run), damaged_in_state(state), verify_model(model).damages)
    assert whole == ([], [], [])
    counts = [
        found(run, lambda: damaged_in_run(run), flips=flips, seed=1),
        found(state, lambda: damaged_in_state(state), flips=flips, seed=2),
        found(model, lambda: [d.file for d in verify_model(model).damages], flips=flips, seed=3),
    ]
    tried = sum(n for n, _ in counts)
    figure("flipped bits of runs, states and models, found", tried, tried - sum(len(m) for _, m in counts))
    assert [missed for _, missed in counts] == [[], [], []]


# Nothing is built on a flipped bit, and nothing published

BUILT_UPON = {
    "expert": ("stages/01-a/experts/base/expert/model.safetensors", "redo merge", "run"),
    "tokenizer of the expert": ("stages/01-a/experts/base/expert/tokenizer.json", "redo score", "run"),
    "state": ("stages/02-b/merges/magmax/running/model.safetensors", "run c", "run c"),
    "merged model": ("stages/02-b/merges/magmax/merged/model.safetensors", "redo score", "run"),
    "merged model, pushed": ("stages/02-b/merges/magmax/merged/model.safetensors", "", "push"),
    "merge.yml, pushed": ("stages/02-b/merges/magmax/merge.yml", "", "push"),
    "scores": ("stages/02-b/merges/magmax/score.parquet", "", "report"),
    "task": ("tasks/choice.parquet", "", "score"),
}


@pytest.mark.parametrize("case", BUILT_UPON)
def test_nothing_is_built_on_a_flipped_bit_of_a_run(
    case: str, run: Path, recipe: Data, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, before, command = BUILT_UPON[case]
    if before.startswith("redo"):
        assert contmerge("redo", run, before.removeprefix("redo ")) == 0
    third = {"name": "c", "expert": str(home / "other")}
    stages = [*recipe["stages"], third] if before == "run c" else recipe["stages"]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump({**recipe, "stages": stages}))
    words = {
        "run": ("run", tmp_path / "recipe.yml", "--run", run),
        "push": ("push", run, "--repo-id", "me/model"),
        "report": ("report", run),
        "score": ("score", home / "base", "--run", run, "--tasks", "choice", "--no-cache"),
    }[command.split()[0]]
    capsys.readouterr()
    with flipped(run / name, random.Random(5)):
        assert contmerge(*words) == 2
    assert name in capsys.readouterr().err


def test_a_checkpoint_with_a_flipped_bit_is_not_resumed(tmp_path: Path) -> None:
    for number in (2, 4):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(64))
        (folder / "trainer_state.json").write_text("{}")
        seal_checkpoint(folder)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    with flipped(tmp_path / "checkpoint-4/model.safetensors", random.Random(0)):
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


STATE_FILES = ("running-1/model.safetensors", "running-1/owners/model.safetensors")


@pytest.mark.parametrize("name", STATE_FILES)
def test_nothing_is_built_on_a_flipped_bit_of_a_state(name: str, state: Path, home: Path, tmp_path: Path) -> None:
    before = contents(state)
    with flipped(state / name, random.Random(6)):
        for words in (("add", state, home / "other"), ("export", state, tmp_path / "out"), ("owners", state)):
            assert contmerge("merge", *words) == 2, words
    assert contents(state) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*STATE_FILES, "running-1/owners"])
def test_tensors_that_are_missing_do_not_count_as_zero(name: str, state: Path, home: Path) -> None:
    """As in a state of magmax from before there were owners."""
    path = state / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(state)
    assert contmerge("merge", "add", state, home / "other") == 2
    assert contents(state) == before


# A base that changes


def other_base(home: Path, tmp_path: Path) -> Path:
    """Return a copy of the base, to change."""
    return Path(shutil.copytree(home / "base", tmp_path / "base"))


def test_a_base_that_changes_under_a_state(home: Path, tmp_path: Path) -> None:
    base = other_base(home, tmp_path)
    state = MergeState.create(tmp_path / "state", base=base, rule="average").add(home / "given")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        with flipped(base / name, random.Random(7)):  # size and times stay
            with pytest.raises((ModelError, RunError)):
                state.add(home / "other")
            with pytest.raises((ModelError, RunError)):
                state.export(tmp_path / "out")
    state.add(home / "other")


def test_a_base_that_changes_under_a_run(home: Path, tmp_path: Path) -> None:
    base = other_base(home, tmp_path)
    stages = [{"name": "a", "expert": str(home / "given")}, {"name": "b", "expert": str(home / "other")}]
    recipe = {"name": "x", "base_model": str(base), "stages": stages[:1], "merge": ["average"]}
    run_recipe(parse_recipe(recipe), tmp_path / "run", until="merge")
    two = parse_recipe({**recipe, "stages": stages})
    changed = r"model.safetensors of the base .* is not what .* was started with"
    with flipped(base / "model.safetensors", random.Random(8)), pytest.raises(ModelError, match=changed):
        run_recipe(two, tmp_path / "run", until="merge")
    run_recipe(two, tmp_path / "run", until="merge")


def test_a_given_expert_that_changes_under_a_run(home: Path, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(home / "given", tmp_path / "given"))
    recipe = {
        "name": "x", "base_model": str(home / "base"), "stages": [{"name": "a", "expert": str(expert)}],
        "merge": ["average"],
    }  # fmt: skip
    run_recipe(parse_recipe(recipe), tmp_path / "run", until="train")
    changed = r"given/model.safetensors changed or went missing after .*train.json"
    with flipped(expert / "model.safetensors", random.Random(9)), pytest.raises(RunError, match=changed):
        run_recipe(parse_recipe(recipe), tmp_path / "run", until="merge")


# Runs and states that move


def test_a_copied_run_reads_nothing_of_the_old_place(run: Path, home: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "elsewhere [1]" / "copy", symlinks=True))
    old_run = run.with_name("gone")
    run.rename(old_run)
    out = tmp_path / "scores.json"
    assert contmerge("score", home / "base", "--run", copy, "--json", out, "--no-cache") == 0
    assert json.loads(out.read_text())["tasks"]["a_heldout"]["documents"] == 3
    written = [p for p in copy.rglob("*") if p.suffix in (".yaml", ".yml") and f"{run}/" in p.read_text()]
    assert not written
    assert contmerge("verify", copy) == 0
    recipe = copy / "recipe.yml"
    assert contmerge("run", recipe, "--run", copy) == 0
    assert contmerge("redo", copy, "merge") == 0
    assert contmerge("run", recipe, "--run", copy, "--until", "merge") == 0


def test_a_moved_state_goes_on(state: Path, home: Path, tmp_path: Path) -> None:
    moved = state.rename(tmp_path / "moved")
    assert contmerge("merge", "add", moved, home / "other") == 0
    assert contmerge("verify", moved) == 0


# Damaged records

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut short": lambda data: data[:-40],
    "not UTF-8": lambda data: data[:20] + b"\xff" + data[21:],
    "list": lambda _: b"[]",
    "null": lambda _: b"null",
    "no fields": lambda _: b"{}",
    "brackets": lambda _: b"[" * 100_000,
    "number for text": lambda data: re.sub(rb'": "[^"]*"', b'": 5', data, count=1),
    "text for number": lambda data: re.sub(rb'": [0-9.]+', b'": "x"', data, count=1),
    "null for a field": lambda data: re.sub(rb'": [^,{[]+', b'": null', data, count=1),
    "NaN for a number": lambda data: re.sub(rb'": [0-9.]+', b'": NaN', data, count=1),
    "a field is gone": lambda data: json.dumps(dict(list(json.loads(data).items())[1:])).encode(),
    "another field is gone": lambda data: json.dumps(dict(list(json.loads(data).items())[:-2])).encode(),
    "an older format": lambda data: json.dumps({**json.loads(data), "format": 1}).encode(),
    "a newer format": lambda data: record_text({**json.loads(data), "format": 9}).encode(),
}


def damaged_copies(run: Path, damages: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Damage one record after another, and mend it."""
    records = [p for p in run.rglob("*.json") if not {"expert", "merged", "report"} & set(p.parts[len(run.parts) :])]
    for number, file in enumerate(sorted(records)):
        if not damages and number % 3:
            continue  # the default suite takes a sample
        whole = file.read_bytes()
        for damage in damages or [list(DAMAGES)[number % len(DAMAGES)]]:
            file.write_bytes(DAMAGES[damage](whole))
            before = contents(run / "stages")
            yield file, damage
            assert contents(run / "stages") == before, f"{file}, {damage}: a command changed a file"
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("damages", "commands"),
    [
        ((), ("status", "report", "score")),
        pytest.param(tuple(DAMAGES), ("status", "report", "score", "push", "plan", "run"), marks=pytest.mark.slow),
    ],
)
def test_damaged_records_of_a_run(
    damages: tuple[str, ...], commands: tuple[str, ...], run: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence with what to do, exit code 2; or an answer that did not need the record."""
    words = {
        "status": ("status", run),
        "report": ("report", run),
        "plan": ("plan", run / "recipe.yml", "--run", run),
        "score": ("score", home / "base", "--run", run, "--tasks", "choice", "--no-cache"),
        "run": ("run", run / "recipe.yml", "--run", run),
        "push": ("push", run, "--repo-id", "me/model"),
    }
    if "run" in commands:
        contmerge("redo", run, "report")  # a finished run is not looked into
    for file, damage in damaged_copies(run, damages):
        for command in commands:
            capsys.readouterr()
            code = contmerge(*words[command])
            said = capsys.readouterr().err
            assert code in (0, 2), (file, damage, command)
            assert said.count("Error:") == (code == 2), said
        assert contmerge("verify", run) == 1, (file, damage)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_records_of_a_state(
    damage: str, state: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = state / "state.json"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    before = contents(state)
    for words in (("log", state), ("add", state, home / "other"), ("export", state, tmp_path / "out")):
        capsys.readouterr()
        assert contmerge("merge", *words) == 2
        said = capsys.readouterr().err
        assert str(file) in said
        assert said.count("Error:") == 1
    assert contmerge("verify", state) == 1
    assert contents(state) == before


# Models: their files, and the merge made again


def test_a_written_model_is_proved_by_merging_again(
    state: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = state.with_name("merged")
    assert contmerge("verify", model) == 0
    assert "Merged again by magmax: the same weights" in capsys.readouterr().out
    lineage = read_record(model / "merge.json", "")
    write_record(model / "merge.json", {**lineage, "parameters": {"lambda": 0.25}})  # a forged one
    assert contmerge("verify", model) == 1
    assert "is not what its parents give" in capsys.readouterr().err
    assert contmerge("verify", model, "--files-only") == 0
    experts = [{**e, "model": str(tmp_path / "gone")} for e in lineage["experts"]]
    write_record(model / "merge.json", {**lineage, "experts": experts})
    assert contmerge("verify", model) == 2
    assert "the parent given: There is no model at" in capsys.readouterr().err
    names = ("--parent", f"given={home / 'given'}", "--parent", f"adapter={home / 'adapter'}")
    assert contmerge("verify", model, *names) == 0
    assert contmerge("verify", model, "--parent", f"given={home / 'other'}", *names[2:]) == 2
    assert "has other weights than when it was merged" in capsys.readouterr().err


def upload(hub: Hub, repo: str, folder: Path) -> None:
    hub.repos[repo] = Repo(private=False)
    files = {p.name: hub.store(p.read_bytes(), lfs=p.suffix == ".safetensors") for p in folder.iterdir()}
    hub.commit(repo, "model", files)


def online(hub: Hub, home: Path, *words: object) -> tuple[int, str]:
    """Run a command in a process that knows this Hub only."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITE_TOKEN}
    command = [sys.executable, "-m", "hf_contmerge.commands.main", *map(str, words)]
    done = subprocess.run(command, env={**clean, **own}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_model_on_the_hub_is_proved_by_merging_its_parents_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = MergeState.create(tmp_path / "state", base=home / "base", rule="opcm").add(home / "given", home / "other")
    merged = state.export(tmp_path / "merged", dtype="bfloat16")
    lineage = read_record(merged / "merge.json", "")
    names = {"given": "me/given", "other": "me/other"}
    experts = [{**e, "model": names[e["stage"]]} for e in lineage["experts"]]
    write_record(merged / "merge.json", {**lineage, "base": "me/base", "experts": experts})
    with hub_server(tmp_path / "hub") as hub:
        for name in ("base", "given", "other"):
            upload(hub, f"me/{name}", home / name)
        upload(hub, "me/merged", merged)
        reach(hub, monkeypatch)
        code = contmerge("verify", "me/merged")
    said = capsys.readouterr().out
    assert code == 0, said
    assert "Parents as recorded: me/base, me/given, me/other." in said
    assert "Merged again by opcm: the same weights" in said


@pytest.mark.slow
def test_a_pushed_run_is_proved_by_its_own_record(run: Path, home: Path, tmp_path: Path) -> None:
    """merge.json as `push` writes it: the parents by public names, found with --parent."""
    parents = {"base": home / "base", "a": run / "stages/01-a/experts/base/expert", "b": home / "given"}
    words = [word for name, folder in parents.items() for word in ("--parent", f"{name}={folder}")]
    with hub_server(tmp_path / "hub") as hub:
        code, said = online(hub, tmp_path, "push", run, "--repo-id", "me/merged")
        assert code == 0, said
        assert str(home).encode() not in hub.files("me/merged")["merge.json"]
        code, said = online(hub, tmp_path, "verify", "me/merged", *words)
        assert code == 0, said
        assert "Merged again by magmax: the same weights" in said
        other = ["--parent", f"b={home / 'other'}"]
        code, said = online(hub, tmp_path, "verify", "me/merged", *words, *other)
        assert code == 2
        assert "has other weights than when it was merged" in said


def test_a_lineage_from_the_hub_does_not_lead_to_folders_of_this_machine(state: Path, home: Path) -> None:
    model = find_model(str(state.with_name("merged")))
    stranger = replace(model, from_hub=True)
    with pytest.raises(ModelError, match=rf"without {home / 'base'}, the parent base: There is no model at"):
        list(prove(stranger, {}))
    parents = {"base": home / "base", "given": home / "given", "adapter": home / "adapter"}
    assert list(prove(stranger, {name: str(folder) for name, folder in parents.items()}))


def test_a_trained_expert_is_verified(home: Path, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    fields = {**TRAIN, "strategy": "replay"}
    finetune_stage(home / "base", home / "integrity-b.jsonl", expert, **fields)
    assert contmerge("verify", expert) == 0
    assert found(expert, lambda: [d.file for d in verify_model(expert).damages], flips=1, seed=4)[1] == []
    changed = r"model.safetensors changed or went missing"
    with flipped(expert / "model.safetensors", random.Random(1)), pytest.raises(RunError, match=changed):
        finetune_stage(home / "base", home / "integrity-b.jsonl", expert, **fields)


def test_a_folder_without_records(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contmerge("verify", home / "base") == 2
    assert "nothing says what its files should be" in capsys.readouterr().err
