"""Rows of a data set in bins: as many tokens in each as a row may have."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray

from potstill.data.batches import PACKED_ROWS
from potstill.errors import DataError

READ_AT_ONCE = 10_000  # rows whose lengths are read
SAMPLED_BATCHES = 256  # of which it is measured how much padding they would have


class PackedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Bins of whole rows, filled by best fit, the longest rows first: [i] is {"packed_rows": [row, ...]}.

    The number of bins, and how many tokens the rows in each have, are the same in every epoch. Which of the rows of
    one length stands in which bin depends on seed and epoch alone, not on the batch, the worker or earlier draws.

    Args:
        rows: a data set with a length, whose [i] is {"input_ids": [T], ...}.
        max_length: tokens of a bin at most; a longer row has a bin of its own.

    Raises:
        DataError: the data set has no length.
    """

    def __init__(self, rows: Any, max_length: int, *, seed: int = 0) -> None:
        if not hasattr(rows, "__len__"):
            raise DataError(
                "packing: expected a data set with a length, got a stream, whose rows are not known yet. Load it "
                "whole, or set packing to false."
            )
        self.rows, self.max_length, self.seed = rows, max_length, seed
        self.lengths = row_lengths(rows)
        bins = best_fit(np.sort(self.lengths)[::-1].tolist(), max_length)
        self._slots = np.argsort(bins, kind="stable")  # by bin: places among the rows, sorted by length
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(bins))])  # of the bins in them
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it too
        self._shuffled: tuple[int, NDArray[np.int64]] = (-1, self.lengths)  # an epoch, and its rows by bin

    def set_epoch(self, epoch: int) -> None:
        """Use the bins of an epoch."""
        self._epoch.fill_(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {PACKED_ROWS: [self.rows[row] for row in self.numbers(range(len(self))[i])]}

    def numbers(self, i: int) -> list[int]:
        """The numbers of the rows in bin i."""
        epoch = int(self._epoch)
        if self._shuffled[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
            by_length = order[np.argsort(-self.lengths[order], kind="stable")]
            self._shuffled = epoch, by_length[self._slots]
        return self._shuffled[1][self._bounds[i] : self._bounds[i + 1]].tolist()

    def shares(self, batch_rows: int) -> tuple[float, float]:
        """The share of tokens among the positions of batches of so many rows at random, and of so many bins."""
        generator, size = np.random.default_rng(self.seed), min(batch_rows, len(self.lengths))
        batches = [generator.choice(self.lengths, size, replace=False) for _ in range(SAMPLED_BATCHES)]
        padded = sum(lengths.sum() for lengths in batches) / sum(size * lengths.max() for lengths in batches)
        filled = np.add.reduceat(np.sort(self.lengths)[::-1][self._slots], self._bounds[:-1])
        return float(padded), float(filled.mean() / filled.max())


def row_lengths(rows: Any) -> NDArray[np.int64]:
    """The tokens of each row of a data set."""
    if not isinstance(rows, Dataset):
        return np.array([len(rows[i]["input_ids"]) for i in range(len(rows))], np.int64)
    parts = rows.select_columns("input_ids").with_format("arrow").iter(READ_AT_ONCE)
    return np.concatenate([pc.list_value_length(part["input_ids"]).to_numpy() for part in parts]).astype(np.int64)


def best_fit(lengths: Sequence[int], room: int) -> NDArray[np.int64]:
    """Put each length into the fullest bin that still has room for it: the bin of each, [N].

    >>> best_fit([6, 5, 3, 2, 2], 8).tolist()
    [0, 1, 1, 0, 2]
    """
    bins: list[int] = []
    open_bins: dict[int, list[int]] = {}  # by the room that they have
    rooms: list[int] = []  # which some bins have, sorted
    number = 0
    for length in lengths:
        place = bisect_left(rooms, length)
        if place < len(rooms):
            left = rooms[place]
            chosen = open_bins[left].pop()
            if not open_bins[left]:
                del rooms[place]
        else:
            left, chosen, number = room, number, number + 1
        left -= length
        if left > 0:
            if not open_bins.setdefault(left, []):
                insort(rooms, left)
            open_bins[left].append(chosen)
        bins.append(chosen)
    return np.array(bins, np.int64)
