"""User errors, each with a message and an exit code.

    ContmergeError
    ├── RecipeError       a word in the YAML: unknown field, rule, strategy, parameter, task   (also a ValueError)
    ├── DataError         a dataset: missing, empty, without a column named in the recipe       (also a ValueError)
    ├── ModelError        weights: names, shapes, vocabulary, truncated or non-finite tensors   (also a ValueError)
    ├── RunError          the run folder: another recipe's, in use, or incomplete
    ├── BudgetError       the guard: every attempt exceeds the forgetting budget   (exit code 3, most others 2)
    ├── LossError         `contmerge gate`: a loss is proven (exit code 3), or cannot be ruled out (4, with --strict)
    ├── ResourceError     the machine: disk, memory, network, permissions
    │   └── FullDiskError a disk that lacks the room for what is to be written
    └── DamageError       `contmerge verify` found files that are not as recorded   (exit code 1)

A message says what was found, where, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable

_LONGEST_LIST = 30  # longer lists of names are shortened
_LONGEST_MESSAGE, _END = 6000, 1000
SHARED = "All ranks of the job raise this error."


class ContmergeError(Exception):
    """Base class of user errors."""

    exit_code = 2

    def __str__(self) -> str:
        """Leave out the middle of a message of many pages."""
        text = super().__str__()
        cut = len(text) - _LONGEST_MESSAGE
        return f"{text[: -_END - cut]} ... ({cut} characters) ... {text[-_END:]}" if cut > 0 else text


class RecipeError(ContmergeError, ValueError):
    """A word in a recipe is unknown, missing or contradictory."""


class DataError(ContmergeError, ValueError):
    """A dataset does not fit the recipe."""


class ModelError(ContmergeError, ValueError):
    """A model folder is missing, damaged or unfit for its base."""


class RunError(ContmergeError):
    """A run folder cannot be used as requested."""


class BudgetError(ContmergeError):
    """Every merge on the guard's ladder forgets too much.

    All earlier results are kept.
    """

    exit_code = 3


class LossError(ContmergeError):
    """A candidate has lost more than allowed, or may have."""

    def __init__(self, message: str, *, proven: bool) -> None:
        super().__init__(message)
        self.exit_code = 3 if proven else 4


class ResourceError(ContmergeError):
    """The machine lacks disk, memory, network or permission."""


class FullDiskError(ResourceError):
    """A disk lacks the room for a file."""


class DamageError(ContmergeError):
    """Files differ from their records, or a model from its lineage."""

    exit_code = 1


def size(count: float) -> str:
    """Format a number of bytes."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def shell_word(path: str | os.PathLike[str]) -> str:
    """Return a path for a command in a message, quoted if necessary."""
    return shlex.quote(os.fspath(path))


def unknown(what: str, word: str, known: Iterable[str], *, where: str = "") -> str:
    """Format an unknown-word error, with the nearest known words."""
    options = sorted(known)
    near = difflib.get_close_matches(word, options, n=2, cutoff=0.6)
    place = f" in {where}" if where else ""
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    shown = options if len(options) <= _LONGEST_LIST else difflib.get_close_matches(word, options, n=8, cutoff=0)
    rest = f" and {len(options) - len(shown)} more" if len(options) > len(shown) else ""
    return f"Unknown {what} {word!r}{place}.{hint} Known: {', '.join(shown) or '(none)'}{rest}."


def in_place_of(error: BaseException, clearer: ContmergeError) -> ContmergeError:
    """Return the clearer error, raised on the same ranks."""
    for note in getattr(error, "__notes__", ()):
        clearer.add_note(note)
    return clearer


def mark_shared(error: Exception) -> Exception:
    """Mark an error as raised on every rank; rank 0 prints it."""
    error.add_note(SHARED)
    return error
