"""Digests of evaluation tasks, computed from files without lm-eval or torch.

A digest covers the task's YAML as lm-eval resolves it (includes, members of a group or tag), the Python files next to
it, and its data: local files by their bytes, Hub datasets by the commit in the cache of `datasets`. File locations do
not count. Tasks with parts outside these files have no digest.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.runtime.versions import version
from hf_contmerge.scoring._formats import (
    LOCAL_READERS,
    Listing,
    UnknownInputError,
    dataset_commit,
    list_tasks,
    read_task,
    task_code,
)
from hf_contmerge.scoring.cache import JsonStore, digest, file_sha256


@dataclass(frozen=True)
class TaskDigests:
    """The digests of tasks in given folders or of lm-eval's own."""

    listings: Sequence[Listing]
    """In order of precedence."""
    store: JsonStore

    @classmethod
    def open(cls, folders: Sequence[Path], store: JsonStore, own: Listing | None = None) -> TaskDigests:
        """Read the task files of some folders.

        Args:
            folders: folders of task YAML files; later ones take precedence.
            store: cache of file digests.
            own: lm-eval's own tasks; default: the remembered listing.
        """
        ours = [list_tasks(folder) for folder in reversed(folders) if folder.is_dir()]
        return cls([*ours, own or _own_listing(store) or Listing()], store)

    def sha256(self, name: str) -> str | None:
        """Return the digest of a task, group or tag; None if unknown."""
        try:
            return digest(["task", self._parts(name, frozenset())])
        except (UnknownInputError, OSError, yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError):
            return None  # the file gets no further: lm-eval says why

    def _parts(self, name: str, above: frozenset[str]) -> Any:
        """Resolve a name to all its content.

        Args:
            name: a task, group or tag.
            above: enclosing groups, to detect circles.
        """
        if name in above:
            raise UnknownInputError(name)
        for listing in self.listings:
            if name in listing.files:
                return self._described(name, listing.files[name], above | {name})
            if name in listing.tags:
                return {member: self._parts(member, above | {name}) for member in sorted(listing.tags[name])}
        raise UnknownInputError(name)

    def _described(self, name: str, path: Path, above: frozenset[str]) -> Any:
        config = read_task(path)
        code = {p.name: file_sha256(p, self.store) for p in task_code(config, path.parent)}
        if "group" not in config:
            return [name, code, self._with_data(config)]
        return [name, code, config, list(self._members(config, config.get("task"), above))]

    def _members(self, config: Mapping[str, Any], members: Any, above: frozenset[str]) -> Iterator[Any]:
        for member in members if isinstance(members, list) else [members]:
            if isinstance(member, str):
                yield self._parts(member, above)
            elif isinstance(member, dict) and isinstance(member.get("task"), list):
                yield list(self._members({**config, **member}, member["task"], above))
            elif isinstance(member, dict) and self._is_listed(str(member.get("task") or member.get("group"))):
                if "dataset_path" in member or "dataset_kwargs" in member:
                    raise UnknownInputError(str(member))  # replaces the task's own data
                yield self._parts(str(member.get("task") or member.get("group")), above)
            elif isinstance(member, dict):
                yield self._with_data({**config, **member})
            else:
                raise UnknownInputError(str(member))

    def settings(self, name: str) -> dict[str, Any]:
        """Return a task's settings; none of a group or an unknown task."""
        file = next((listing.files[name] for listing in self.listings if name in listing.files), None)
        try:
            config = read_task(file) if file else {}
        except (UnknownInputError, OSError, yaml.YAMLError, ValueError):
            return {}
        return {} if "group" in config else config

    def _is_listed(self, name: str) -> bool:
        return any(name in listing.files or name in listing.tags for listing in self.listings)

    def _with_data(self, config: Mapping[str, Any]) -> Any:
        """Return a task's settings, with data paths replaced by digests."""
        path, options = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
        elsewhere = {"class", "custom_dataset", "use_prompt"} & config.keys() or "data_dir" in options
        if elsewhere or not isinstance(path, str):
            raise UnknownInputError(str(path))
        if path in LOCAL_READERS and "data_files" in options:
            options["data_files"] = self._contents(options["data_files"])
            return {**config, "dataset_kwargs": options}
        if "data_files" in options or Path(path).exists():
            raise UnknownInputError(path)
        commit = dataset_commit(path, config.get("dataset_name"), options.get("revision"))
        if commit is None:
            raise UnknownInputError(path)
        return {**config, "dataset_kwargs": options, "commit": commit}

    def _contents(self, files: Any) -> Any:
        """Replace file names by digests of their contents."""
        if isinstance(files, dict):
            return {split: self._contents(names) for split, names in files.items()}
        if isinstance(files, list):
            return [self._contents(name) for name in files]
        paths = sorted(glob.glob(os.path.expanduser(str(files)), recursive=True))
        if not paths or "://" in str(files):
            raise UnknownInputError(str(files))
        return [file_sha256(Path(path), self.store) for path in paths]


def keep_own_listing(store: JsonStore, index: Mapping[str, Any]) -> Listing | None:
    """Remember lm-eval's own tasks.

    Args:
        store: where to keep the listing.
        index: name -> entry (yaml_path, tags), of all of lm-eval's tasks or none.
    """
    if not index:
        return None
    files = {name: str(entry.yaml_path) for name, entry in index.items() if entry.yaml_path}
    tags = {name: sorted(entry.tags) for name, entry in index.items() if not entry.yaml_path and entry.tags}
    store.keep(_own_key(), {"files": files, "tags": tags})
    return Listing({name: Path(path) for name, path in files.items()}, tags)


def _own_listing(store: JsonStore) -> Listing | None:
    """Return the remembered listing of lm-eval's own tasks, if any."""
    saved = store.find(_own_key())
    if not saved:
        return None
    return Listing({name: Path(path) for name, path in saved["files"].items()}, saved["tags"])


def _own_key() -> str:
    from importlib.util import find_spec

    package = find_spec("lm_eval")  # located without importing it
    return digest(["tasks of lm-eval", version("lm_eval"), package.origin if package else None])
