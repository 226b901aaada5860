"""A run that is killed anywhere and started again ends as if nothing had happened.

Each command runs in a process of its own, which kills itself (SIGKILL) just before a chosen change to the run folder.
test_disk.py has all other faults of a disk.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.faulty_disk import Fault
from toys.forks import Forks, forks, outcome
from toys.models import toy_llama, write_jsonl

# A constant rate: with one that falls to zero, a step too many after resuming would not show in the weights.
LIGHTEST = {
    "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1.0e-2, "lr_scheduler_type": "constant",
}  # fmt: skip


@dataclass
class Runner:
    """Runs `contmerge run` to its end or its death."""

    server: Forks
    recipe: Path
    unbroken: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    @property
    def words(self) -> list[object]:
        return ["run", self.recipe, "--run", self.server.root / "run"]

    def begin(self) -> None:
        """Remove the run."""
        shutil.rmtree(self.server.root, ignore_errors=True)
        shutil.rmtree(f"{self.server.root}.cache", ignore_errors=True)

    def run(self, *, die_before: str = "", count: int = 0) -> int:
        """Return the exit code; -9 if it was killed before the change numbered `count` that matches the pattern."""
        return self.server.run(*self.words, fault=Fault("kill", count, die_before))

    def run_for(self, seconds: float) -> int:
        """Kill the run after a time, unless it has ended."""
        child, end = self.server.start(*self.words), time.monotonic() + seconds
        while Path(f"/proc/{child}").exists() and time.monotonic() < end:
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return self.server.wait()

    def log(self) -> str:
        return self.server.log.read_text()

    def assert_unbroken(self) -> None:
        """The same command ends in the same bytes."""
        assert self.run() == 0, self.log()
        found = outcome(self.server.root)
        assert found.keys() == self.unbroken.keys()
        assert {name: what for name, what in found.items() if what != self.unbroken[name]} == {}


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
    with forks(home / "root") as server:
        runner, begun = Runner(server, path), time.monotonic()
        assert runner.run() == 0, runner.log()
        runner.seconds = time.monotonic() - begun
        runner.unbroken, runner.steps = outcome(server.root), len(server.steps())
        yield runner


KILLS = "kills of a training run, survived"

# In the order in which a run comes to them.
MOMENTS = {
    "the recipe is put in place": r"rename run/\.recipe\.yml",
    "the first expert is half written": r"open run/stages/01-a/experts/base/\.expert/generation_config\.json",
    "a checkpoint is half written": r"open .*02-b/experts/previous/checkpoints/checkpoint-4/trainer_state\.json",
    "the expert is in place, its record is not": r"open run/stages/02-b/experts/base/\.train\.json",
    "its checkpoints are being removed": r"rmdir run/stages/02-b/experts/base/checkpoints$",
    "a merge is half written": r"open run/stages/02-b/merges/magmax/\.merged/config\.json",
    "the merge is in place, its record is not": r"open run/stages/02-b/merges/magmax/\.merge\.yml",
    "the merge's record is put in place": r"rename run/stages/02-b/merges/magmax/\.merge\.json",
    "the old running state is half pruned": r"rmdir run/stages/01-a/merges/magmax/running",
    "running is in place, merged is not": r"rename run/stages/02-b/merges/opcm/\.merged",
    "what each document scored is put in place": r"rename run/stages/02-b/merges/magmax/\.score\.parquet",
    "a score is put in place": r"rename run/stages/02-b/merges/magmax/\.score\.json",
    "the report is half written": r"open .*summary\.json",
    "the run's record is put in place": r"rename run/\.report\.json",
}


def test_killed_at_every_moment_in_turn(runner: Runner, figure: Callable[..., None]) -> None:
    runner.begin()
    for moment, change in MOMENTS.items():
        assert runner.run(die_before=change, count=1) == -signal.SIGKILL, f"{moment}: {runner.log()}"
    runner.assert_unbroken()
    figure(KILLS, len(MOMENTS), len(MOMENTS))


@pytest.mark.slow  # one after the other in one run, they are in the test above
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_when(moment: str, runner: Runner, figure: Callable[..., None]) -> None:
    runner.begin()
    assert runner.run(die_before=MOMENTS[moment], count=1) == -signal.SIGKILL
    runner.assert_unbroken()
    figure(KILLS, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("share", [(i + 0.5) / 30 for i in range(30)])
def test_killed_after_a_share_of_all_changes(share: float, runner: Runner, figure: Callable[..., None]) -> None:
    runner.begin()
    assert runner.run(count=1 + int(share * runner.steps)) == -signal.SIGKILL
    runner.assert_unbroken()
    figure(KILLS, 1, 1)


def shares(seed: int, count: int) -> list[float]:
    draw = random.Random(seed)
    return [round(draw.random(), 3) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("share", [*shares(0, 1), *shares(1, 30)])
def test_killed_at_a_random_time(share: float, runner: Runner, figure: Callable[..., None]) -> None:
    """Between two changes to the disk as well as within one. A machine that is suddenly faster ends the run first."""
    runner.begin()
    assert runner.run_for(share * runner.seconds) in (-signal.SIGKILL, 0)
    runner.assert_unbroken()
    figure(KILLS, 1, 1)


@pytest.mark.slow
def test_killed_again_and_again(runner: Runner) -> None:
    """A tenth of all changes to a life; each life leaves the run further on."""
    runner.begin()
    for _ in range(60):
        if runner.run(count=runner.steps // 10) == 0:
            break
    runner.assert_unbroken()
