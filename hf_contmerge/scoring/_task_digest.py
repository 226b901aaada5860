"""Digests of evaluation tasks, computed from files without lm-eval or torch.

A digest covers the task's YAML as lm-eval resolves it (includes, members of a group or tag), the Python files next to
it, and its data: local files by their bytes, Hub datasets by the commit in the cache of `datasets`. File locations do
not count. Tasks with parts outside these files have no digest.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.runtime.versions import version
from hf_contmerge.scoring.cache import JsonStore, digest, file_sha256, hugging_face_home

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FILES = {"json", "csv", "parquet", "text", "arrow", "xml"}  # readers of `datasets` for local files
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}


class _UnknownError(Exception):
    """Part of a task cannot be identified from files."""


class _TaskLoader(_Loader):
    """Loads lm-eval's YAML.

    `!function module.name` refers to code in a nearby file.
    """


_TaskLoader.add_constructor("!function", lambda loader, node: {"!function": loader.construct_scalar(node)})


@dataclass(frozen=True)
class Listing:
    """Task files by task or group name; task names by tag."""

    files: Mapping[str, Path] = field(default_factory=dict)
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)


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
        ours = [_listing(folder) for folder in reversed(folders) if folder.is_dir()]
        return cls([*ours, own or _own_listing(store) or Listing()], store)

    def sha256(self, name: str) -> str | None:
        """Return the digest of a task, group or tag; None if unknown."""
        try:
            return digest(["task", self._parts(name, frozenset())])
        except (_UnknownError, OSError, yaml.YAMLError, UnicodeDecodeError):
            return None

    def _parts(self, name: str, above: frozenset[str]) -> Any:
        """Resolve a name to all its content.

        Args:
            name: a task, group or tag.
            above: enclosing groups, to detect circles.
        """
        if name in above:
            raise _UnknownError(name)
        for listing in self.listings:
            if name in listing.files:
                return self._described(name, listing.files[name], above | {name})
            if name in listing.tags:
                return {member: self._parts(member, above | {name}) for member in sorted(listing.tags[name])}
        raise _UnknownError(name)

    def _described(self, name: str, path: Path, above: frozenset[str]) -> Any:
        config = _resolved(path)
        code = {p.name: file_sha256(p, self.store) for p in _code(config, path.parent)}
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
                    raise _UnknownError(str(member))  # replaces the task's own data
                yield self._parts(str(member.get("task") or member.get("group")), above)
            elif isinstance(member, dict):
                yield self._with_data({**config, **member})
            else:
                raise _UnknownError(str(member))

    def _is_listed(self, name: str) -> bool:
        return any(name in listing.files or name in listing.tags for listing in self.listings)

    def _with_data(self, config: Mapping[str, Any]) -> Any:
        """Return a task's settings, with data paths replaced by digests."""
        path, options = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
        elsewhere = {"class", "custom_dataset", "use_prompt"} & config.keys() or "data_dir" in options
        if elsewhere or not isinstance(path, str):
            raise _UnknownError(str(path))
        if path in _FILES and "data_files" in options:
            options["data_files"] = self._contents(options["data_files"])
            return {**config, "dataset_kwargs": options}
        if "data_files" in options or Path(path).exists():
            raise _UnknownError(path)
        commit = _hub_commit(path, config.get("dataset_name"), options.get("revision"))
        return {**config, "dataset_kwargs": options, "commit": commit}

    def _contents(self, files: Any) -> Any:
        """Replace file names by digests of their contents."""
        if isinstance(files, dict):
            return {split: self._contents(names) for split, names in files.items()}
        if isinstance(files, list):
            return [self._contents(name) for name in files]
        paths = sorted(glob.glob(os.path.expanduser(str(files)), recursive=True))
        if not paths or "://" in str(files):
            raise _UnknownError(str(files))
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


def _listing(folder: Path) -> Listing:
    """List a folder's tasks.

    The first file of a name wins, as in lm-eval.
    """
    files: dict[str, Path] = {}
    tags: dict[str, list[str]] = {}
    for path in sorted(folder.glob("**/*.yaml"), key=lambda p: p.as_posix()):
        if _SKIPPED & set(path.parts):
            continue
        try:
            config = _resolved(path)
        except (_UnknownError, OSError, yaml.YAMLError, UnicodeDecodeError):
            continue  # lm-eval skips it too
        name = config.get("group") or config.get("task")
        if isinstance(name, str) and name not in files:
            files[name] = path
            for tag in _words(config.get("tag")) if "group" not in config else ():
                tags.setdefault(tag, []).append(name)
    return Listing(files, tags)


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _resolved(path: Path, above: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """Return a task file's settings merged over those of its includes."""
    path = path.resolve()
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    if not isinstance(config, dict) or path in above:
        raise _UnknownError(str(path))
    merged: dict[str, Any] = {}
    for name in _words(config.pop("include", None)):
        included = _resolved(path.parent / name, above | {path})
        if list(_functions(included)) and (path.parent / name).resolve().parent != path.parent:
            raise _UnknownError(str(path))  # code in another folder
        merged |= {k: v for k, v in included.items() if k != "task_list"}
    return merged | config


def _functions(config: Any) -> Iterator[str]:
    """Yield the names of functions in a task's settings."""
    if isinstance(config, dict) and set(config) == {"!function"}:
        yield str(config["!function"])
    elif isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _functions(value)


def _code(config: Mapping[str, Any], folder: Path) -> list[Path]:
    """Return a task's Python files.

    Neighbouring files count as well: the files with the task's functions may import them.
    """
    named = {folder / f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in _functions(config)}
    if not all(path.is_file() for path in named):
        raise _UnknownError(str(folder))  # a function of an installed package
    return sorted({*named, *folder.glob("*.py")}) if named else []


def _hub_commit(path: str, name: str | None, revision: str | None) -> str:
    """Return the commit of a Hub dataset prepared on this machine.

    Raises:
        _UnknownError: the cache has no commit, or several.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    root = Path(os.environ.get("HF_DATASETS_CACHE") or hugging_face_home() / "datasets").expanduser()
    owner, _, own = path.rpartition("/")
    own = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", own)).lower()
    prepared = (root / (f"{owner}___{own}" if owner else own)).glob("*/*/*")
    commits = {p.name for p in prepared if p.is_dir() and (name is None or p.parts[-3] == name)}
    if len(commits) != 1 or revision:
        raise _UnknownError(path)
    return commits.pop()
