"""`contmerge report` and `push --dry-run` on run folders of strangers: success, or exit code 2 with one sentence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys.models import toy_llama
from toys.reports import NASTY, make_run, with_models

from hf_contmerge.commands.main import main
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import Place
from hf_contmerge.run.scores import load_scores, write_scores
from hf_contmerge.runtime.records import read_record, write_record

SECRET = "the neighbour's secret"
MERGE = "stages/02-s2/merges/magmax"
Do = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("forged")
    base = toy_llama(home / "base", seed=0)
    publish = {"repo_id": "me/x", "merge": "magmax"}
    return with_models(make_run(home / "run", stages=2, merge=["magmax"], publish=publish), base, base).folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "model.safetensors").write_text(SECRET)
    return Path(shutil.copytree(whole, tmp_path / "run"))


def record(file: str, **fields: Any) -> Do:
    """Return a forger of fields in a record, with a seal that fits."""
    return lambda run: write_record(run / file, {**read_record(run / file, ""), **fields})


def merge(**fields: Any) -> Do:
    return record(f"{MERGE}/merge.json", **fields)


def scores(change: Callable[[Any], Any]) -> Do:
    """Return a forger of scores whose digests fit."""
    from dataclasses import replace

    def forge(run: Path) -> None:
        place = Place(run / MERGE)
        forged = {name: replace(s, **change(s)) for name, s in load_scores(place).items()}
        place.finish("score", {"tasks": write_scores(place, forged)})

    return forge


def link(at: str, to: str) -> Do:
    def forge(run: Path) -> None:
        place = run / at
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.symlink_to(to if to.startswith("/") else run.parent / to)

    return forge


def nested(run: Path) -> None:
    (run / MERGE / "merge.json").write_text("[" * 100_000)


TRAIN, SCORE = "stages/02-s2/experts/previous/train.json", f"{MERGE}/score.json"
ZEROS = "0" * 32
FORGED: dict[str, Do] = {
    "types": merge(norms={"experts": "x", "running": None}),
    "parameters": merge(parameters=[1, 2]),
    "huge numbers": merge(scale=10**90, norms={"experts": [10**90, 1e308], "running": -1e308}),
    "no numbers": merge(scale=float("nan"), norms={"experts": [float("inf")] * 2, "running": 0}),
    "fewer norms": merge(norms={"experts": [1.0], "running": 1.0}),
    "fewer digests": merge(expert_sha256=[]),
    "other stages": merge(folded=[{"stage": 9, "replayed": False}, {"stage": -1, "replayed": True}]),
    "stage 0": merge(folded=[{"stage": 0, "replayed": False}] * 2),
    "other vectors": merge(geometry={"sampled": 1.0, "lengths": [], "cosines": [[]], "conflicts": []}),
    "owners": merge(ownership={"all": {}, "layer 0": {NASTY: 1e308}}),
    "other owners": merge(ownership={"all": {"s1": 1.0}, "layer 0": {"s2": 1.0}}),
    "rule": merge(rule="../../x", reference="javascript:alert(1)"),
    "versions": merge(versions={NASTY: NASTY}),
    "paths": merge(files={"merged/../../../../../../secret/model.safetensors": ZEROS}),
    "absolute paths": merge(files={"/etc/passwd": ZEROS, "merged//etc/passwd": ZEROS}),
    "no files": merge(files={}),
    "published": merge(published=[{"stage": NASTY, "model": "/x", "sha256": "", "norm": 1.0, "kind": ""}]),
    "given": record(TRAIN, given="/etc", given_files={"passwd": ZEROS}),
    "sources": record(TRAIN, sources=[{"path": 3}], mixed=["x"], log={"a": 1}),
    "mixed": record(TRAIN, mixed=[{"source": NASTY}]),
    "seconds": record(TRAIN, seconds=1e308, peak_memory_bytes=-1e308),
    "vector": record(TRAIN, vector={"layers": {NASTY: {"cosine": 1e300, "norm_ratio": -1}}}),
    "settings": record(TRAIN, settings={"strategy": [NASTY], "rewards": {NASTY: {}}}),
    "base": record("inputs.json", base={"sha256": "", "stamp": "", "files": {"../../secret": "0"}}),
    "folder": record("inputs.json", folder="/", tasks={"../../../secret/model.safetensors": ZEROS}),
    "no tasks": record(SCORE, tasks={}),
    "score": record(SCORE, tasks={"quiz": {"block": "accuracy"}}),
    "no measurement": scores(lambda s: {"gains": (float("nan"),) * len(s.gains)}),
    "infinite": scores(lambda s: {"gains": (float("-inf"),) * len(s.gains), "value": float("inf"), "utility": -1e308}),
    "no weight": scores(lambda s: {"weights": (0.0,) * len(s.gains)}),
    "negative weight": scores(lambda s: {"weights": (-1.0, *s.weights[1:])}),
    "one document": scores(lambda s: {"gains": s.gains[:1], "weights": s.weights[:1]}),
    "another block": scores(lambda s: {"block": "accuracy" if s.block == "perplexity" else "perplexity"}),
    "details": scores(lambda s: {"details": {"chance": "x", "shown": []}}),
    "chances": scores(lambda s: {"details": {"chance": -5.0, "chance_variance": 1e308}}),
    "metric": scores(lambda s: {"metric": NASTY}),
    "nested": nested,
    "binary": lambda run: (run / MERGE / "merge.json").write_bytes(os.urandom(5000)),
    "empty": lambda run: (run / SCORE).write_bytes(b""),
    "folder in place of a record": lambda run: ((run / SCORE).unlink(), (run / SCORE).mkdir()),
    "pipe": lambda run: os.mkfifo(run / MERGE / "merged" / "tokenizer.model"),
    "linked model": link(f"{MERGE}/merged", "secret"),
    "linked weights": link(f"{MERGE}/merged/model.safetensors", "secret/model.safetensors"),
    "linked config": link(f"{MERGE}/merged/config.json", "/etc/passwd"),
    "linked state": link(f"{MERGE}/running", "secret"),
    "linked stage": link("stages/01-s1", "secret"),
    "linked record": link(f"{MERGE}/merge.json", "secret/model.safetensors"),
    "linked report": link("report", "secret"),
    "config": lambda run: (run / MERGE / "merged" / "config.json").write_text("{" * 5000),
    "pickle": lambda run: (run / MERGE / "merged" / "pytorch_model.bin").write_bytes(b"x"),
    "name": lambda run: (run / MERGE / "merged" / "a\x1b[2Jb.json").write_text("{}"),
}  # fmt: skip
CASES = [pytest.param(name, marks=pytest.mark.slow if i % 9 else ()) for i, name in enumerate(FORGED)]
COMMANDS: dict[str, tuple[str, ...]] = {
    "report": ("report", "--json"),
    "push": ("push", "--dry-run", "--json", "--with-state", "--with-documents"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "forged", [pytest.param(n, marks=pytest.mark.slow if i % 9 else ()) for i, n in enumerate(FORGED)]
)
def test_a_forged_run_is_presented_or_refused(
    run: Path, forged: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FORGED[forged](run)
    name, *words = COMMANDS[command]
    code = main([name, str(run), *words])
    out, err = capsys.readouterr()
    assert code in (0, 2)
    assert code == 0 or (err.startswith("Error: ") and err.count("\n") == 1 and len(err) < 2000), err
    assert "Traceback" not in err
    assert "\x1b" not in out + err
    assert SECRET not in out + err
    assert (run.parent / "secret" / "model.safetensors").read_text() == SECRET
    assert len(list((run.parent / "secret").iterdir())) == 1
    if code == 0 and command == "report":
        page = (run / "report" / "index.html").read_text()
        assert "<script>alert" not in page
        assert SECRET not in page
    if code == 0 and command == "push":
        listed = json.loads(out)
        assert {file for r in listed[-1]["revisions"] for file in r["files"]}.isdisjoint({"pytorch_model.bin"})


def test_the_whole_run_is_presented(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, *words in COMMANDS.values():
        assert main([name, str(run), *words]) == 0, capsys.readouterr().err
    assert Run.load(run).report.folder == run
