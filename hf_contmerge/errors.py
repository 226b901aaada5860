"""What goes wrong for a user, as a tree. Everything here ends the program with one message and exit code 2, or 3 where
no merge holds the recipe's forgetting budget.

    ContmergeError
    ├── RecipeError       a word in the YAML: unknown field, rule, strategy, parameter, task   (also a ValueError)
    ├── DataError         a dataset: missing, empty, without the column that the recipe names   (also a ValueError)
    ├── ModelError        weights: names, shapes, vocabulary, truncated or non-finite tensors   (also a ValueError)
    ├── RunError          the run folder: made by another recipe, in use, or half there
    ├── BudgetError       the guard: whatever was tried, the merge forgets too much   (exit code 3)
    └── ResourceError     the machine: disk, memory, network, permissions

A message says what was found, where, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MANY = 30  # more names than that are not read
SHARED = "All ranks of the job end with this error."


class ContmergeError(Exception):
    """Base of all errors that a user can mend."""

    exit_code = 2


class RecipeError(ContmergeError, ValueError):
    """A word in a recipe is unknown, missing or contradicts another."""


class DataError(ContmergeError, ValueError):
    """A dataset cannot give what the recipe asks of it."""


class ModelError(ContmergeError, ValueError):
    """A model folder is missing, damaged, or does not fit the base model."""


class RunError(ContmergeError):
    """A run folder cannot be continued as asked."""


class BudgetError(ContmergeError):
    """No merge that the guard's ladder allows holds the forgetting budget. All that was done before is kept."""

    exit_code = 3


class ResourceError(ContmergeError):
    """The machine lacks disk, memory, network or permission."""


def size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def unknown(what: str, word: str, known: Iterable[str], *, where: str = "") -> str:
    """Return the sentence for a word that is not among `known`, with the nearest ones suggested."""
    options = sorted(known)
    near = difflib.get_close_matches(word, options, n=2, cutoff=0.6)
    place = f" in {where}" if where else ""
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    shown = options if len(options) <= _MANY else difflib.get_close_matches(word, options, n=8, cutoff=0)
    rest = f" and {len(options) - len(shown)} more" if len(options) > len(shown) else ""
    return f"Unknown {what} {word!r}{place}.{hint} Known: {', '.join(shown) or '(none)'}{rest}."


def mark_shared(error: Exception) -> Exception:
    """Say of an error that every rank of the job raises it, so that one of them tells it."""
    error.add_note(SHARED)
    return error
