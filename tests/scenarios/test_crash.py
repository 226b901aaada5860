"""A run that is killed anywhere and started again ends as if nothing had happened.

Each command runs in a process of its own, which kills itself (SIGKILL) just before a chosen change to the run folder:
an audit hook sees every file that Python opens for writing, renames or removes. To spare the ten seconds in which the
libraries load, the processes are forked from one that has loaded them.
"""

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.models import toy_llama, write_jsonl

# Reads orders from stdin, one JSON a line: argv, the run folder, which change to die before, or after how many seconds,
# where to log.
FORKS = r"""
import json, os, re, signal, sys, time
import lm_eval.models.huggingface, trl.trainer.sft_trainer, transformers.models.llama.modeling_llama
import hf_contmerge.loop.plan.checks, hf_contmerge.report.write
from hf_contmerge.commands.main import main

def die_before(folder, pattern, count, changes):
    def hook(event, args):
        nonlocal count
        if event == "open":
            if not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"):
            return
        path = args[1] if event == "os.symlink" else args[0]
        if not isinstance(path, (str, os.PathLike)):
            return
        path = os.fspath(path)
        if os.path.isabs(path) and not path.startswith(folder + "/"):
            return
        change = event.removeprefix("os.") + " " + path.removeprefix(folder + "/").replace(f".{os.getpid()}", "")
        changes.append(change)
        if pattern is not None and re.search(pattern, change):
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ["HF_CONTMERGE_CACHE"] = order["folder"] + ".cache"  # its own: no run takes another one's scores
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1); os.dup2(log, 2)
        changes = []
        die_before(order["folder"], order["pattern"], order["count"], changes)
        code = 1
        try:
            code = main(order["argv"])
            with open(order["log"] + ".changes", "w") as file:
                json.dump(changes, file)
        finally:
            sys.stderr.flush()
            os._exit(code)
    end, ended = time.monotonic() + order["seconds"], 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

# A constant rate: with one that falls to zero, a step too many after resuming would not show in the weights.
LIGHTEST = {
    "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1.0e-2, "lr_scheduler_type": "constant",
}  # fmt: skip


class Runner:
    """Runs `contmerge run` to its end or its death."""

    def __init__(self, process: subprocess.Popen[str], recipe: Path) -> None:
        self._process, self.recipe = process, recipe

    def run(self, folder: Path, *, die_before: str | None = None, count: int = 1, seconds: float = 600) -> int:
        """Return the exit code; -9 if it was killed before the change numbered `count` that matches the pattern.

        Or after so many seconds.
        """
        order = {
            "argv": ["run", str(self.recipe), "--run", str(folder)], "folder": str(folder), "pattern": die_before,
            "count": count, "log": f"{folder}.log", "seconds": seconds,
        }  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    home = tmp_path_factory.mktemp("crash")
    base = toy_llama(home / "base", seed=0)
    words, draw = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"], random.Random(0)
    for name in ("a", "b"):
        write_jsonl(home / f"{name}.jsonl", [{"text": " ".join(draw.choices(words, k=40))} for _ in range(24)])
    recipe = {
        "name": "crash",
        "base_model": str(base),
        "stages": [
            {"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 4}} for n in ("a", "b")
        ],
        "train": {**LIGHTEST, "max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        "merge": ["magmax", "opcm"],
    }  # fmt: skip
    path = home / "crash.yml"
    path.write_text(yaml.safe_dump(recipe))
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Runner(process, path)
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="module")
def unbroken(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    begun = time.monotonic()
    assert runner.run(folder) == 0, Path(f"{folder}.log").read_text()
    Path(f"{folder}.seconds").write_text(str(time.monotonic() - begun))
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run leaves behind: the bytes of its files, and its records without times and memory."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in RECORDS:
            found[name] = _timeless({**json.loads(path.read_text()), "sha256": ""}, folder)
        elif path.is_file() and path.parent.name != "model" and path.stem not in OF_THE_PLACE:
            data = re.sub(rb"\n# sha256: \w+\n$", b"\n", path.read_bytes())
            found[name] = hashlib.sha256(data.replace(str(folder).encode(), b"RUN")).hexdigest()
        else:
            found[name] = None  # it must be there, and nothing else
    return found


RECORDS = ("train.json", "merge.json", "score.json", "report.json")
OF_THE_PLACE = ("costs", "digests", "inputs")
"""Files that tell of this folder or this time."""


def _timeless(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {
            k: _timeless(v, folder)
            for k, v in value.items()
            if k not in ("seconds", "train_seconds", "peak_memory_bytes", "finished")
        }
    if isinstance(value, list):
        return [_timeless(v, folder) for v in value]
    return value.replace(str(folder), "RUN") if isinstance(value, str) else value


# In the order in which a run comes to them.
MOMENTS = {
    "the recipe is put in place": r"rename \.recipe\.yml",
    "the first expert is half written": r"open stages/01-a/experts/base/\.expert/generation_config\.json",
    "a checkpoint is half written": r"open stages/02-b/experts/previous/checkpoints/checkpoint-4/trainer_state\.json",
    "the expert is in place, its record is not": r"open stages/02-b/experts/base/\.train\.json",
    "its checkpoints are being removed": r"rmdir stages/02-b/experts/base/checkpoints$",
    "a merge is half written": r"open stages/02-b/merges/magmax/\.merged/config\.json",
    "the merge is in place, its record is not": r"open stages/02-b/merges/magmax/\.merge\.yml",
    "the merge's record is put in place": r"rename stages/02-b/merges/magmax/\.merge\.json",
    "the old running state is half pruned": r"rmdir stages/01-a/merges/magmax/running",
    "running is in place, merged is not": r"rename stages/02-b/merges/opcm/\.merged",
    "what each document scored is put in place": r"rename stages/02-b/merges/magmax/\.score\.parquet",
    "a score is put in place": r"rename stages/02-b/merges/magmax/\.score\.json",
    "the report is half written": r"open .*summary\.json",
    "the run's record is put in place": r"rename \.report\.json",
}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    assert {name: what for name, what in found.items() if what != wanted[name]} == {}


def killed_and_resumed(runner: Runner, folder: Path, die_before: str, count: int = 1) -> dict[str, Any]:
    """Return what a run leaves that was killed once, then started again."""
    assert runner.run(folder, die_before=die_before, count=count) == -signal.SIGKILL
    assert runner.run(folder) == 0, Path(f"{folder}.log").read_text()
    return outcome(folder)


def test_killed_at_every_moment_in_turn(runner: Runner, unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for moment, change in MOMENTS.items():
        assert runner.run(folder, die_before=change) == -signal.SIGKILL, (
            f"{moment}: {Path(f'{folder}.log').read_text()}"
        )
    assert runner.run(folder) == 0, Path(f"{folder}.log").read_text()
    assert_same(outcome(folder), outcome(unbroken))


@pytest.mark.slow  # one after the other in one run, they are in the test above
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_when(moment: str, runner: Runner, unbroken: Path, tmp_path: Path) -> None:
    assert_same(killed_and_resumed(runner, tmp_path / "run", MOMENTS[moment]), outcome(unbroken))


@pytest.mark.slow
@pytest.mark.parametrize("share", [(i + 0.5) / 30 for i in range(30)])
def test_killed_after_a_share_of_all_changes(share: float, runner: Runner, unbroken: Path, tmp_path: Path) -> None:
    changes = json.loads(Path(f"{unbroken}.log.changes").read_text())
    number = 1 + int(share * len(changes))
    assert_same(killed_and_resumed(runner, tmp_path / "run", ".", number), outcome(unbroken))


def shares(seed: int, count: int) -> list[float]:
    draw = random.Random(seed)
    return [round(draw.random(), 3) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("share", [*shares(0, 1), *shares(1, 30)])
def test_killed_at_a_random_time(share: float, runner: Runner, unbroken: Path, tmp_path: Path) -> None:
    """Between two changes to the disk as well as within one. A machine that is suddenly faster ends the run first."""
    folder, seconds = tmp_path / "run", float(Path(f"{unbroken}.seconds").read_text())
    assert runner.run(folder, seconds=share * seconds) in (-signal.SIGKILL, 0)
    assert runner.run(folder) == 0, Path(f"{folder}.log").read_text()
    assert_same(outcome(folder), outcome(unbroken))


@pytest.mark.slow
def test_killed_again_and_again(runner: Runner, unbroken: Path, tmp_path: Path) -> None:
    """Eighty changes to a life; each life leaves the run further on."""
    for _ in range(60):
        if runner.run(tmp_path / "run", die_before=".", count=80) == 0:
            break
    assert runner.run(tmp_path / "run") == 0
    assert_same(outcome(tmp_path / "run"), outcome(unbroken))
