"""Whole numbers by shares, and orders with even shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

_ROUNDING = 1e-9
"""Of 0.7 * 10, say, which must count as 7."""


def split_by_shares(count: int, shares: Sequence[float]) -> list[int]:
    """Divide `count` by shares into whole numbers, by largest remainders."""
    wanted = [count * share for share in shares]
    parts = [math.floor(number + _ROUNDING) for number in wanted]
    order = sorted(range(len(parts)), key=lambda i: parts[i] - wanted[i])
    for i in order[: count - sum(parts)]:
        parts[i] += 1
    return parts


def in_blocks(counts: Sequence[int], block: int) -> Iterator[int]:
    """Yield parts; every block holds their shares, to one place.

    Within a block, remainders go to the parts that lie furthest behind.
    """
    total, given = sum(counts), [0] * len(counts)
    for start in range(0, total, block):
        size = min(block, total - start)
        due = [count * (start + size) / total - have for count, have in zip(counts, given, strict=True)]
        parts = [math.floor(count * size / total + _ROUNDING) for count in counts]
        late = sorted(range(len(parts)), key=lambda i: parts[i] - due[i])
        for i in late[: size - sum(parts)]:
            parts[i] += 1
        given = [have + part for have, part in zip(given, parts, strict=True)]
        yield from evenly([[1] * part for part in parts])


def evenly(sizes: Sequence[Sequence[float]]) -> list[int]:
    """Return parts in the order of their items, at even pace.

    `sizes`: of each part's items, in their order.
    """
    places = []
    for part, items in enumerate(sizes):
        ends = accumulate(items)
        places += [((end - item / 2) / sum(items), part) for end, item in zip(ends, items, strict=True)]
    return [part for _, part in sorted(places)]
