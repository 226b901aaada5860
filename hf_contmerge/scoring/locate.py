"""Locates the folders of a named model and of its base.

A model on this machine is located without loading torch or the Hub's library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import optional_json
from hf_contmerge.runtime.foreign import expanded
from hf_contmerge.scoring._formats import hub_offline, hub_snapshot
from hf_contmerge.scoring.cache import JsonStore, digest, remembered, stamp


@dataclass(frozen=True)
class ModelFolders:
    """Folder of a model, or of an adapter and its base."""

    folder: Path
    base: Path | None = None

    @property
    def whole(self) -> Path:
        """Folder of the whole model, with config and tokenizer."""
        return self.base if self.base and (self.folder / "adapter_config.json").is_file() else self.folder

    @property
    def is_adapter(self) -> bool:
        return self.whole != self.folder


def local_folders(name: str, base: str | None, store: JsonStore) -> ModelFolders | None:
    """Locate a model and its base without weights or network.

    Args:
        name: a folder, a .gguf file, a Hub id or the quickstart's model.
        base: an adapter's base model; by default the one named in the adapter.
        store: memory of converted .gguf files.

    Returns:
        None if a model has to be fetched or converted.

    Raises:
        ModelError: `base` is given for a whole model, or missing for an adapter.
    """
    return _located(name, base, lambda model: _local_folder(model, store))


def fetched_folders(name: str, base: str | None, store: JsonStore) -> ModelFolders:
    """Locate a model and its base; fetch or convert them if needed.

    Raises as `local_folders` and `resolve_model`.
    """
    model = _located(name, base, lambda model: _fetched_folder(model, store))
    assert model
    return model


def _located(name: str, base: str | None, find: Callable[[str], Path | None]) -> ModelFolders | None:
    folder = find(name)
    if folder is None:
        return None
    base = _base_name(name, folder, base)
    base_folder = find(base) if base else None
    return None if base and base_folder is None else ModelFolders(folder, base_folder)


def _base_name(name: str, folder: Path, base: str | None) -> str | None:
    """Return an adapter's base model, or None."""
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        if base:
            raise ModelError(f"{name} is a whole model; --base is for adapters only. Remove --base.")
        return None
    base = base or optional_json(settings).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{name} is an adapter without a base model in its config. Give --base.")
    return base


def _local_folder(name: str, store: JsonStore) -> Path | None:
    path = expanded(name)
    if name.startswith("quickstart:"):
        from hf_contmerge.runtime.quickstart import quickstart_model

        path = quickstart_model()
    if path.suffix == ".gguf" and path.is_file():
        converted = store.find(digest(["converted", stamp([path])[0]]))
        return Path(converted) if converted and Path(converted).is_dir() else None
    if path.is_dir():
        return path if any(path.glob("*.safetensors")) else None
    # Online, the Hub may have a newer revision.
    return hub_snapshot(name) if hub_offline() and name.count("/") == 1 else None


def _fetched_folder(name: str, store: JsonStore) -> Path:
    from hf_contmerge.models.folder import model_path, resolve_model

    path, folder = model_path(name), resolve_model(name, adapters=True)
    if path.suffix == ".gguf" and path.is_file():
        remembered(store, "converted", [path], lambda: str(folder))
    return folder
