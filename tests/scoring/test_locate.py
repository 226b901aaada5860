"""Folders of named models, located without weights or network."""

import os
import shutil
import time
from pathlib import Path

import pytest
from toys.loras import lora

from hf_contmerge.errors import ModelError
from hf_contmerge.scoring.cache import JsonStore, remembered
from hf_contmerge.scoring.locate import ModelFolders, fetched_folders, local_folders

NOWHERE = JsonStore(None)


@pytest.fixture
def store(tmp_path: Path) -> JsonStore:
    return JsonStore(tmp_path / "store")


def test_folder(base_folder: Path, tmp_path: Path) -> None:
    assert local_folders(str(base_folder), None, NOWHERE) == ModelFolders(base_folder)
    assert fetched_folders(str(base_folder), None, NOWHERE) == ModelFolders(base_folder)
    assert local_folders(str(tmp_path), None, NOWHERE) is None
    assert local_folders(str(tmp_path / "nothing"), None, NOWHERE) is None


def test_adapter(base_folder: Path, tmp_path: Path) -> None:
    """An adapter names its base, unless another one is given. A base that is elsewhere has to be fetched."""
    adapter, copy = lora(base_folder, tmp_path / "adapter", seed=1), shutil.copytree(base_folder, tmp_path / "copy")
    for locate in (local_folders, fetched_folders):
        named, given = locate(str(adapter), None, NOWHERE), locate(str(adapter), str(copy), NOWHERE)
        assert named == ModelFolders(adapter, base_folder)
        assert given == ModelFolders(adapter, Path(copy))
        assert (given.whole, given.is_adapter) == (Path(copy), True)
    assert local_folders(str(adapter), "owner/elsewhere", NOWHERE) is None
    with pytest.raises(ModelError, match="is a whole model; --base is for adapters only"):
        local_folders(str(base_folder), str(copy), NOWHERE)


def test_hub(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached snapshot counts offline only: online, the Hub may have a newer one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--model/snapshots/main"
    shutil.copytree(base_folder, folder)
    assert local_folders("owner/model", None, NOWHERE) == ModelFolders(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert local_folders("owner/model", None, NOWHERE) is None


def test_converted_file(base_folder: Path, store: JsonStore, tmp_path: Path) -> None:
    """A conversion is remembered until the .gguf file changes."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    os.utime(path, (time.time() - 60,) * 2)
    assert local_folders(str(path), None, store) is None
    remembered(store, "converted", [path], lambda: str(base_folder))
    assert local_folders(str(path), None, store) == ModelFolders(base_folder)
    path.write_bytes(b"GGUG")
    assert local_folders(str(path), None, store) is None
