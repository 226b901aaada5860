"""Runs that continue a published merge: `contmerge run RECIPE --from NAME`."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.hub_server import Hub, hub_server, reach
from toys.models import perturbed, toy_llama, write_jsonl

from hf_contmerge import score_stage
from hf_contmerge.commands.main import main
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.scores import load_scores
from hf_contmerge.runtime.records import read_record, write_record

REPO = "me/two"
Contmerge = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("published")
    base = toy_llama(home / "base", seed=0)
    for seed, name in enumerate("abc", 1):
        perturbed(base, home / name, seed=seed, size=0.01)
    perturbed(base, home / "other", seed=9, size=0.01)
    return home


def recipe(home: Path, stages: str, **more: Any) -> Path:
    """Write a recipe of given experts."""
    fields = {"name": stages, "base_model": str(home / "base"), "merge": ["opcm"], **more}
    fields["stages"] = [{"name": name, "expert": str(home / name)} for name in stages]
    file = home / f"{stages}-{len(more)}.yml"
    file.write_text(yaml.safe_dump(fields))
    return file


@pytest.fixture(scope="module")
def made(home: Path) -> Path:
    """The run of the first team."""
    assert main(["run", str(recipe(home, "ab")), "--run", str(home / "runs" / "ab"), "--until", "merge"]) == 0
    return home / "runs" / "ab"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as hub:
        reach(hub, monkeypatch)
        yield hub


@pytest.fixture
def contmerge(capsys: pytest.CaptureFixture[str]) -> Contmerge:
    def run(*words: object) -> tuple[int, str]:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.err if code else said.out

    return run


@pytest.fixture
def published(hub: Hub, made: Path, contmerge: Contmerge) -> Hub:
    assert contmerge("push", made, "--repo-id", REPO, "--with-state")[0] == 0
    return hub


def continued(contmerge: Contmerge, file: Path, out: Path, name: str = REPO) -> tuple[int, str]:
    return contmerge("run", file, "--from", name, "--run", out, "--until", "merge")


def merged(folder: Path) -> Path:
    run = Run.load(folder)
    return run.merged(len(run.recipe.stages), run.recipe.merge[0]).model


def test_another_team_appends_to_a_published_merge(
    published: Hub, home: Path, tmp_path: Path, contmerge: Contmerge
) -> None:
    """The result is that of one run over all stages, bit by bit, and can be continued in its turn."""
    code, said = continued(contmerge, recipe(home, "c"), tmp_path / "c")
    assert code == 0, said
    assert contmerge("run", recipe(home, "abc"), "--run", tmp_path / "abc", "--until", "merge")[0] == 0
    assert weights_sha256(merged(tmp_path / "c")) == weights_sha256(merged(tmp_path / "abc"))

    published.requests.clear()
    assert continued(contmerge, recipe(home, "c"), tmp_path / "c")[0] == 0  # again: nothing is left to do or to fetch
    assert not published.requests
    assert "files are as recorded" in contmerge("verify", tmp_path / "c")[1]

    assert contmerge("push", tmp_path / "c", "--repo-id", "me/three", "--with-state")[0] == 0
    words = [w for name in ("base", *"abc") for w in ("--parent", f"{name}={home / name}")]
    code, said = contmerge("verify", "me/three", *words)
    assert code == 0, said
    assert "the same weights" in said
    state = json.loads(published.files("me/three")["state/state.json"])
    assert [e["stage"] for e in state["experts"]] == ["a", "b", "c"]
    card = published.files("me/three")["README.md"].decode()
    assert f"Continues `{REPO}`, a published merge of it with **a**, **b**." in card
    for name, data in published.files("me/three").items():
        assert str(home).encode() not in data, name
        assert str(tmp_path).encode() not in data, name


def test_the_state_is_not_fetched_with_the_model(published: Hub) -> None:
    folder = resolve_model(REPO)
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "state").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"merge": ["magmax"]}, "was merged by opcm"),
        ({"merge": [{"rule": "opcm", "parameters": {"alpha": 0.9}}]}, "A state is continued by its own rule"),
        ({"merge": ["opcm", "average"]}, "cannot have 2 merge entries"),
        ({"guard": {"max_forgetting": 0.1}, "evaluate": {"general_tasks": ["piqa"]}}, "cannot have guard"),
        ({"base_model": "other"}, "has other weights. Name that base"),
    ],
)
def test_what_needs_the_experts_is_refused(
    published: Hub, home: Path, tmp_path: Path, contmerge: Contmerge, more: dict[str, Any], said: str
) -> None:
    if "base_model" in more:
        more = {"base_model": str(home / more["base_model"])}
    code, error = continued(contmerge, recipe(home, "c", **more), tmp_path / "c")
    assert code == 2
    assert said in error


def test_a_stage_of_the_same_name_and_an_expert_of_the_same_weights_are_refused(
    published: Hub, home: Path, tmp_path: Path, contmerge: Contmerge
) -> None:
    code, error = continued(contmerge, recipe(home, "b"), tmp_path / "b")
    assert (code, f"{REPO} has a stage b already" in error) == (2, True)
    twin = Path(shutil.copytree(home / "a", home / "d", dirs_exist_ok=True))
    code, error = continued(contmerge, recipe(home, "d"), tmp_path / "d")
    assert code == 2
    assert "same weights" in error, twin


def test_a_merge_without_a_state_is_refused(
    hub: Hub, made: Path, home: Path, tmp_path: Path, contmerge: Contmerge
) -> None:
    assert contmerge("push", made, "--repo-id", REPO)[0] == 0
    code, error = continued(contmerge, recipe(home, "c"), tmp_path / "c")
    assert code == 2
    assert "has no merge state to continue. Its owner adds one by `contmerge push --with-state`" in error
    assert continued(contmerge, recipe(home, "c"), tmp_path / "x", "me/nothing")[0] == 2


@pytest.mark.parametrize(
    "file",
    [
        "state/running-1/model.safetensors",
        pytest.param("state/state.json", marks=pytest.mark.slow),
        pytest.param("model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_merge_is_not_continued(
    published: Hub, home: Path, tmp_path: Path, contmerge: Contmerge, file: str
) -> None:
    """On the Hub, and in the run's own copy."""
    files = published.repos[REPO].commits[-1].files
    whole, data = files[file], bytearray(published.read(files[file]))
    data[-9] ^= 1
    files[file] = published.store(bytes(data), lfs=file.endswith(".safetensors"))
    code, error = continued(contmerge, recipe(home, "c"), tmp_path / "c")
    assert code == 2
    assert "damaged" in error or "changed" in error
    files[file] = whole
    shutil.rmtree(published.folder.parent / "cache")
    assert continued(contmerge, recipe(home, "c"), tmp_path / "c")[0] == 0  # the same command, once it is whole
    for copy in (tmp_path / "c").glob("stages/*/merges/*/merge.json"):
        copy.unlink()
    copy = tmp_path / "c" / "from" / file
    copy.unlink()
    copy.write_bytes(bytes(data))
    code, error = continued(contmerge, recipe(home, "c"), tmp_path / "c")
    assert code == 2
    assert "fetched anew" in error or "damaged" in error


def test_a_forged_state_is_one_sentence(published: Hub, home: Path, tmp_path: Path, contmerge: Contmerge) -> None:
    """Seals that fit, and fields that do not."""
    folder = tmp_path / "copy"
    for name, data in published.files(REPO).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert continued(contmerge, recipe(home, "c"), tmp_path / "whole", str(folder))[0] == 0  # a folder will do
    file = folder / "state" / "state.json"
    state = read_record(file, "")
    for number, forged in enumerate([
        {"running": "../.."}, {"running": "running-7"}, {"running": None}, {"running_norm": float("nan")},
        {"experts": state["experts"][:1]}, {"experts": [{**e, "stage": "../x"} for e in state["experts"]]},
        {"experts": [{**e, "norm": 10**300} for e in state["experts"]]}, {"rule": "nothing"}, {"rule": "os.system"},
        {"parameters": {"alpha": 1e308}}, {"base": "\x1b[2J"}, {"running_files": {"../../../etc/passwd": "0"}},
    ]):  # fmt: skip
        write_record(file, {**state, **forged})
        code, error = continued(contmerge, recipe(home, "c"), tmp_path / f"forged-{number}", str(folder))
        assert code in (0, 2), forged
        assert "Traceback" not in error, forged
        assert code == 0 or error.count("\n") == 1, error
    (folder / "state" / "link.safetensors").symlink_to("/etc/passwd")
    code, error = continued(contmerge, recipe(home, "c"), tmp_path / "linked", str(folder))
    assert (code, "outside" in error) == (2, True)


@pytest.mark.slow
def test_row_0_is_the_published_model(published: Hub, home: Path, tmp_path: Path, contmerge: Contmerge) -> None:
    """What was lost is counted from the published merge on."""
    texts = write_jsonl(home / "pub-texts.jsonl", [{"text": f"the quick brown fox {i} jumps"} for i in range(4)])
    task = {"name": "prose", "kind": "perplexity", "dataset": str(texts)}
    file = recipe(home, "c", evaluate={"general_tasks": [task], "batch_size": 4})
    code, said = contmerge("run", file, "--from", REPO, "--run", tmp_path / "c")
    assert code == 0, said
    run = Run.load(tmp_path / "c")
    here = score_stage(tmp_path / "c" / "from", [task], batch_size=4)["prose"]
    assert load_scores(run.base)["prose"].gains == here.gains
    card = contmerge("push", tmp_path / "c", "--repo-id", "me/c")
    assert card[0] == 0
    assert f"| published merge {REPO} |" in published.files("me/c")["README.md"].decode()
