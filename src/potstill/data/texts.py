"""Columns of text on disk, as one sequence of texts that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import pyarrow as pa


class StoredTexts(Sequence[str]):
    """The texts of memory-mapped columns of one length, one column after the other; a slice is a view.

    Args:
        columns: each with what is put before its texts.
        rows: those that are in the sequence; default: all.
    """

    def __init__(self, columns: Sequence[tuple[pa.ChunkedArray, str]], rows: range | None = None) -> None:
        self._columns = columns
        self._rows = range(sum(len(texts) for texts, _ in columns)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> StoredTexts: ...
    def __getitem__(self, index: int | slice) -> str | StoredTexts:
        if isinstance(index, slice):
            return StoredTexts(self._columns, self._rows[index])
        column, row = divmod(self._rows[index], len(self._columns[0][0]))
        texts, prompt = self._columns[column]
        return f"{prompt}{texts[row].as_py()}"
