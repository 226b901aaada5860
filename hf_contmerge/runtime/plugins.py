"""Finds rules, strategies and rewards: ours, of packages, of files.

A package declares its classes as entry points of the group `hf_contmerge.merge_rules`, `hf_contmerge.train_strategies`
or `hf_contmerge.training.rewards`: the name is the word in recipes, the value is `module:Class`. Nothing of a package
is imported before one of its words is used.

A plugin file is Python code that the user names, with `--plugin FILE.py` or `use_plugin`. Its words are the names, in
lower case, of the rules, strategies and rewards that it defines, except names that begin with `_`. A recipe's `plugins`
only says which files it needs: code runs by the user's word alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import logging
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from hf_contmerge.errors import RecipeError, RunError, unknown
from hf_contmerge.runtime.foreign import expanded

LOG = logging.getLogger(__name__)

T = TypeVar("T")
_SHA256 = "sha256:"


@dataclass(frozen=True)
class Provider(Generic[T]):
    """Who defines a word, and how its class is loaded."""

    owner: str
    version: Mapping[str, str]
    """Package -> version, or plugin file -> digest. Empty: the word is ours."""
    load: Callable[[], type[T]]


class Registry(Generic[T]):
    """The classes of one kind.

    Args:
        kind: what messages call them.
        home: the package with one file for each of ours, which is the entry points' group too.
        base: the class that all derive from.
    """

    def __init__(self, kind: str, home: str, base: type[T]) -> None:
        self._kind, self._home, self._base = kind, home, base

    def names(self) -> tuple[str, ...]:
        """Return all words. Entry points without a module only warn."""
        packaged = {entry.name for entry in _entry_points(self._home) if not _is_missing(entry)}
        return tuple(sorted({*self._own(), *packaged, *(word for word, _, _ in self._filed())}))

    def find(self, word: str) -> type[T]:
        """Return the class behind a word.

        Raises:
            KeyError: nobody defines it.
            RecipeError: two define it, or its module cannot be loaded.
        """
        providers = list(self._providers(word))
        if not providers:
            raise KeyError(word)
        if len(providers) > 1:
            owners = " and ".join(provider.owner for provider in providers)
            raise RecipeError(
                f"The {self._kind} {word!r} is defined by {owners}. Rename one, uninstall its package, or leave its "
                "`--plugin` out."
            )
        cls = providers[0].load()
        _USED.setdefault(word, {}).update(providers[0].version)
        return cls

    def named(self, word: str, *, where: str = "") -> type[T]:
        """Return the class behind a word. Raises RecipeError."""
        try:
            return self.find(word)
        except KeyError as error:
            raise RecipeError(unknown(self._kind, word, self.names(), where=where)) from error

    def _providers(self, word: str) -> Iterator[Provider[T]]:
        if word in self._own():
            yield Provider("hf_contmerge itself", {}, lambda: self._load_own(word))
        for entry in _entry_points(self._home):
            if entry.name == word:
                yield Provider(_owner(entry), _version(entry), functools.partial(self._load_entry, entry))
        for name, cls, file in self._filed():
            if name == word:
                yield Provider(f"the plugin {file.path}", file.version, lambda cls=cls: cls)

    def _own(self) -> set[str]:
        folder = importlib.import_module(self._home).__path__
        return {module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_")}

    def _filed(self) -> list[tuple[str, type[T], PluginFile]]:
        return [(cls.__name__.lower(), cls, file) for file in _FILES.values() for cls in file.classes(self._base)]

    def _load_own(self, word: str) -> type[T]:
        module = importlib.import_module(f"{self._home}.{word}")
        wanted = word.replace("_", "")
        return next(c for n, c in vars(module).items() if n.lower() == wanted and isinstance(c, type))

    def _load_entry(self, entry: EntryPoint) -> type[T]:
        where = f"The {self._kind} {entry.name!r} of {_owner(entry)} ({entry.value})"
        try:
            cls = entry.load()
        except Exception as error:  # a package of others may fail in any way
            raise RecipeError(
                f"{where} cannot be loaded: {type(error).__name__}: {error}. Update or uninstall the package."
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, self._base)):
            raise RecipeError(f"{where} is no {self._base.__name__}. Update or uninstall the package.")
        return cls


# Packages


@functools.cache
def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=group))


@functools.cache
def _is_missing(entry: EntryPoint) -> bool:
    """Report if an entry point's package is missing. Imports nothing."""
    package = entry.value.partition(":")[0].strip().partition(".")[0]
    try:
        missing = importlib.util.find_spec(package) is None
    except ValueError:  # not a name
        missing = True
    if missing:
        LOG.warning("%r of %s is left out: no module %s (%s).", entry.name, _owner(entry), package, entry.value)
    return missing


def _owner(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name} {entry.dist.version}" if entry.dist else f"the package of {entry.value}"


def _version(entry: EntryPoint) -> dict[str, str]:
    return {entry.dist.name: entry.dist.version} if entry.dist else {}


# Files


@dataclass(frozen=True)
class PluginFile:
    """A file of Python code, as read when the user named it."""

    path: Path
    source: bytes

    @property
    def version(self) -> dict[str, str]:
        return {self.path.name: _SHA256 + hashlib.sha256(self.source).hexdigest()}

    @functools.cached_property
    def module(self) -> ModuleType:
        """The file's module; the file is executed on first use."""
        module = ModuleType(f"contmerge_plugin_{self.path.stem}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # dataclasses look their annotations up there
        try:
            exec(compile(self.source, str(self.path), "exec"), vars(module))
        except Exception as error:  # code of others may fail in any way
            del sys.modules[module.__name__]
            raise RecipeError(
                f"The plugin {self.path} cannot be loaded: {self._place(error)}{type(error).__name__}: {error}."
            ) from error
        return module

    def classes(self, base: type[T]) -> list[type[T]]:
        """Return the file's own classes, without abstract and private ones."""
        name = self.module.__name__
        own = dict.fromkeys(c for c in vars(self.module).values() if isinstance(c, type) and c.__module__ == name)
        public = (c for c in own if not c.__name__.startswith("_") and not inspect.isabstract(c))
        return [c for c in public if issubclass(c, base)]

    def _place(self, error: Exception) -> str:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
        return f"line {line}: " if line else ""


_FILES: dict[str, PluginFile] = {}
_USED: dict[str, dict[str, str]] = {}
"""Word -> version of whoever defines it, for the words that this process has used."""


def use_plugin(path: str | Path) -> None:
    """Allow this process to run a plugin file and use its classes.

    The file is read now, executed on first use, and read again if it has changed by the next call.

    Raises RecipeError if it cannot be read, or another file has the same name.
    """
    file = expanded(path).resolve()
    try:
        plugin = PluginFile(file, file.read_bytes())
    except OSError as error:
        raise RecipeError(f"Cannot read the plugin {path}: {error.strerror}. Give a Python file.") from error
    given = _FILES.get(file.name)
    if given and given.path != file and given.source != plugin.source:
        raise RecipeError(f"Two plugins are named {file.name}: {given.path} and {file}. Rename one.")
    if not given or given.source != plugin.source:
        _FILES[file.name] = plugin


def use_plugins(paths: Iterable[str | Path]) -> None:
    """Call `use_plugin` for several files."""
    for path in paths:
        use_plugin(path)


def require_given(needed: Iterable[str], where: str | Path) -> None:
    """Raise RecipeError for plugin files of a recipe without the user's consent.

    Args:
        needed: the files as the recipe names them, relative to its folder.
        where: the recipe.
    """
    for name in needed:
        if Path(name).name not in _FILES:
            beside = Path(where).parent / name
            raise RecipeError(
                f"{where} needs the plugin {name}. A plugin is code, which runs only if you say so: read it, then add "
                f"`--plugin {beside if beside.is_file() else name}` (in Python: use_plugin)."
            )


def require_same(recorded: Mapping[str, str], where: str | Path, *, cure: str = "") -> None:
    """Raise RunError unless the plugin files behind a result are given, unchanged.

    Args:
        recorded: `versions` of a record.
        where: what they made.
        cure: what to do if one has changed.
    """
    for name, digest in recorded.items():
        if digest.startswith(_SHA256) and name not in _FILES:
            raise RunError(f"{where} was made with the plugin {name}: add `--plugin {name}` with the path to it.")
    for name in changed(recorded):
        raise RunError(
            f"{_FILES[name].path} is not the plugin that made {where}: its SHA-256 was {_short(recorded[name])} and "
            f"is {_short(_FILES[name].version[name])}. Restore it{cure}."
        )


def changed(recorded: Mapping[str, str]) -> list[str]:
    """Return the given plugin files unlike those in a record's `versions`."""
    return [name for name, digest in given_plugins().items() if recorded.get(name, digest) != digest]


def given_plugins() -> dict[str, str]:
    """Return name -> digest of the given plugin files."""
    return {name: digest for file in _FILES.values() for name, digest in file.version.items()}


def used_plugins(words: Iterable[str] | None = None) -> dict[str, str]:
    """Return package -> version, plugin file -> digest; by default all used."""
    return {name: v for word in (_USED if words is None else words) for name, v in _USED.get(word, {}).items()}


def _short(digest: str) -> str:
    return digest.removeprefix(_SHA256)[:12]
