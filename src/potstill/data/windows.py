"""Split texts that are already token ids: a stream into full rows, or each text into windows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

IdsAndLabels = tuple[list[int], list[int]]


def packed(documents: Iterator[IdsAndLabels], length: int) -> Iterator[IdsAndLabels]:
    """Concatenate documents and split them into rows of `length`; the last may be shorter, but not a lone token."""
    ids: list[int] = []
    labels: list[int] = []
    for more_ids, more_labels in documents:
        ids += more_ids
        labels += more_labels
        whole = len(ids) - len(ids) % length
        yield from ((ids[start : start + length], labels[start : start + length]) for start in range(0, whole, length))
        ids, labels = ids[whole:], labels[whole:]
    if len(ids) > 1:
        yield ids, labels


def windows(documents: Iterator[IdsAndLabels], length: int) -> Iterator[IdsAndLabels]:
    """Split each document into windows of at most `length` that do not overlap."""
    return ((ids[i:j], labels[i:j]) for ids, labels in documents for i, j in bounds(len(ids), length))


def bounds(tokens: int, length: int, *, shared: int = 0) -> Iterator[tuple[int, int]]:
    """The first token of each window of at most `length`, and that behind it; so many tokens are shared by neighbours.

    >>> list(bounds(9, 4)), list(bounds(9, 4, shared=1))
    ([(0, 4), (4, 7), (7, 9)], [(0, 4), (3, 7), (6, 9)])
    """
    places = [*range(0, tokens - shared, length - shared), tokens] if tokens else [0, 0]
    # The first token of a row is never predicted, so a lone last one gets company from the window before.
    if not shared and len(places) > 2 and places[-1] - places[-2] == 1 and length > 2:
        places[-2] -= 1
    return ((start, min(end + shared, tokens)) for start, end in pairwise(places))
