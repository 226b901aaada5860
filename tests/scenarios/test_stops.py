"""SIGTERM and Ctrl-C: a checkpoint is finished, one line names the command that continues, and it does."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from toys import ROOT
from toys.forks import Forks, forks, outcome
from toys.models import perturbed, toy_llama, write_jsonl

from hf_contmerge import MergeState

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("stops") / "root") as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("stops-home")
    base, draw = toy_llama(home / "base", seed=0, hidden=16, layers=1), random.Random(0)
    perturbed(base, home / "e1", seed=1, size=0.01)
    texts = [{"text": " ".join(draw.choices(["the", "quick", "brown", "fox"], k=40))} for _ in range(40)]
    train = {"per_device_train_batch_size": 2, "max_length": 32, "max_steps": 150, "save_steps": 20}
    stages = [{"name": "law", "dataset": {"path": str(write_jsonl(home / "law.jsonl", texts)), "heldout": 2}}]
    recipe = {"name": "stops", "base_model": str(base), "stages": stages, "train": train, "merge": ["magmax"]}
    (home / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return home


def until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def newest(place: Path) -> int:
    """Return the step of the newest whole checkpoint."""
    return max(
        int(path.parent.name.split("-")[1]) for path in place.glob("checkpoints/checkpoint-*/trainer_state.json")
    )


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_training_stops_with_a_checkpoint_and_continues(number: signal.Signals, server: Forks, home: Path) -> None:
    run = server.root / f"run-{number}"
    words = ["run", home / "recipe.yml", "--run", run, "--until", "merge"]
    child = server.start(*words)
    place = run / "stages/01-law/experts/base"
    until(lambda: any(place.glob("checkpoints/checkpoint-20/trainer_state.json")))
    os.kill(child, number)
    assert server.wait() == CODES[number], server.log.read_text()
    said = server.log.read_text()
    assert "Traceback" not in said
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    again = f"contmerge run {home / 'recipe.yml'} --run {run} --until merge"
    assert last_line(said) == f"Stopped by {name}. Finished work is kept; continue with: {again}"
    assert not (place / "train.json").exists()
    step = newest(place)
    assert step % 20, "it did not wait for the next checkpoint"
    assert server.run(*words) == 0, server.log.read_text()
    assert json.loads((place / "train.json").read_text())["steps"] == 150
    first = next(line for line in server.log.read_text().splitlines() if " step " in line)
    assert int(first.split()[1].split("/")[0]) > step  # it did not begin anew


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_stops_and_leaves_the_state_unchanged(number: signal.Signals, home: Path, tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "large", seed=0, hidden=768, layers=8)
    expert = perturbed(base, tmp_path / "first", seed=1, size=0.01)
    state = MergeState.create(tmp_path / "state", base=base, rule="opcm").add(expert)
    other = perturbed(base, tmp_path / "other", seed=2, size=0.01)
    before = outcome(state.folder)
    command = [sys.executable, "-m", "hf_contmerge.commands.main", "merge", "add", str(state.folder), str(other)]
    background = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # ignores it, and so would this
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, **background) as process:
        until(lambda: (state.folder / "running-2").exists() or process.poll() is not None)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == CODES[number], said
    assert "Traceback" not in said
    assert f"continue with: contmerge merge add {state.folder}" in last_line(said)
    assert outcome(state.folder) == before
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert [e.stage for e in state.log().experts] == ["first", "other"]


@pytest.mark.slow
@pytest.mark.parametrize("both", [True, False])
def test_two_ranks_stop_with_one_checkpoint(both: bool, home: Path, tmp_path: Path) -> None:
    """A launcher signals all ranks; one is enough in training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script, out = ROOT / "hf_contmerge" / "train.py", tmp_path / "run"
    words = [sys.executable, str(script), str(home / "recipe.yml"), "--run", str(out), "--until", "merge"]

    def start(rank: int) -> subprocess.Popen[str]:
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        log = (tmp_path / f"{rank}.log").open("w")
        return subprocess.Popen(words, stderr=log, stdout=log, text=True, env={**os.environ, **world})

    ranks = [start(rank) for rank in range(2)]
    place = tmp_path / "run/stages/01-law/experts/base"
    until(lambda: any(place.glob("checkpoints/checkpoint-20/trainer_state.json")), 300)
    for process in ranks if both else ranks[1:]:
        process.send_signal(signal.SIGTERM)
    codes, said = [p.wait(timeout=120) for p in ranks], [(tmp_path / f"{r}.log").read_text() for r in range(2)]
    assert codes == [143, 143], "".join(said)
    assert "Traceback" not in "".join(said)
    assert last_line(said[0]).endswith("continue with: the same command")
    assert newest(place)
