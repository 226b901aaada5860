"""Phases of a run, and their recipe fields."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Phase = Literal["train", "merge", "score", "report"]
PHASES: tuple[Phase, ...] = ("train", "merge", "score", "report")


@dataclass(frozen=True)
class Use:
    """A row of the table."""

    patterns: str
    """Dotted fields, as in `changes.flat_fields`; `*` matches anything."""
    phase: Phase | None
    """The first phase that uses them."""
    undoes: bool = True
    """Whether a change invalidates the phase's results."""
    compares: bool = False
    """Whether scores with different values are incomparable."""


_USES = (
    # patterns                                                                phase    undoes  compares
    Use("name output publish publish.* plugins",                              None,    False),
    Use("baselines",                                                          None,    False),  # places of their own
    Use("*.suite",                                                            None,    False),
    Use("stages.*.license train.*.license",                                   None,    False),
    Use("*train.report_to *train.disable_tqdm *train.ddp_timeout", "train", False),
    Use("guard guard.*",                                                      "merge", False),  # from the next merge on
    Use("merge.*",                                                            "merge"),
    Use("evaluate.validation",                                                "merge", True,   True),
    Use("evaluate.same_within evaluate.same_within.*",                       "report", False),
    Use("evaluate.matrix evaluate.routed evaluate.cache evaluate.batch_size evaluate.parallel", "score", False),
    Use("evaluate.relevance",                                                 "merge", False),  # from the next merge on
    Use("evaluate.shots",                                                     "score", False),  # its place follows
    Use("evaluate.general_tasks evaluate.general_tasks.* *.tasks *.tasks.* evaluate.include_path", "score"),
    Use("evaluate.*",                                                         "score", True,   True),
    Use("*",                                                                  "train"),
)  # fmt: skip
"""The first matching row counts. A task's data and code are part of its digest instead."""


def use_of(field: str) -> Use:
    """Return a field's row of the table."""
    return next(use for use in _USES if any(fnmatchcase(field, pattern) for pattern in use.patterns.split()))
