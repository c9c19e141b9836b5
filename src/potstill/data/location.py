"""Where the rows of a source are, whatever it is."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from potstill.data.readers import Columns


class Batch(NamedTuple):
    """Some columns of successive rows."""

    columns: Columns
    file: str  # its name
    first_row: int  # in the file, from 1


@dataclass(frozen=True)
class DataLocation(ABC):
    """Where rows are: what identifies them, their columns, and the rows themselves in batches.

    Args:
        limit: of rows, the first ones; None for all.
    """

    limit: int | None

    @abstractmethod
    def digest(self) -> str:
        """Identify the content, for what is cached of it."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The names of all columns; of JSON, the keys of all rows."""

    @property
    @abstractmethod
    def class_names(self) -> dict[str, list[str]]:
        """The names of classes by the columns that have their numbers, where they are known."""

    @abstractmethod
    def _batches(self, names: list[str]) -> Iterator[Batch]: ...

    def batches(self, names: list[str]) -> Iterator[Batch]:
        """Yield the rows with these columns; a row without a column has None there."""
        remaining = sys.maxsize if self.limit is None else self.limit
        for batch in self._batches(names):
            yield batch._replace(columns={name: values[:remaining] for name, values in batch.columns.items()})
            remaining -= len(batch.columns[names[0]])
            if remaining <= 0:
                return

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each row with all columns."""
        for batch in self.batches(self.columns):
            for values in zip(*batch.columns.values(), strict=True):
                yield dict(zip(batch.columns, values, strict=True))

    def first(self, column: str) -> Any:
        """The value of a column in the first row."""
        batch = next(self.batches([column]), None)
        return None if batch is None else next(iter(batch.columns[column]), None)
