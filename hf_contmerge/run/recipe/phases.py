"""The phases of a run, and which one uses which field of a recipe: one table for all who ask."""

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
    """Dotted fields, as `changes.flat_fields` names them; `*` stands for anything."""
    phase: Phase | None
    """The first phase that uses them."""
    undoes: bool = True
    """Whether a change makes the results of that phase wrong."""
    compares: bool = False
    """Whether two scores that differ in them cannot be compared."""


_USES = (
    # patterns                                                                phase    undoes  compares
    Use("name output publish publish.* plugins",                              None,    False),
    Use("*.suite",                                                            None,    False),
    Use("*train.report_to *train.run_name *train.disable_tqdm *train.ddp_timeout", "train", False),
    Use("guard guard.*",                                                      "merge", False),  # from the next merge on
    Use("merge.*",                                                            "merge"),
    Use("evaluate.validation",                                                "merge", True,   True),
    Use("evaluate.matrix evaluate.cache evaluate.batch_size evaluate.parallel", "score", False),
    Use("evaluate.general_tasks evaluate.general_tasks.* *.tasks *.tasks.* evaluate.include_path", "score"),
    Use("evaluate.*",                                                         "score", True,   True),
    Use("*",                                                                  "train"),
)  # fmt: skip
"""The first row that matches counts. What measures a task (its data, its code) is part of the task's own digest."""


def use_of(field: str) -> Use:
    """Return the row of a field."""
    return next(use for use in _USES if any(fnmatchcase(field, pattern) for pattern in use.patterns.split()))
