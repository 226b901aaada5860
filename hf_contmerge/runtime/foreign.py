"""Reads files of strangers: bounded bytes and depth; names inside a folder.

A model, adapter, recipe, run or state from the internet is read through these functions. They raise ValueError (of YAML
yaml.YAMLError), as the parsers do for damaged text.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_contmerge.errors import ContmergeError, ModelError, size

if TYPE_CHECKING or not yaml.__with_libyaml__:
    from yaml import SafeLoader
else:
    from yaml import CSafeLoader as SafeLoader  # ten times faster

LARGEST_JSON = 2**27
"""Bytes. The largest tokenizers have 40 MB."""
LARGEST_YAML = 2**22
"""Bytes; with aliases written out, twice as many characters."""
_MOST_VALUES = 200_000
"""Of one YAML text: a second's work."""
_DEEPEST = 100
_LONGEST_NUMBER = 100
_LONGEST_NAME = 240  # bytes; file systems take 255, and endings are added
_LONGEST_PART, _LONGEST_PATH = 255, 4096
_LONG_NUMBER = re.compile(rf"\d{{{_LONGEST_NUMBER}}}")
_NUMBER = re.compile(r"[-+]?(0[xX][0-9a-fA-F_]+|[0-9_:.]+)")


def read_text(path: Path, *, most: int = LARGEST_JSON) -> str:
    """Read a UTF-8 file of at most `most` bytes.

    Raises ValueError for a larger or special file (a pipe, a device), OSError as `open`.
    """
    if _is_special(path):  # to open a pipe waits for a writer
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {size(most)}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:  # its own text holds all bytes
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from error


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file with one object. Raises as `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError("an object in braces was expected")
    return value


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for deep nesting and huge numbers."""
    number = _short_int if _LONG_NUMBER.search(text) else None  # a vocabulary may hold such digits as text
    try:
        value = json.loads(text, parse_int=number)
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error
    _require_shallow(value)
    return value


def _short_int(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _require_shallow(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        if not level:
            return
        level = [v for part in level for v in _parts(part) if isinstance(v, dict | list)]
    if level:
        raise ValueError(f"values are nested more than {_DEEPEST} deep")


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def require_shape(value: Any, shape: Any, place: str = "it") -> None:
    """Check JSON-like data. Raises ValueError with the place of a misfit.

    A shape is a type (float takes integers, object all), a tuple of alternatives, None for null, a list with the shape
    of all items or of each of several, or a mapping: of all keys, `{str: shape}`, or of named ones, optional with a
    question mark. Keys without a name are free.
    """
    misfit = _misfit(value, shape)
    if misfit:
        raise ValueError(f"{place}{misfit}")


def _misfit(value: Any, shape: Any) -> str:
    """Return where and how a value does not fit, or ""."""
    if isinstance(shape, tuple):
        misfits = [_misfit(value, each) for each in shape]
        return "" if "" in misfits else max(misfits, key=lambda text: text.partition(" is ")[0].count("."))
    if isinstance(shape, dict | list) and not isinstance(value, type(shape)):
        return f" is {value!r:.40}, expected {'fields' if isinstance(shape, dict) else 'a list'}"
    parts: Any = value  # a list or fields, as the shape
    if isinstance(shape, list):
        if len(shape) > 1 and len(value) != len(shape):
            return f" has {len(value)} items, expected {len(shape)}"
        inner = ((i, part, shape[i % len(shape)]) for i, part in enumerate(parts))
    elif isinstance(shape, dict) and str in shape:
        inner = ((key, part, shape[str]) for key, part in parts.items())
    elif isinstance(shape, dict):
        missing = [word for word in shape if not word.endswith("?") and word not in value]
        if missing:
            return f" lacks {missing[0]!r}"
        names = {word.removesuffix("?"): part for word, part in shape.items()}
        inner = ((key, parts[key], part) for key, part in names.items() if key in parts)
    else:
        return "" if _is_a(value, shape) else f" is {value!r:.40}, expected {_name_of(shape)}"
    return next((f".{key!s:.40}{misfit}" for key, part, own in inner if (misfit := _misfit(part, own))), "")


def _is_a(value: Any, shape: Any) -> bool:
    if shape in (None, bool, object):
        return shape is object or (value is None if shape is None else isinstance(value, bool))
    return isinstance(value, int | float if shape is float else shape) and not isinstance(value, bool)


def _name_of(shape: Any) -> str:
    names = {None: "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names[shape]


# YAML


def parse_yaml(text: str, loader: Any = SafeLoader) -> Any:
    """Parse one YAML document. Raises yaml.YAMLError, for too large ones too."""
    documents = parse_documents(text, loader)
    if len(documents) > 1:
        raise yaml.YAMLError(f"expected one document, found {len(documents)}")
    return documents[0] if documents else None


def parse_documents(text: str, loader: Any = SafeLoader) -> list[Any]:
    """Parse YAML documents. Raises as `parse_yaml`."""
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"it is larger than {size(LARGEST_YAML)}")
    try:
        _require_bounded(text)
        return list(yaml.load_all(text, Loader=loader))
    except yaml.YAMLError:
        raise
    except UnicodeEncodeError as error:  # an argument's bytes that are not UTF-8
        raise yaml.YAMLError(f"it holds half of a character ({error.reason})") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(f"a value does not have its type ({error})") from error  # such as the date 2001-99-99


def _require_bounded(text: str) -> None:
    """Raise YAMLError for deep nesting, long numbers, or multiplying aliases.

    Only events are read here: the loader's own recursion ends the process at some thousand levels.
    """
    anchors: dict[str, int] = {}
    open_parts: list[tuple[str | None, int]] = []
    total = 0
    for number, event in enumerate(yaml.parse(text, Loader=SafeLoader)):
        more = 0
        if isinstance(event, yaml.AliasEvent):
            more = anchors.get(event.anchor, 2 * LARGEST_YAML + 1)  # inside its own anchor it has no end
        elif isinstance(event, yaml.ScalarEvent):
            more = _scalar(event)
            if event.anchor:
                anchors[event.anchor] = more
        elif isinstance(event, yaml.CollectionStartEvent):
            open_parts.append((event.anchor, total))
            if event.anchor:
                anchors.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_parts.pop()
            if anchor:
                anchors[anchor] = total - before
        total += more
        if len(open_parts) > _DEEPEST:
            raise yaml.YAMLError(f"values are nested more than {_DEEPEST} deep")
        if number > _MOST_VALUES or total > 2 * LARGEST_YAML:
            raise yaml.YAMLError("it holds too many values, or its aliases (*name) stand for too much text")


def _scalar(event: yaml.ScalarEvent) -> int:
    if event.implicit[0] and len(event.value) > _LONGEST_NUMBER and _NUMBER.fullmatch(event.value):
        raise yaml.YAMLError(f"a number has {len(event.value)} digits")
    return 1 + len(event.value)


# Names and links


def is_file_name(name: str) -> bool:
    """Say if a name is one plain part of any path."""
    return (
        name.isprintable()
        and not set(name) & set("/\\")
        and name not in ("", ".", "..")
        and len(name.encode()) <= _LONGEST_NAME
    )


def expanded(name: str | Path) -> Path:
    """Return a path with the user's home for `~`, if known.

    Names of unknown users, and of no path at all, stay as they are.

    Raises:
        ContmergeError: the name is empty, which would mean the current folder.
    """
    if name == "":
        raise ContmergeError("An empty name stands for no file, folder or model. Is a variable unset?")
    try:
        return Path(os.path.expanduser(name))
    except ValueError:  # a null byte
        return Path(name)


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names with several occurrences."""
    return [name for name, count in Counter(names).items() if count > 1]


def is_too_long(path: str) -> bool:
    """Say if no file can have a path, for its length."""
    sizes = [len(part.encode(errors="replace")) for part in path.split("/")]
    return max(sizes) > _LONGEST_PART or sum(sizes) + len(sizes) > _LONGEST_PATH


def path_in(folder: Path, name: str, ending: str = "", *, error: type[ContmergeError] = ModelError) -> Path:
    """Return the path of a name of a file in a folder.

    Raises `error` for a name with slashes or control characters, a too long one, `.` and `..`.
    """
    if not isinstance(name, str) or not is_file_name(name):
        raise error(
            f"{name!r:.200} cannot name a file in {folder}: expected at most {_LONGEST_NAME} printable characters "
            "without slashes. Rename it."
        )
    return folder / f"{name}{ending}"


def require_own_files(folder: Path, *, error: type[ContmergeError], besides: Collection[Path] = ()) -> None:
    """Check a folder of ours, perhaps made by others.

    Raises `error` for a link to a place outside, except `besides`, for pipes and devices, and for names with control
    characters.
    """
    home = folder.resolve()
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and path not in besides and not path.resolve().is_relative_to(home):
                raise error(
                    f"{path} links to {os.readlink(path)}, outside {folder}. Links are not followed out of a folder: "
                    "put the file itself there, or remove the link."
                )
            special = _is_special(path)
            if special or not name.isprintable():
                raise error(f"{place} holds {name!a}, which is {'no file' if special else 'no name'}. Remove it.")


def _is_special(path: Path) -> bool:
    """Say if a path is a pipe, a device or a socket.

    Other processes may remove it at any time.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
