"""Split texts that are already token ids: a stream into full rows, or each text into windows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise


def packed(documents: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    """Concatenate documents and split them into rows of `length`; the last may be shorter, but not a lone token."""
    stream: list[int] = []
    for ids in documents:
        stream += ids
        whole = len(stream) - len(stream) % length
        yield from (stream[start : start + length] for start in range(0, whole, length))
        stream = stream[whole:]
    if len(stream) > 1:
        yield stream


def windows(documents: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    """Split each document into windows of at most `length` that do not overlap."""
    return (ids[start:end] for ids in documents for start, end in bounds(len(ids), length))


def bounds(tokens: int, length: int) -> Iterator[tuple[int, int]]:
    """The first token of each window of at most `length`, and that behind it."""
    places = [*range(0, tokens, length), tokens] if tokens else [0, 0]
    # The first token of a row is never predicted, so a lone last one gets company from the window before.
    if len(places) > 2 and places[-1] - places[-2] == 1 and length > 2:
        places[-2] -= 1
    return pairwise(places)
