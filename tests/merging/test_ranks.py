"""Merging on several ranks: the same bytes as on one, an error that ends all, hosts that share whole files."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import yaml
from safetensors.torch import load_file, save_file
from toys.loras import lora
from toys.models import perturbed, toy_llama
from toys.teams import Team

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ContmergeError, ModelError
from hf_contmerge.merging import _fold as merge_fold
from hf_contmerge.merging.adapter import export_adapter
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew, Job
from hf_contmerge.runtime.files import FolderLock
from hf_contmerge.runtime.ranks import OneRank, Ranks, ranks_per_host

T = TypeVar("T")
BIN = Path(sys.executable).parent
RULES = ("magmax", "opcm", "ties")
"""One pass with owners; two passes; four tensors of state for each weight. Adapters make a fourth case, in factors."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base wide enough for factors to pay, two experts and two adapters of it."""
    folder = tmp_path_factory.mktemp("models")
    base = toy_llama(folder / "base", seed=0, hidden=64)
    found = {"base": base}
    for i in (1, 2):
        found[f"e{i}"] = perturbed(base, folder / f"e{i}", seed=i, size=0.02)
        found[f"a{i}"] = lora(base, folder / f"a{i}", seed=i)
    return found


# Who does what


def jobs(costs: Sequence[float], groups: int = 1) -> list[Job]:
    return [Job(f"w{i}", cost, 0, 0, i % groups) for i, cost in enumerate(costs)]


COSTS = {
    "as many as ranks": [3.0, 1.0, 2.0, 5.0],
    "one large one": [100.0, *[1.0] * 30],
    "falling": [1 / (i + 1) for i in range(50)],
    "equal": [1.0] * 24,
    "none": [],
    "free ones": [0.0] * 7,
}


@dataclass
class Placed(Ranks):
    """A rank that says where it is; nothing is asked of the others."""

    rank: int
    size: int
    per_host: int

    def gather(self, value: T) -> list[T]:
        raise NotImplementedError


def shares(work: Sequence[Job], size: int, per_host: int) -> list[list[Job]]:
    return [Crew(ranks=Placed(rank, size, per_host)).mine(work) for rank in range(size)]


@pytest.mark.parametrize("case", COSTS)
@pytest.mark.parametrize(("size", "per_host"), [(1, 1), (2, 2), (4, 4), (4, 2), (6, 2), (3, 1)])
def test_every_job_is_done_exactly_once(case: str, size: int, per_host: int) -> None:
    work = jobs(COSTS[case], groups=5)
    found = shares(work, size, per_host)
    assert Counter(job.name for part in found for job in part) == Counter(job.name for job in work)
    assert found == shares(work, size, per_host)
    for part in found:
        assert [job.cost for job in part] == sorted((job.cost for job in part), reverse=True)


@pytest.mark.parametrize("case", COSTS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_host_cost_alike(case: str, size: int) -> None:
    """The heaviest rank has at most the fair share, and one job more (Graham's bound)."""
    totals = [sum(job.cost for job in part) for part in shares(jobs(COSTS[case], groups=5), size, size)]
    assert max(totals) <= sum(totals) / size + max(COSTS[case], default=0.0)


def test_equal_jobs_are_dealt_out_evenly() -> None:
    assert [len(part) for part in shares(jobs([1.0] * 24), 4, 4)] == [6, 6, 6, 6]


@pytest.mark.parametrize("groups", [1, 2, 3, 7])
def test_hosts_share_whole_files(groups: int) -> None:
    work = jobs(COSTS["falling"], groups=groups)
    hosts: dict[int, set[int]] = {}
    for rank, part in enumerate(shares(work, 6, 2)):
        for job in part:
            hosts.setdefault(job.group, set()).add(rank // 2)
    assert set(hosts) == set(range(groups))
    assert all(len(found) == 1 for found in hosts.values())


@pytest.mark.parametrize(
    ("counts", "found"), [([2, 2, 2, 2], 2), ([4] * 4, 4), ([1], 1), ([2, 2, 1], 1), ([2, 2, 2], 1)]
)
def test_hosts_of_different_sizes_count_ranks_as_hosts(counts: list[int], found: int) -> None:
    assert ranks_per_host(counts) == found


# Ranks as threads


TEAMS = [(2, 2), (4, 4), (4, 2), (3, 1)]
"""Ranks, and how many of them share a host."""


def done(results: Sequence[T | Exception]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


def test_what_all_do_and_what_the_first_does() -> None:
    def work(crew: Crew) -> tuple[int, int]:
        ranks = crew.ranks
        return ranks.all(lambda: ranks.rank), ranks.first(lambda: 7 + ranks.rank)

    assert Team(3, 3).run(work) == [(0, 7), (1, 7), (2, 7)]


@pytest.mark.parametrize("bad", [0, 2])
def test_what_fails_on_one_rank_fails_on_all(bad: int) -> None:
    def work(crew: Crew) -> None:
        def fail() -> threading.Lock:
            if crew.ranks.rank == bad:
                raise ModelError("this one is broken")
            return threading.Lock()  # what cannot be sent, and need not be

        crew.ranks.all(fail)

    assert [str(e) for e in Team(3, 3).run(work)] == ["this one is broken"] * 3


def test_the_first_of_each_host_goes_ahead() -> None:
    """Two ranks of a host that fetched the same model at once would get in each other's way."""
    order: list[int] = []

    def fetch(crew: Crew) -> int:
        return crew.ranks.local_main_first(lambda: order.append(crew.ranks.rank) or crew.ranks.rank)

    assert Team(4, 2).run(fetch) == [0, 1, 2, 3]
    assert sorted(order[:2]) == [0, 2]
    assert OneRank().local_main_first(lambda: 5) == 5


def test_a_job_that_fails_on_one_rank_ends_all() -> None:
    def work(crew: Crew) -> dict[str, str]:
        def one(job: Job) -> str:
            if job.name == "w3":
                raise ModelError("w3 is broken")
            return job.name

        return crew.run(jobs([1.0] * 8), one, what="working")

    assert [str(e) for e in Team(2, 2).run(work)] == ["w3 is broken"] * 2


def test_all_ranks_have_the_results_of_all() -> None:
    found = Team(4, 2).run(lambda crew: crew.run(jobs([1.0] * 9, groups=3), lambda job: job.name, what="working"))
    assert found == [{f"w{i}": f"w{i}" for i in range(9)}] * 4


# What they write


@dataclass
class Seen:
    """A progress bar that notes which rank works on what."""

    hosts: dict[str, dict[str, set[int]]] = field(default_factory=dict)

    def of(self, rank: int, per_host: int) -> Callable[..., Any]:
        @contextmanager
        def bar(work: Sequence[Job], what: str) -> Iterator[Callable[[Job], None]]:
            for job in work:
                self.hosts.setdefault(what, {}).setdefault(job.name, set()).add(rank // per_host)
            yield lambda _job: None

        return bar


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of each file of a folder, without the times that a log notes."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name in ("state.json", "merge.json"):
            values = {**json.loads(data), "sha256": ""}
            for expert in values["experts"]:
                del expert["seconds"], expert["added"]
            data = json.dumps(values).encode()
        if path.name == "exports.jsonl":  # names the models by their absolute paths
            data = re.sub(rb'"(model|sha256)": "[^"]*"', b"", data)
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def history(out: Path, models: dict[str, Path], case: str, crew: Crew) -> None:
    """Start a state, add to it, export it, drop a stage."""
    kind, rule = ("a", "opcm") if case == "adapters" else ("e", case)
    state = MergeState.create(out / "state", base=models["base"], rule=rule, crew=crew)
    state.add(models[f"{kind}1"], crew=crew).add(models[f"{kind}2"], crew=crew)
    state.export(out / "merged", dtype="bfloat16", shard_size=60_000, crew=crew)
    state.drop(f"{kind}1", crew=crew)


@pytest.mark.parametrize("case", [*RULES, "adapters"])
def test_hosts_give_the_same_bytes_and_write_no_file_of_each_other(
    case: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_fold, "STATE_SHARD", 150_000)  # so that a toy's state fills several files
    history(tmp_path / "one", models, case, Crew(workers=1))
    wanted = contents(tmp_path / "one")
    assert sum(name.startswith("merged/model-") for name in wanted) >= 4
    for size, per_host in TEAMS:
        out, seen = tmp_path / f"{size}-{per_host}", Seen()

        def work(crew: Crew, out: Path = out, seen: Seen = seen) -> None:
            crew = Crew(ranks=crew.ranks, workers=2, bar=seen.of(crew.ranks.rank, crew.ranks.per_host))
            history(out, models, case, crew)

        done(Team(size, per_host).run(work))
        assert contents(out) == wanted
        if size > per_host:
            assert_files_of_one_host_each(out / "merged", seen.hosts["writing"])
            state = next((out / "state").glob("running-*"))
            for folder in (state, state / "owners"):
                assert_files_of_one_host_each(folder, seen.hosts["merging"])


def assert_files_of_one_host_each(folder: Path, hosts: dict[str, set[int]]) -> None:
    writers = [set().union(*(hosts[n] for n in Weights(file).names)) for file in folder.glob("*.safetensors")]
    assert all(len(found) == 1 for found in writers)
    assert len(writers) < 2 or len(set().union(*writers)) > 1, "no second host took part"


# Errors


def damaged(models: dict[str, Path], out: Path, name: str = "model.norm.weight") -> Path:
    """Write an expert with a value that is not finite."""
    broken = perturbed(models["base"], out, seed=9, size=0.02)
    values = load_file(broken / "model.safetensors")
    values[name].view(-1)[0] = float("nan")
    save_file(values, broken / "model.safetensors", metadata={"format": "pt"})
    return broken


BAD = {
    "not finite": "has 1 values that are NaN or infinite",
    "twin": "an expert must not be folded twice",
    "not there": "There is no model at",
    "unknown stage": "Unknown stage 'x'",
    "in use": "is in use by another process",
    "disk": "Merging writes",
}


@pytest.mark.parametrize("case", BAD)
def test_all_ranks_end_with_the_same_error_and_leave_the_state_alone(
    case: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="magmax").add(models["e1"])
    before = contents(state.folder)
    expert: Any = models["e2"]
    action: Callable[..., Any] = state.add
    if case == "not finite":
        expert = damaged(models, tmp_path / "broken")
    elif case == "twin":
        expert = models["e1"]
    elif case == "not there":
        expert = tmp_path / "nowhere"
    elif case == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    elif case == "unknown stage":
        expert, action = "x", state.drop
    with FolderLock(state.folder) if case == "in use" else nullcontext():
        found = Team(2, 2).run(lambda crew: action(expert, crew=crew))
    assert len({(type(e), str(e)) for e in found}) == 1
    assert isinstance(found[0], ContmergeError)
    assert BAD[case] in str(found[0])
    assert contents(state.folder) == before, "what was begun must be gone, and all else be there"


@pytest.mark.parametrize("as_adapter", [False, True])
def test_an_export_that_fails_leaves_nothing(as_adapter: bool, models: dict[str, Path], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="magmax")
    out = tmp_path / "out"

    def export(crew: Crew) -> Any:
        return export_adapter(state, out, rank=3, crew=crew) if as_adapter else state.export(out, crew=crew)

    assert {str(e) for e in Team(2, 2).run(export)} == {
        f"{state.folder} holds no expert yet. Add one: contmerge merge add {state.folder} EXPERT"
    }
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_what_another_process_added_meanwhile_is_kept(models: dict[str, Path], tmp_path: Path) -> None:
    """The log counts as it is once the state is ours: what came between must not be cleared away."""
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="magmax")
    same = MergeState.load(state.folder)
    state.add(models["e1"])
    same.add(models["e2"])
    assert [e.stage for e in same.log().experts] == ["e1", "e2"]


# Ranks as processes

SCRIPT = """
import json, sys
from hf_contmerge.commands.main import main
for words in json.load(open(sys.argv[1])):
    code = main(words)
    if code:
        sys.exit(code)
"""


def commands(out: Path, models: dict[str, Path]) -> list[list[str]]:
    """Return what is to be done, as words of the command line."""
    found: list[list[str]] = []
    for case in (*RULES, "adapters"):
        kind, rule = ("a", "opcm") if case == "adapters" else ("e", case)
        state, experts = str(out / case), [str(models[f"{kind}{i}"]) for i in (1, 2)]
        recipe = out / f"{case}.yml"
        words = {"merge_method": rule, "base_model": str(models["base"]), "models": [{"model": e} for e in experts]}
        recipe.write_text(yaml.safe_dump({**words, "dtype": "float32"}))
        found += [
            ["merge", "init", state, "--base", str(models["base"]), "--rule", rule],
            ["merge", "add", state, experts[0]],
            ["merge", "add", state, experts[1], "--as", "second"],
            ["merge", "export", state, f"{state}-merged", "--dtype", "bfloat16", "--shard-size", "60KB"],
            ["merge", "from-recipe", str(recipe), f"{state}-recipe"],
        ]
        if case == "adapters":
            found.append(["merge", "export", state, f"{state}-adapter", "--as-adapter"])
        if case == "magmax":
            found.append(["merge", "owners", state])
        found.append(["merge", "drop", state, f"{kind}1"])
    return found


def torchrun(*words: str | Path, ranks: int, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    start = [BIN / "torchrun", "--standalone", "--nproc-per-node", str(ranks), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(start, capture_output=True, text=True, env=environment, timeout=timeout)


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes of all commands."""
    out = tmp_path_factory.mktemp("alone")
    for words in commands(out, models):
        assert main(words) == 0, words
    return contents(out)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_torchrun_gives_the_bytes_of_one_process(
    ranks: int, models: dict[str, Path], alone: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "commands.json").write_text(json.dumps(commands(out, models)))
    process = torchrun(tmp_path / "script.py", tmp_path / "commands.json", ranks=ranks)
    assert process.returncode == 0, process.stderr
    assert contents(out) == alone
    assert process.stdout.count("is ready. Next:") == len(RULES) + 1


@pytest.mark.slow
def test_the_command_under_torchrun(models: dict[str, Path], tmp_path: Path) -> None:
    """The real command ends well, ends all ranks within seconds where it cannot, and says why in one line."""
    contmerge = ["--no-python", BIN / "contmerge", "merge"]
    state = MergeState.create(tmp_path / "state", base=models["base"], rule="opcm").add(models["e1"])
    process = torchrun(*contmerge, "add", state.folder, models["e2"], ranks=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("scale ") == 1
    before = {p: p.read_bytes() for p in state.folder.rglob("*") if p.is_file()}
    start = time.monotonic()
    broken = damaged(models, tmp_path / "broken")
    process = torchrun(*contmerge, "add", state.folder, broken, ranks=2)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    lines = [line for line in process.stderr.splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    assert f"model.norm.weight in {broken} has 1 values that are NaN or infinite" in lines[0]
    assert {p: p.read_bytes() for p in before} == before
