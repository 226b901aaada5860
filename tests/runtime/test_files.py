"""Folders that appear whole: one process at a time makes one; links to a place for it are followed."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys.models import write_jsonl

from hf_contmerge import MergeState
from hf_contmerge.commands.main import main
from hf_contmerge.errors import RunError
from hf_contmerge.loop.functions import finetune_stage
from hf_contmerge.runtime.files import FOREVER, alone, new_folder
from hf_contmerge.runtime.ranks import OneRank


def at_once(count: int, do: Callable[[], Any]) -> list[str]:
    """Call a function in several threads; return the errors."""
    barrier, errors = threading.Barrier(count), list[str]()

    def call() -> None:
        barrier.wait(20)
        try:
            do()
        except RunError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_exports_into_one_folder_at_once(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=base_folder, rule="magmax").add(*expert_folders)
    for attempt in range(4):
        out = tmp_path / f"out-{attempt}"
        errors = at_once(3, lambda out=out: state.export(out))
        refused = (f"{out} is in use by another process.", f"{out} exists and is not empty.")
        assert len(errors) <= 2
        assert all(error.startswith(refused) for error in errors), errors
        assert main(["verify", str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"state", *(f"out-{i}" for i in range(4))}


def test_two_states_in_one_folder_at_once(base_folder: Path, tmp_path: Path) -> None:
    rules = iter(("magmax", "opcm"))
    errors = at_once(2, lambda: MergeState.create(tmp_path / "state", base=base_folder, rule=next(rules)))
    assert len(errors) == 1


def test_two_experts_in_one_folder(base_folder: Path, tmp_path: Path) -> None:
    """Training with other settings removes unfinished work, but not that of a live process."""
    data = write_jsonl(tmp_path / "alone.jsonl", [{"text": f"the quick brown fox {i}"} for i in range(8)])
    with alone(tmp_path / "expert"), pytest.raises(RunError, match=r"expert is in use by another process"):
        finetune_stage(base_folder, data, tmp_path / "expert", max_steps=1, max_length=32)


def test_whoever_waits_comes_next(tmp_path: Path) -> None:
    """The lock's file is removed under those who wait for it."""
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        with alone(tmp_path / "out", wait=FOREVER):
            inside += 1
            most = max(most, inside)
            inside -= 1

    assert at_once(6, enter) == []
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_a_crashed_process_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").touch()
    with new_folder(tmp_path / "out", OneRank()) as scratch:
        (scratch / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_another_disk_is_followed(there: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "large-disk" / "model", tmp_path / "link"
    if there:
        target.mkdir(parents=True)
    link.symlink_to(target)
    with new_folder(link, OneRank()) as scratch:
        (scratch / "file").touch()
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["file"]


def test_a_link_to_a_file_or_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(RunError, match="link exists and is not empty"), new_folder(tmp_path / "link", OneRank()):
        pass
    with pytest.raises(RunError, match="circle links to itself"), new_folder(tmp_path / "circle", OneRank()):
        pass
    assert (tmp_path / "notes").read_text() == "mine"
