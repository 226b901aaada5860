"""Reads other libraries' files without loading these libraries.

Covered are the caches of huggingface_hub and of datasets, and the task files of lm-eval. Loading the libraries takes
seconds, showing a cached score 0.4 s. tests/scoring/test_formats.py compares each function with its library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from hf_contmerge.runtime.foreign import LARGEST_YAML, SafeLoader, parse_yaml, read_text

LOCAL_READERS = frozenset({"json", "csv", "parquet", "text", "arrow", "xml"})
"""Readers of `datasets` for local files."""

_TRUE = {"1", "ON", "YES", "TRUE"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}


class UnknownInputError(Exception):
    """Part of a task cannot be identified from files."""


# huggingface_hub


def hugging_face_home() -> Path:
    """Return the folder of the Hub libraries' caches."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return _expanded(os.environ.get("HF_HOME", default))


def hub_offline() -> bool:
    """Check the environment for the Hub's offline mode."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in _TRUE


def hub_snapshot(name: str) -> Path | None:
    """Return a model's folder in the Hub cache.

    Args:
        name: owner/model[@revision].
    """
    repo, _, revision = name.partition("@")
    place = _hub_cache() / f"models--{repo.replace('/', '--')}"
    reference = place / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    folder = place / "snapshots" / (commit or "main")
    return folder if any(folder.glob("*.safetensors")) else None


def _hub_cache() -> Path:
    named = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE"))
    return hugging_face_home() / "hub" if named is None else _expanded(named)


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


# datasets


def dataset_commit(path: str, name: str | None, revision: str | None) -> str | None:
    """Return the commit of a Hub dataset prepared on this machine.

    Args:
        path: the dataset's name.
        name: its configuration.
        revision: a commit; branches and tags have no known commit.

    Returns:
        None if the cache has no commit, or several.
    """
    if revision:
        return revision if _COMMIT.fullmatch(revision) else None
    owner, _, own = path.rpartition("/")
    folder = f"{owner}___{_snake_case(own)}" if owner else _snake_case(own)
    prepared = (_datasets_cache() / folder).glob("*/*/*")
    commits = {p.name for p in prepared if p.is_dir() and (name is None or p.parts[-3] == name)}
    return commits.pop() if len(commits) == 1 else None


def _datasets_cache() -> Path:
    return Path(os.environ.get("HF_DATASETS_CACHE") or hugging_face_home() / "datasets").expanduser()


def _snake_case(name: str) -> str:
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z\d])([A-Z])", r"\1_\2", name).lower()


# lm-eval


@dataclass(frozen=True)
class Listing:
    """Task files by task or group name; task names by tag."""

    files: Mapping[str, Path] = field(default_factory=dict)
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)


class _TaskLoader(SafeLoader):
    """Loads lm-eval's YAML.

    `!function module.name` refers to code in a nearby file.
    """


_TaskLoader.add_constructor("!function", lambda loader, node: {"!function": loader.construct_scalar(cast(Any, node))})


def list_tasks(folder: Path) -> Listing:
    """List a folder's tasks.

    The first file of a name wins, as in lm-eval.
    """
    files: dict[str, Path] = {}
    tags: dict[str, list[str]] = {}
    for path in sorted(folder.glob("**/*.yaml"), key=lambda p: p.as_posix()):
        if _SKIPPED & set(path.parts):
            continue
        try:
            config = read_task(path)
        except (UnknownInputError, OSError, yaml.YAMLError, UnicodeDecodeError):
            continue  # lm-eval skips it too
        name = config.get("group") or config.get("task")
        if isinstance(name, str) and name not in files:
            files[name] = path
            for tag in _words(config.get("tag")) if "group" not in config else ():
                tags.setdefault(tag, []).append(name)
    return Listing(files, tags)


def read_task(path: Path, seen: set[Path] | None = None) -> dict[str, Any]:
    """Return a task file's settings merged over those of its includes.

    Args:
        path: the task file.
        seen: the files read before it; lm-eval refuses to include one twice.

    Raises:
        UnknownInputError: a file is included twice, or included code lies in another folder.
    """
    path, seen = path.resolve(), set() if seen is None else seen
    config = read_task_file(path)
    if path in seen:
        raise UnknownInputError(str(path))
    seen.add(path)
    merged: dict[str, Any] = {}
    names = included_in(config)
    config.pop("include", None)
    for name in names:
        included = read_task(path.parent / name, seen)
        if list(functions_in(included)) and (path.parent / name).resolve().parent != path.parent:
            raise UnknownInputError(str(path))
        merged |= {k: v for k, v in included.items() if k != "task_list"}
    return merged | config


def read_task_file(path: Path) -> dict[str, Any]:
    """Return a task file's settings without those of its includes.

    Raises:
        UnknownInputError: the file holds no settings, or is too large or special.
        yaml.YAMLError: it is no YAML, or too deep.
    """
    try:
        config = parse_yaml(read_text(path, most=LARGEST_YAML), _TaskLoader)
    except ValueError as error:
        raise UnknownInputError(f"{path}: {error}") from error
    if not isinstance(config, dict) or any("\0" in name for name in included_in(config)):
        raise UnknownInputError(str(path))
    return config


def task_code(config: Mapping[str, Any], folder: Path) -> list[Path]:
    """Return a task's Python files.

    Neighbouring files count as well: the files with the task's functions may import them.

    Raises:
        UnknownInputError: a function belongs to an installed package.
    """
    named = {folder / f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in functions_in(config)}
    if not all(path.is_file() for path in named):
        raise UnknownInputError(str(folder))
    return sorted({*named, *folder.glob("*.py")}) if named else []


def included_in(config: Mapping[str, Any]) -> list[str]:
    """Return the files included by a task file."""
    return list(map(str, _words(config.get("include"))))


def functions_in(config: Any) -> Iterator[str]:
    """Yield the names of functions in a task's settings."""
    if isinstance(config, dict) and set(config) == {"!function"}:
        yield str(config["!function"])
    elif isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from functions_in(value)


def _words(value: Any) -> list[str]:
    """Return the words of a list or of one; others name nothing."""
    return [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
