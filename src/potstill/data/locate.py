"""Find the rows that a source names: in files, in folders and globs of them, in saved data sets, on the hub."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.data_files import FILES_TO_IGNORE
from datasets.fingerprint import Hasher

from potstill.data.disk_cache import BATCH
from potstill.data.files import digest
from potstill.data.readers import (
    SUFFIXES,
    Columns,
    Table,
    empty,
    file_format,
    open_table,
    reading,
    suppress_output,
    without_filled_keys,
)
from potstill.data.sources import Source, is_glob, listed
from potstill.errors import DataError, nearest, one_line

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Batch(NamedTuple):
    """Some columns of successive rows."""

    columns: Columns
    file: str  # its name
    first_row: int  # in the file, from 1


@dataclass(frozen=True)
class Location(ABC):
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


@dataclass(frozen=True)
class LocalFiles(Location):
    """Files of known formats, and folders of saved data sets, read one after the other."""

    paths: tuple[Path, ...]

    def digest(self) -> str:
        parts = [f"{digest(path)} {file_format(path)}" for path in self.paths]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def _tables(self) -> dict[Path, Table]:
        tables = {}
        for path in self.paths:
            with reading(path):
                tables[path] = open_table(path, self.limit)
        return tables

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for table in self._tables.values() for name in table.columns))

    def _batches(self, names: list[str]) -> Iterator[Batch]:
        for path, table in self._tables.items():
            present, row = [name for name in names if name in table.columns], 1
            with reading(path):
                for columns in table.read(present or table.columns[:1]):
                    size = len(next(iter(columns.values())))
                    yield Batch({name: columns.get(name, [None] * size) for name in names}, path.name, row)
                    row += size


@dataclass(frozen=True)
class HubData(Location):
    """A split of a data set on the hub, read by `datasets`."""

    source: Source

    @cached_property
    def _builder(self) -> Any:
        with self._reading():
            return datasets.load_dataset_builder(
                str(self.source.path), self.source.config, revision=self.source.revision
            )

    @cached_property
    def _dataset(self) -> Any:
        with self._reading():
            if self.source.streaming:
                return self._builder.as_streaming_dataset(self.source.split)
            self._builder.download_and_prepare()
            return self._builder.as_dataset(self.source.split)

    def digest(self) -> str:
        """The hash of a builder is the commit of its data set."""
        return Hasher.hash([str(self.source.path), self._builder.hash, self._builder.config_id, self.source.split])

    @property
    def columns(self) -> list[str]:
        dataset = self._dataset
        with self._reading():
            return list((dataset if dataset.column_names is not None else dataset._resolve_features()).column_names)

    def _batches(self, names: list[str]) -> Iterator[Batch]:
        row, title = 1, f"{self.source.title} ({self.source.split})"
        rows = self._dataset.with_format(None).select_columns(names).iter(BATCH)
        while True:
            with self._reading():
                columns = next(rows, None)
            if columns is None:
                return
            yield Batch(without_filled_keys(columns), title, row)
            row += len(columns[names[0]])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise a DataError of one line for whatever `datasets` and the connection raise."""
        try:
            with suppress_output():
                yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"data: expected the data set {self.source.path} on the hub with the split {self.source.split}, got "
                f"{type(error).__name__} {one_line(error, 300)!r}. Correct path, config and split. Without a "
                "connection, only data sets that were read before are there."
            ) from None


def locate(source: Source) -> Location:
    """Find the rows of a source.

    Raises:
        DataError: there are none, or it is not clear which.
    """
    path = Path(source.path).expanduser()
    if not path.exists() and not is_glob(path) and source.split and HUB_NAME.fullmatch(str(source.path)):
        return HubData(source.limit, source)
    if path.is_dir() and not (path / "state.json").exists():
        return LocalFiles(source.limit, _folder(path, source))
    for key in ("split", "config"):
        if getattr(source, key) is not None:
            raise DataError(
                f"data: expected a folder, or the name of a data set on the hub, beside {key}, got {path}. "
                f"Leave out {key}, or correct the path."
            )
    return LocalFiles(source.limit, _glob(path) if is_glob(path) else (_existing(path),))


def _existing(path: Path) -> Path:
    if not path.exists():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        hub = (
            " For a data set on the hub, give a split too." if HUB_NAME.fullmatch(str(path)) and not path.suffix else ""
        )
        raise DataError(
            f"data: expected a file, got {path}, which does not exist.{nearest(path.name, siblings)} Correct the path."
            f"{hub}"
        )
    if path.is_dir():
        return path
    if file_format(path) not in SUFFIXES:
        raise DataError(
            f"data: expected a file that ends in one of {listed(SUFFIXES)}, got {path.name}. "
            "Rename or convert it; JSON Lines hold any text."
        )
    if path.stat().st_size == 0:
        raise empty(path)
    return path


def _glob(pattern: Path) -> tuple[Path, ...]:
    matches = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    files = tuple(_existing(path) for path in matches if path.is_file())
    if not files:
        raise DataError(f"data: expected files of the pattern {pattern}, got none. Correct the pattern.")
    return files


def _folder(path: Path, source: Source) -> tuple[Path, ...]:
    """The files of a folder, or of one split of it, by the rules that datasets has for names of files and the card."""
    if (saved := path / "dataset_dict.json").exists():
        names: list[str] = json.loads(saved.read_text(encoding="utf-8"))["splits"]
        splits: dict[str, tuple[Path, ...]] = {name: (path / name,) for name in names}
    else:
        splits = _splits(path, source)
        others = [] if source.config else _unassigned(path, splits)
        if others:
            raise DataError(
                f"data: expected all data files of the folder {path} to be read, got {others[0].name}, which "
                f"`datasets` leaves out. Name those to read by a pattern, such as {path}/*{others[0].suffix}, or a "
                "configuration of the card as config."
            )
    if source.split not in splits and (source.split or len(splits) > 1):
        raise DataError(
            f"data: expected one split of the folder {path}, got {source.split}. It has {listed(list(splits))}: "
            f"name one, as in `split: {next(iter(splits))}`."
        )
    return tuple(_existing(file) for file in splits[source.split or next(iter(splits))])


def _splits(path: Path, source: Source) -> dict[str, tuple[Path, ...]]:
    try:
        with suppress_output():
            files = datasets.load_dataset_builder(str(path), source.config).config.data_files
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data: expected data files in the folder {path}, or what save_to_disk wrote, got "
            f"{one_line(error, 300)!r}. Name a file in it."
        ) from None
    return {str(split): tuple(map(Path, names)) for split, names in (files or {}).items()}


def _unassigned(path: Path, splits: dict[str, tuple[Path, ...]]) -> list[Path]:
    """The data files of a folder that are in none of its splits: of another format, or without a split's name."""
    assigned = {file.parent.resolve() / file.name for files in splits.values() for file in files}
    files = [file for file in path.resolve().rglob("*") if file_format(file) in SUFFIXES]
    return [
        file for file in files if file not in assigned and file.name not in FILES_TO_IGNORE and file.name[0] not in "._"
    ]
