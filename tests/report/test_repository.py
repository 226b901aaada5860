"""Pushes against a Hub with faults: what was there stays whole, and the same push again completes it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toys.hub_server import READ_TOKEN, WRITE_TOKEN, Hub, hub_server, reach

from hf_contmerge.commands.main import main
from hf_contmerge.errors import RecipeError, ResourceError
from hf_contmerge.report._repository import MAIN, Publication, Revision, send

REPO = "me/law"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process pushes to, without waits between its tries."""
    with hub_server(tmp_path / "hub") as hub:
        reach(hub, monkeypatch)
        yield hub


def publication(tmp_path: Path, *, model: str = "new") -> Publication:
    """Return two revisions with weights of some size."""
    revisions = []
    for branch in ("01-a", MAIN):
        weights = tmp_path / f"{branch}-{model}.safetensors"
        weights.write_bytes(f"{branch} {model} ".encode() * 5000)
        files = {"model.safetensors": weights, "README.md": b"# law\n", "config.json": f'"{model}"'.encode()}
        revisions.append(Revision(branch, f"{model} {branch}", files))
    return Publication(REPO, True, revisions)


def held(hub: Hub, branch: str) -> dict[str, bytes]:
    return {name: data for name, data in hub.files(REPO, branch).items() if name != ".gitattributes"}


def wanted(pushed: Publication, number: int) -> dict[str, bytes]:
    files = pushed.revisions[number].files
    return {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in files.items()}


@pytest.mark.parametrize(
    ("address", "order"),
    [
        ("/api/repos/create", 500), ("/api/repos/create", "drop"), ("/branch/", 500), ("/revision/main", 503),
        ("/preupload/", "drop"), ("/objects/batch", 500), ("/lfs/", 500), ("/lfs/", "half"), ("/lfs/", "drop"),
        ("/commit/01-a", 500), ("/commit/main", 500), ("/commit/main", "half"), ("/commit/main", "drop"),
        ("/commit/main", "late"), ("/tree/", 500), ("/lfs/", 403), ("/commit/main", 401),
    ],
)  # fmt: skip
def test_a_fault_leaves_the_last_push_whole(hub: Hub, tmp_path: Path, address: str, order: Any) -> None:
    old, new = publication(tmp_path, model="old"), publication(tmp_path)
    send(old)
    hub.fail[address] = order
    with pytest.raises(ResourceError) as error:
        send(new)
    assert "\n" not in str(error.value)
    assert WRITE_TOKEN not in str(error.value)
    for number, branch in enumerate(("01-a", MAIN)):
        assert held(hub, branch) in (wanted(old, number), wanted(new, number))  # never a part of one
    if order != "late" and address != "/tree/":
        assert held(hub, MAIN) == wanted(old, 1)
    hub.fail.clear()
    there = {blob.name for blob in hub.folder.iterdir()}
    hub.requests.clear()
    send(new)
    assert [held(hub, branch) for branch in ("01-a", MAIN)] == [wanted(new, 0), wanted(new, 1)]
    again = [r.removeprefix("PUT /lfs/") for r in hub.requests if r.startswith("PUT")]
    assert not there.intersection(again)  # what had arrived is not sent twice


def test_a_short_fault_is_survived(hub: Hub, tmp_path: Path) -> None:
    hub.fail["/lfs/"] = [500, "drop"]
    hub.fail["/objects/batch"] = [503]
    send(publication(tmp_path))
    assert held(hub, MAIN) == wanted(publication(tmp_path), 1)


def test_another_commit_meanwhile_is_kept(hub: Hub, tmp_path: Path) -> None:
    send(publication(tmp_path, model="old"))
    theirs = {**hub.repos[REPO].commits[-1].files, "notes.md": hub.store(b"by another")}
    hub.before["/commit/main"] = lambda: hub.commit(REPO, "theirs", theirs)
    new = publication(tmp_path)
    with pytest.raises(ResourceError, match=r"changed during the push: another commit came between \(412\)"):
        send(new)
    assert hub.repos[REPO].commits[-1].message == "theirs"
    send(new)
    assert held(hub, MAIN) == {**wanted(new, 1), "notes.md": b"by another"}  # files of theirs stay


@pytest.mark.parametrize(("token", "word"), [("", "401"), ("hf_" + "expired123" * 4, "401"), (READ_TOKEN, "403")])
def test_a_refused_token_writes_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, word: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ResourceError, match=word) as error:
        send(publication(tmp_path))
    assert not hub.repos
    assert not token or token not in str(error.value)


def test_a_private_push_leaves_a_public_repository(hub: Hub, tmp_path: Path) -> None:
    send(publication(tmp_path, model="old"))
    hub.repos[REPO].private = False
    with pytest.raises(RecipeError, match="is public, but this push is private"):
        send(publication(tmp_path))
    assert len(hub.repos[REPO].commits) == 2


def test_files_of_an_earlier_push_go(hub: Hub, tmp_path: Path) -> None:
    """Another sharding, a state or a picture that is no longer there would be read on."""
    old = publication(tmp_path, model="old")
    stale = {"model-00001-of-00002.safetensors": b"x", "state/state.json": b"{}", "forgetting.png": b"y"}
    send(Publication(REPO, True, [Revision(MAIN, "old", {**old.revisions[1].files, **stale})]))
    hub.repos[REPO].commits[-1].files["mine.md"] = hub.store(b"the owner's")
    new = publication(tmp_path)
    send(new)
    assert held(hub, MAIN) == {**wanted(new, 1), "mine.md": b"the owner's"}


Push = Callable[..., tuple[int, str, str]]


@pytest.fixture
def contmerge(capsys: pytest.CaptureFixture[str]) -> Push:
    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A state of a model and an adapter, its export, and a trained expert's folder."""
    from toys.loras import lora
    from toys.models import perturbed, toy_llama

    from hf_contmerge.merging.state import MergeState

    home = tmp_path / "alice"
    base = toy_llama(home / "base", seed=0)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    perturbed(base, home / "law", seed=1, size=0.01)
    lora(base, home / "code", seed=2)
    state = MergeState.create(home / "state", base=base, rule="magmax").add(home / "law", home / "code")
    state.export(home / "merged")
    return home


def dry(contmerge: Push, *words: object) -> list[dict[str, Any]]:
    code, out, err = contmerge("push", *words, "--dry-run", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_a_state_is_pushed_with_its_model(hub: Hub, made: Path, contmerge: Push, tmp_path: Path) -> None:
    (listed,) = dry(contmerge, made / "state", "--repo-id", REPO)
    assert not hub.requests  # a dry run asks nobody
    code, out, err = contmerge("push", made / "state", "--repo-id", REPO)
    assert code == 0, err
    assert out.splitlines()[-1].startswith(f"{hub.url}/{REPO}/commit/")
    files = held(hub, MAIN)
    assert {name: len(data) for name, data in files.items()} == listed["revisions"][0]["files"]
    assert {"state/state.json", "merge.json", "model.safetensors", "README.md"} <= files.keys()
    running = [name for name in files if name.startswith("state/running-1/")]
    assert running
    for name, data in files.items():
        assert str(tmp_path).encode() not in data, name
        assert b"alice" not in data, name
    assert f"contmerge run recipe.yml --from {REPO}" in files["README.md"].decode()


def test_a_state_without_an_export_says_so(made: Path, contmerge: Push) -> None:
    from hf_contmerge.merging.state import MergeState

    MergeState(made / "state").drop("code")
    code, _, err = contmerge("push", made / "state", "--repo-id", REPO, "--dry-run")
    assert code == 2
    assert f"contmerge merge export {made / 'state'} merged" in err


def test_a_written_model_is_proved_from_the_hub(hub: Hub, made: Path, contmerge: Push) -> None:
    assert contmerge("push", made / "merged", "--repo-id", REPO)[0] == 0
    assert "state/state.json" not in held(hub, MAIN)
    words = [w for name in ("base", "law", "code") for w in ("--parent", f"{name}={made / name}")]
    code, out, err = contmerge("verify", REPO, *words)
    assert code == 0, err
    assert "the same weights" in out


def test_a_changed_model_is_not_pushed(made: Path, contmerge: Push) -> None:
    config = made / "merged" / "config.json"
    config.write_text(config.read_text() + " ")
    for what in ("merged", "state"):
        code, out, err = contmerge("push", made / what, "--repo-id", REPO, "--dry-run")
        assert (code, out) == (2, "")
        assert "config.json changed or went missing after it was written: it is not published" in err


def test_a_folder_without_a_record_is_not_pushed(made: Path, contmerge: Push) -> None:
    code, _, err = contmerge("push", made / "law", "--repo-id", REPO, "--dry-run")
    assert code == 2
    assert "nothing says what its files should be" in err
    (made / "merged" / "LICENSE").write_text("mine")
    code, _, err = contmerge("push", made / "merged", "--repo-id", REPO, "--dry-run")
    assert code == 2
    assert "holds LICENSE, which its record does not list" in err


def test_licences_are_proposed_from_the_parents(made: Path, contmerge: Push) -> None:
    """Only if all parents have the same one; a choice comes first."""
    words = ("push", made / "merged", "--repo-id", REPO, "--dry-run")
    assert "Licence: none proposed: the parents' licences are not all known and equal (base: mit, law: not" in (
        contmerge(*words)[1].replace("\n", " ")
    )
    for name in ("law", "code"):
        (made / name / "README.md").write_text("---\nlicense: mit\n---\n")
    lineage = json.loads((made / "merged" / "merge.json").read_text())
    assert [e["model"] for e in lineage["experts"]] == [str(made / "law"), str(made / "code")]
    assert "Licence: mit, proposed as that of all parents" in contmerge(*words)[1]
    assert "Licence: apache-2.0, as chosen" in contmerge(*words, "--license", "apache-2.0")[1]
