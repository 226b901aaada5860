"""A seeded sample of `make fuzz`, and the inputs of all findings so far."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz import fuzz
from fuzz.fuzz import Mutator, inputs_of, run
from fuzz.targets import TARGETS, Place, Target, make_home

TEXT = st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


def slow_if(target: Target) -> tuple[pytest.MarkDecorator, ...]:
    """Return the mark of a target that takes seconds: lm-eval builds whole tasks."""
    return (pytest.mark.slow,) if target.name == "task" else ()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("fuzz") / "home")


@pytest.fixture
def place(target: Target, home: Path, tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "place"
    yield Place.of(target, home, folder)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def apart(home: Path) -> Iterator[None]:
    """Hold back what libraries say of thousands of inputs."""
    with fuzz.apart(home / "cache"):
        yield


@pytest.mark.parametrize("target", [pytest.param(t, marks=slow_if(t), id=t.name) for t in TARGETS])
def test_hostile_inputs_are_accepted_or_refused(target: Target, place: Place, home: Path) -> None:
    """Mutations of what lies in the corpus, values of any kind, and any bytes."""
    inputs = inputs_of(target, home)

    @settings(
        max_examples=target.examples, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**32), VALUES, st.binary(max_size=100))
    def sample(seed: int, value: object, data: bytes) -> None:
        dice = random.Random(seed)
        mutator = Mutator(dice, [value])
        changed = mutator.mutated(dice.choice(inputs), dice.choice(inputs), target.form)
        for each in (changed, data)[: 1 + (seed % 4 == 0)]:
            end = run(target, place, each)
            assert not end.finding, f"{end.finding}\n{end.detail}\n{fuzz.write_regression(target, each)}"

    sample()


REGRESSIONS = [(t, file) for t in TARGETS for file in sorted((fuzz.REGRESSIONS / t.name).glob("*"))]


@pytest.mark.parametrize(
    ("target", "file"), [pytest.param(t, f, marks=slow_if(t), id=f"{t.name} {f.name}") for t, f in REGRESSIONS]
)
def test_findings_are_fixed(target: Target, file: Path, place: Place) -> None:
    end = run(target, place, file.read_bytes())
    assert not end.finding, f"{end.finding}\n{end.detail}"


RECIPE = "name: n\nbase_model: b\nmerge: [average]\nstages: [{name: a, dataset: a.jsonl}]\n"
STUDY = "name: s\nrecipe: {name: n, base_model: b, merge: [average], stages: [{name: a, expert: e}, " + (
    ", ".join(f"{{name: s{i}, expert: e}}" for i in range(12)) + "]}\n"
)
LARGE = {
    "unknown fields": ("recipe", RECIPE + "".join(f"f{i}: 1\n" for i in range(90_000))),
    "values": ("recipe", f"{RECIPE}train: {{x: [{'a,' * 190_000}]}}"),
    "equal names": ("recipe", RECIPE + f"plugins: [{','.join(f'{i}.py' for i in range(90_000))}, 0.py]"),
    "beginnings of tokens": ("recipe", f"{RECIPE}train: {{x: {'sk-' * 300_000}}}"),
    "words of tokens": ("recipe", f"{RECIPE}train: {{x: {'-eyJ' * 200_000}}}"),
    "all orders": ("study", STUDY + "orders: all\n"),
    "many orders": ("study", STUDY + "orders: 100000000\n"),
    "many settings": ("study", f"{STUDY}vary: {{{', '.join(f'x{i}: [1, 2, 3, 4, 5, 6, 7]' for i in range(20))}}}\n"),
    "columns": ("csv", ",".join(f"c{i}" for i in range(200_000)) + ",c9\n"),
    "keys": ("jsonl", "{" + ",".join(f'"k{i}": 1' for i in range(100_000)) + ',"k99999": 2}\n'),
    "an open quote": ("csv", "a\n" + '"' * 2_000_000),
    "brackets": ("jsonl", "[\n" * 200_000),
}
"""Inputs whose time could grow with the square of their size, or faster."""


@pytest.mark.slow
@pytest.mark.parametrize("what", LARGE)
def test_large_inputs_end_in_time(what: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 5.0)
    name, text = LARGE[what]
    target = next(t for t in TARGETS if t.name == name)
    end = run(target, Place.of(target, home, tmp_path / "place"), text.encode())
    assert not end.finding, end.finding


def endless(_place: Place) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("kind", "does"),
    [
        ("KeyError", lambda place: {}["x"]),
        ("Slow", endless),
        ("reached out", lambda place: (place.folder.parent / "outside").write_text("x")),
        ("reached out", lambda place: __import__("os").system("true")),
        ("GiB", lambda place: bytearray(fuzz.MEMORY + 2**28)),
    ],
    ids=["traceback", "hang", "outside", "process", "memory"],
)
def test_faults_are_seen(kind: str, does: object, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "Slow":
        monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "MEMORY", 2**28)
    target = Target("faulty", "text", "f.txt", does, lambda _: [b"x"])  # type: ignore[arg-type]
    assert kind in run(target, Place.of(target, home, tmp_path / "place"), b"x").finding


def test_equal_seeds_make_equal_inputs(home: Path) -> None:
    for target in TARGETS:
        inputs = inputs_of(target, home)
        made = [
            [m.mutated(inputs[0], inputs[-1], target.form) for _ in range(5)]
            for m in (Mutator(random.Random(7)), Mutator(random.Random(7)))
        ]
        assert made[0] == made[1]
        assert len(set(made[0])) > 2


def test_a_campaign_grows_its_corpus_and_counts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(fuzz, "REGRESSIONS", tmp_path / "regressions")
    target = next(t for t in TARGETS if t.name == "csv")
    campaign = fuzz.Campaign(target, Place.of(target, home, tmp_path / "place"), random.Random(0), target.seeds(home))
    campaign.turn(1)
    assert campaign.executions > 20
    assert len(campaign.inputs) > len(target.seeds(home))
    assert len(list((tmp_path / "corpus" / "csv").iterdir())) == campaign.kept
    assert not campaign.findings
