"""Evenly spaced choices."""

from __future__ import annotations


def evenly_spaced(count: int, total: int) -> list[int]:
    """Choose indices evenly spaced over range(total), the first among them; all of them where there are fewer.

    >>> evenly_spaced(3, 10), evenly_spaced(5, 2)
    ([0, 3, 6], [0, 1])
    """
    count = min(count, total)
    return [i * total // count for i in range(count)]
