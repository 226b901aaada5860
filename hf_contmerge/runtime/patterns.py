"""Refuses regular expressions that could match for hours.

Python's matcher tries all ways of a failed match. The number of ways is bounded from above by the pattern's structure:
an open repeat (`*`) has as many as the text has characters, an alternative as many as it has branches.
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

_PARSER: Any = importlib.import_module("re._parser")
_WORDS: Any = importlib.import_module("re._constants")
_REPEATS = tuple(getattr(_WORDS, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"))
_OPEN = 5.0  # bits of an open repeat: it shares the places in a name with the others
_MOST = 30.0  # bits
_LONGEST = 10_000

LORA_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
"""Settings of peft's LoraConfig with patterns of module names."""
_INNER = ("layers_pattern", "rank_pattern", "alpha_pattern")  # peft puts them inside of others


def require_quick(pattern: str) -> None:
    """Raise ValueError for invalid patterns and those of exponential time."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"the pattern has {len(pattern)} characters, at most {_LONGEST} are read")
    try:
        with warnings.catch_warnings(action="ignore"):
            bits = _bits(_PARSER.parse(pattern))
            if bits <= _MOST:
                re.compile(pattern)  # finds more mistakes than the parser
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r:.80} is an invalid pattern: {error!s:.200}") from error
    if bits > _MOST:
        raise ValueError(
            f"{pattern!r:.80} could take exponential time to match. Write it without a repeat of a repeat or of "
            "alternatives, and with at most five of `*` and `+`"
        )


def require_quick_lora(settings: Mapping[str, Any]) -> None:
    """Check the patterns in settings of a LoRA. Raises as `require_quick`."""
    for word in LORA_PATTERNS:
        value = settings.get(word)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, Iterable) else ():
            if isinstance(pattern, str):
                require_quick(f"({pattern})" if word in _INNER else pattern)


def _bits(items: Any) -> float:
    """Return the logarithm of a pattern's ways to match a text."""
    return sum(_bits_of(op, argument) for op, argument in items)


def _bits_of(op: Any, argument: Any) -> float:
    if op in _REPEATS:
        least, most, body = argument
        inner = _bits(body)
        if most is _WORDS.MAXREPEAT:
            return math.inf if inner else _OPEN
        return inner * most + math.log2(most - least + 1)
    if op is _WORDS.BRANCH:
        branches = argument[1]
        return max(map(_bits, branches)) + math.log2(len(branches))
    if op in (_WORDS.SUBPATTERN, _WORDS.ATOMIC_GROUP, _WORDS.ASSERT, _WORDS.ASSERT_NOT):
        return _bits(argument if op is _WORDS.ATOMIC_GROUP else argument[-1])
    if op is _WORDS.GROUPREF_EXISTS:
        return sum(_bits(part) for part in argument[1:] if part) + 1
    return 0.0
