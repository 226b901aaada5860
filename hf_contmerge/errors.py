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
import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_MANY = 30  # more names than that are not read
_SHARED = "All ranks of the job end with this error."


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
    error.add_note(_SHARED)
    return error


class _Outcome:
    code = 0


@contextmanager
def clear_errors() -> Iterator[_Outcome]:
    """Turn what a user can mend into one message and its exit code; let everything else through with its traceback."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # dozens of bars from four libraries; our own lines tell the progress
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_contmerge").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself
    outcome = _Outcome()
    try:
        yield outcome
    except ContmergeError as error:
        _tell(error, str(error))
        outcome.code = error.exit_code
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EROFS: "the disk is read-only",
            errno.EACCES: "no permission",
        }
        if error.errno not in reasons:
            raise
        _tell(
            error,
            f"cannot write {error.filename or 'the run folder'}: {reasons[error.errno]}. What is done is kept: mend "
            "that and give the same command again.",
        )
        outcome.code = 2


def _tell(error: Exception, message: str) -> None:
    """Print one line: what all ranks raise is told by the first, anything else by the rank that it befell."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or _SHARED not in getattr(error, "__notes__", ()):
        print(f"Error on rank {rank}: {message}" if rank else f"Error: {message}", file=sys.stderr)
