"""Whatever a disk does to a command, nothing is lost: the same command then ends as if nothing had happened.

Each command meets, at each of its changes to the disk: a kill, a write that is torn in half, a refusal (full, quota,
input/output error, no permission), and a power cut that takes what was not flushed. After each, status, state and
models are valid; a refusal is one sentence and exit code 2; the same command ends in the same bytes. The default tests
draw a few of them; `-m slow` tries more for some minutes, and `make faults LONG=--long` all; it counts them.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EACCES, EDQUOT, EIO, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.faulty_disk import WRITES, Fault, after_power_cut, restore
from toys.forks import CACHE, Forks, forks, outcome
from toys.hub_server import WRITE_TOKEN, Hub, hub_server
from toys.models import perturbed, toy_llama, write_jsonl

from hf_contmerge import MergeState
from hf_contmerge.commands.main import main
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.weights import Weights, tensor_bytes, weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace
from hf_contmerge.run.scores import load_scores

REFUSALS = (ENOSPC, EDQUOT, EIO, EACCES)
CUTS = ("lost", "names", "mixed", "mixed")
SAID = {ENOSPC: "full", EDQUOT: "quota", EIO: "input/output", EACCES: "permission"}


Figure = Callable[[str, int, int], None]


@dataclass
class Case:
    """A command, what it starts from, and what must always hold."""

    words: list[object]
    start: Path
    check: Callable[[Path], None]
    environment: dict[str, str] = field(default_factory=dict)
    hub: Hub | None = None
    """Where it pushes to."""


class Bench:
    """Runs a case again and again in one folder."""

    def __init__(self, server: Forks, case: Case) -> None:
        self.server, self.case, self.root = server, case, server.root
        self.reset()
        assert self._run(Fault("record")) == 0, server.log.read_text()
        self.names = server.steps()
        self.journal = _journal(server.journal)
        case.check(self.root)
        self.unbroken = self.outcome()
        self._seen: set[str] = set()

    def _run(self, fault: Fault | None = None) -> int:
        return self.server.run(*self.case.words, fault=fault, **self.case.environment)

    def outcome(self) -> dict[str, Any]:
        return {**outcome(self.root), "hub": self.case.hub.files(REPO) if self.case.hub else None}

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(f"{self.root}.cache", ignore_errors=True)
        if self.case.hub:
            self.case.hub.repos.clear()
            for blob in self.case.hub.folder.iterdir():
                blob.unlink()
        shutil.copytree(self.case.start, self.root, symlinks=True)

    def again(self, what: str) -> None:
        """The same command ends in the same bytes."""
        try:
            self.case.check(self.root)
        except Exception as error:
            raise AssertionError(f"{what}: {error}") from error
        assert self._run() == 0, f"{what}: {self.server.log.read_text()}"
        found = self.outcome()
        assert found.keys() == self.unbroken.keys(), what
        assert {n: w for n, w in found.items() if w != self.unbroken[n]} == {}, what

    def kill(self, number: int) -> None:
        self.reset()
        what = f"killed before {number} {self.names[number - 1]}"
        assert self._run(Fault("kill", number)) == -signal.SIGKILL, f"{what}: {self.server.log.read_text()}"
        self.again(what)

    def kill_twice(self, first: int, second: int) -> None:
        self.reset()
        what = f"killed before {first} {self.names[first - 1]}, then before {second}"
        assert self._run(Fault("kill", first)) == -signal.SIGKILL, f"{what}: {self.server.log.read_text()}"
        assert self._run(Fault("kill", second)) in (-signal.SIGKILL, 0), f"{what}: {self.server.log.read_text()}"
        self.again(what)

    def tear(self, number: int) -> None:
        self.reset()
        what = f"killed in the middle of {number} {self.names[number - 1]}"
        assert self._run(Fault("tear", number)) == -signal.SIGKILL, f"{what}: {self.server.log.read_text()}"
        self.again(what)

    def refuse(self, number: int, error: int) -> None:
        self.reset()
        what = f"refused ({error}): {number} {self.names[number - 1]}"
        code, said = self._run(Fault("fail", number, number=error)), self.server.log.read_text()
        assert "Traceback" not in said, f"{what}: {said}"
        if code:
            errors = [line for line in said.splitlines() if line.startswith("Error")]
            assert (code, len(errors)) == (2, 1), f"{what}: {code} {said}"
            assert SAID[error] in errors[0].lower() or self.names[number - 1].startswith("send"), f"{what}: {said}"
            assert str(self.root) in errors[0] or self.names[number - 1].startswith("send"), f"{what}: {said}"
            assert re.search("again|rerun|name another", errors[0].lower()), f"{what}: {said}"
            if error in (ENOSPC, EDQUOT) and "/stages/" in errors[0]:
                assert "The unfinished phases need about " in errors[0], f"{what}: {said}"
        else:
            assert "Warning: " in said or self.outcome() == self.unbroken, f"{what}: {said}"
        self.again(what)

    def cut(self, number: int, how: str, draw: random.Random) -> bool:
        """Return False for a disk that was seen before."""
        image = after_power_cut(self.journal, number, how, draw)
        key = json.dumps(image, sort_keys=True)
        if key in self._seen:
            return False
        self._seen.add(key)
        shutil.rmtree(self.root, ignore_errors=True)
        restore(image, self.journal, self.root)
        step = self.journal.steps[number]
        self.again(f"power cut ({how}) before {number} {step.kind} {step.path}")
        return True


def _journal(path: Path) -> Any:
    import pickle

    return pickle.loads(path.read_bytes())


# What must hold at every moment


def check_run(root: Path) -> None:
    """Every record's outputs are there, as it says; the run can be looked at."""
    folder = root / "run"
    if not (folder / "recipe.yml").exists():
        return
    run = Run.load(folder)
    for _, place in run.places():
        if isinstance(place, ExpertPlace) and place.is_done("train"):
            assert expert_sha256(place.model) == place.record("train")["model_sha256"]
        if isinstance(place, MergePlace) and place.is_done("merge"):
            assert weights_sha256(place.model) == place.record("merge")["model_sha256"]
            words = yaml.safe_load(place.mergekit_recipe.read_text())
            assert all((place.folder / m["model"]).exists() for m in words["models"])
        if place.is_done("score"):
            assert load_scores(place)
    if run.is_complete():
        assert {"index.html", "summary.json"} <= {p.name for p in (folder / "report").iterdir()}
        json.loads((folder / "report/summary.json").read_text())
    assert main(["status", str(folder)]) == 0


def merged(state: MergeState) -> tuple[list[str], dict[str, bytes]]:
    """Return a state's experts and its running tensors."""
    running = state.running()
    weights = Weights(running) if running else None
    tensors = {n: bytes(tensor_bytes(weights.tensor(n))) for n in weights.names} if weights else {}
    return [e.stage for e in state.log().experts], tensors


def check_state(root: Path) -> None:
    folder = root / "state"
    if (folder / "state.json").exists():
        stages, tensors = merged(MergeState.load(folder))
        assert bool(stages) == bool(tensors)
    if (root / "out").exists():
        names = {path.name for path in (root / "out").iterdir()}
        assert not names or {"merge.json"} < names
        if "config.json" in names:
            assert weights_sha256(root / "out")


# The commands


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub_server(tmp_path_factory.mktemp("disk-hub") / "hub") as hub:
        yield hub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Forks]:
    root = tmp_path_factory.mktemp("disk") / "root"
    net = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE_TOKEN, "HF_HUB_DISABLE_XET": "1"}
    with forks(root, HF_HOME=str(root.with_name("hf")), **net) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("disk-home")
    base = toy_llama(home / "base", seed=0, hidden=16, layers=1)
    for number in (1, 2, 3):
        perturbed(base, home / f"e{number}", seed=number, size=0.01)
    draw, words = random.Random(0), ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    for name in ("a", "b"):
        write_jsonl(home / f"{name}.jsonl", [{"text": " ".join(draw.choices(words, k=40))} for _ in range(12)])
    train = {"per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1e-2, "max_steps": 2,
             "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    stages = [{"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 2}} for n in ("a", "b")]
    recipe = {
        "name": "disk",
        "publish": {"repo_id": REPO},
        "base_model": str(base),
        "stages": stages,
        "train": train,
        "merge": ["magmax"],
    }
    (home / "recipe.yml").write_text(yaml.safe_dump(recipe))
    for name in ("nothing", "state", "none"):
        (home / name).mkdir()
    state = MergeState.create(home / "state" / "state", base=base, rule="opcm")
    state.add(home / "e1", home / "e2")
    return home


@pytest.fixture(scope="module")
def finished(server: Forks, home: Path) -> Path:
    """Return a folder with a whole run."""
    shutil.rmtree(server.root, ignore_errors=True)
    assert server.run("run", home / "recipe.yml", "--run", server.root / "run") == 0, server.log.read_text()
    return shutil.copytree(server.root, home / "finished", symlinks=True)


def of_a_run(name: str, start: Path, root: Path, hub: Hub) -> Case:
    run, cache = root / "run", {"HF_CONTMERGE_CACHE": str(root / CACHE)}
    model = run / "stages/02-b/merges/magmax/merged"
    words: dict[str, list[object]] = {
        "score": ["score", model, "--run", run, "--json", root / "scores.json"],
        "report": ["report", run],
        "redo": ["redo", run, "score"],
        "push": ["push", run],
    }

    def check(root: Path) -> None:
        check_run(root)
        commits = hub.repos[REPO].commits if REPO in hub.repos else []
        assert all("model.safetensors" in commit.files for commit in commits[1:])

    return Case(words[name], start, check, cache, hub if name == "push" else None)


def case(name: str, home: Path, root: Path) -> Case:
    state, works = root / "state", ["--workers", "1"]
    words: dict[str, list[object]] = {
        "init": ["merge", "init", state, "--base", home / "base", "--rule", "opcm"],
        "add": ["merge", "add", state, home / "e3", *works],
        "drop": ["merge", "drop", state, "e1", *works],
        "export": ["merge", "export", state, root / "out", "--shard-size", "20KB", *works],
        "export adapter": ["merge", "export", state, root / "out", "--as-adapter", "--rank", "2", *works],
        "run": ["run", home / "recipe.yml", "--run", root / "run"],
    }
    start = home / ("nothing" if name in ("init", "run") else "state")
    return Case(words[name], start, check_run if name == "run" else check_state)


REPO = "me/disk"
OF_A_RUN = ("score", "report", "redo", "push")
MERGES = ("init", "add", "drop", "export", "export adapter")


def writes(bench: Bench) -> list[int]:
    return [i for i, name in enumerate(bench.names, 1) if name.startswith("write ")]


def refusable(bench: Bench, error: int) -> list[int]:
    kinds = {EIO: (*WRITES, "fsync", "rename", "unlink"), EACCES: ("open", "mkdir", "rename", "symlink")}
    named = [(i, name.partition(" ")[0]) for i, name in enumerate(bench.names, 1)]
    return [i for i, kind in named if kind in kinds.get(error, WRITES) or kind == "send"]


def walk(bench: Bench, name: str, most: int, figure: Figure, seconds: float = math.inf) -> None:
    """Try each kind of fault at `most` steps at most, drawn from all, and for an equal part of the seconds."""
    draw, images = random.Random(f"{name} {most}"), range(len(bench.journal.steps))
    steps = range(1, len(bench.names) + 1)
    pairs = [(draw.choice(steps), draw.choice(steps)) for _ in steps]
    tries = {
        "kills": [partial(bench.kill, n) for n in steps],
        "pairs of kills": [partial(bench.kill_twice, *pair) for pair in pairs],
        "torn writes": [partial(bench.tear, n) for n in writes(bench)],
        "refused writes": [partial(bench.refuse, n, error) for error in REFUSALS for n in refusable(bench, error)],
        "power cuts": [partial(bench.cut, n, how, draw) for how in CUTS for n in images],
    }
    for what, every in tries.items():
        end, survived = time.monotonic() + seconds / len(tries), 0
        for attempt in draw.sample(every, min(most, len(every))):
            survived += attempt() is not False
            if time.monotonic() > end:
                break
        figure(f"{what}, survived", survived, survived)


ALL = 10**6
SECONDS = float(os.environ.get("FAULTS_SECONDS", "100"))
"""How long a slow test tries faults; all of a run take hours."""


@pytest.mark.parametrize("name", MERGES)
def test_merges_survive_some_faults(name: str, server: Forks, home: Path, figure: Figure) -> None:
    walk(Bench(server, case(name, home, server.root)), name, 2, figure)


@pytest.mark.slow
def test_a_run_survives_some_faults(server: Forks, home: Path, figure: Figure) -> None:
    walk(Bench(server, case("run", home, server.root)), "run", 1, figure)


@pytest.mark.parametrize("name", ["push"])
def test_other_commands_survive_some_faults(name: str, server: Forks, finished: Path, hub: Hub, figure: Figure) -> None:
    walk(Bench(server, of_a_run(name, finished, server.root, hub)), name, 1, figure)


def test_an_error_in_the_report_does_not_end_the_run(server: Forks, home: Path, finished: Path) -> None:
    shutil.rmtree(server.root, ignore_errors=True)
    run = Run(shutil.copytree(finished, server.root, symlinks=True) / "run", Run.load(finished / "run").recipe)
    scores = run.merged(1, run.recipe.merge[0]).folder / "score.parquet"
    scores.write_bytes(scores.read_bytes()[:100])
    run.report.undo("report")
    assert server.run("run", home / "recipe.yml", "--run", run.folder) == 0, server.log.read_text()
    said = server.log.read_text()
    assert "Traceback" not in said
    assert re.search(r"Warning: the report was not written\. RunError: Cannot read .*score\.parquet", said)
    assert not run.is_complete()


@pytest.mark.slow
def test_two_reports_of_one_run_at_once(server: Forks, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "copy", symlinks=True) / "run"
    before = outcome(run)
    script = (
        "import sys; from hf_contmerge.commands.main import main; sys.exit(main(sys.argv[1:]) or main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "report", str(run)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=500)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert outcome(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_RUN)
def test_all_faults_of_other_commands(name: str, server: Forks, finished: Path, hub: Hub, figure: Figure) -> None:
    walk(Bench(server, of_a_run(name, finished, server.root, hub)), name, ALL, figure, SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MERGES, "run"])
def test_all_faults(name: str, server: Forks, home: Path, figure: Figure) -> None:
    walk(Bench(server, case(name, home, server.root)), name, ALL, figure, SECONDS)
