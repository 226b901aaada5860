"""Warnings of libraries about each other, without use for a user."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_OLD_NAMES = r"`\w*gradient_checkpointing\w*` is deprecated"
"""TRL's trainers call transformers' methods by their names of version 4."""
_SAME_SECOND = "mtime may not be reliable"
"""Two checkpoints of one moment: transformers then sorts them by their steps, as it should."""


@contextmanager
def without_foreign_noise() -> Iterator[None]:
    """Leave out these warnings, and no others, while a trainer works."""

    def is_ours(record: logging.LogRecord) -> bool:
        return _SAME_SECOND not in record.getMessage()

    log = logging.getLogger("transformers.trainer_utils")
    log.addFilter(is_ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _OLD_NAMES, FutureWarning, module=r"transformers\.modeling_utils")
        try:
            yield
        finally:
            log.removeFilter(is_ours)
