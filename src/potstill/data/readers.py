"""Read the columns of a data file in batches of Python values.

JSON is parsed here and not by `datasets.load_dataset`, whose reader infers types: a column of dates would become
timestamps, and a number among texts a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset
from pyarrow import csv, parquet

from potstill.data.disk_cache import BATCH
from potstill.errors import DataError, one_line

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """The names of a file's columns, and what yields batches of some of them; a row without a column has None there."""

    columns: list[str]
    read: Callable[[list[str]], Iterator[Columns]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each row with all columns."""
        for batch in self.read(self.columns):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def open_table(path: Path) -> Table:
    """The table of a file that exists and has one of `SUFFIXES`, or of a saved dataset's folder."""
    return _open_saved(path) if path.is_dir() else _READERS[path.suffix.lower()](path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a DataError of one line for whatever a broken file raises while it is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"data: expected UTF-8 in {path.name}, got the byte 0x{error.object[error.start]:02x}. "
            "Save the file as UTF-8."
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"data: expected {path.name} to be readable as {path.suffix or 'a saved dataset'}, got "
            f"{one_line(error, 200)!r}. Write the file again."
        ) from None


def empty(path: Path) -> DataError:
    """The error for a file without rows."""
    return DataError(f"data: expected at least one row in {path.name}, got none. Give a file with data.")


def describe_value(value: Any) -> str:
    """Describe a value in JSON's terms, for an error."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value!r}"[:60]
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, list):
        return f"the list {str(value[:8])[:40]}"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def is_json_lines(path: Path) -> bool:
    """Whether a file has a JSON value in each line, and not one list of all."""
    if path.suffix.lower() not in (".jsonl", ".json") or path.is_dir():
        return False
    with path.open("rb") as file:
        first = next((line for line in (raw.removeprefix(b"\xef\xbb\xbf").strip() for raw in file) if line), b"")
    return not first.startswith(b"[")


def numbered_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Parse JSON Lines, or a file with one list: each value with its line, or its place in the list, from 1.

    A line that cannot be parsed, an empty one too, yields the ValueError that it raised in place of a value.
    """
    if is_json_lines(path):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, _parse_json(line, "utf-8-sig" if number == 1 else "utf-8")
        return
    values = _parse_json(path.read_bytes(), "utf-8-sig")
    yield from enumerate(values if isinstance(values, list) else [values], 1)


def _parse_json(text: bytes, encoding: str) -> Any:
    try:
        return json.loads(text.decode(encoding).rstrip())
    except ValueError as error:
        return error


def _open_json(path: Path) -> Table:
    first = next(_json_rows(path), None)
    if first is None:
        raise empty(path)

    def read(names: list[str]) -> Iterator[Columns]:
        rows = _json_rows(path)
        while chunk := list(islice(rows, BATCH)):
            yield {name: [row.get(name) for row in chunk] for name in names}

    return Table(list(first), read)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, without its empty lines."""
    row = 0
    for line, value in numbered_json(path):
        if isinstance(value, UnicodeDecodeError):
            raise value
        if isinstance(value, json.JSONDecodeError):
            if not value.doc:
                continue
            raise DataError(
                f"data: expected JSON in {path.name}, got {value.msg!r} in line {line + value.lineno - 1}, "
                f"column {value.colno}. Write one whole object a line, or one list of objects."
            ) from None
        row += 1
        if not isinstance(value, dict):
            raise DataError(
                f"data: expected a JSON object in row {row} of {path.name}, got {describe_value(value)}. "
                'Write each row as {"text": "..."}.'
            )
        yield value


def _open_csv(path: Path) -> Table:
    def batches(convert: csv.ConvertOptions | None = None) -> csv.CSVStreamingReader:
        return csv.open_csv(
            path,
            read_options=csv.ReadOptions(block_size=1 << 26),  # a row must fit in a block
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        )

    def read(names: list[str]) -> Iterator[Columns]:
        # Everything is text: a cell that says NA or 12 means just that.
        types = dict.fromkeys(names, pa.large_string())
        with batches(csv.ConvertOptions(include_columns=names, column_types=types)) as opened:
            for batch in opened:
                for start in range(0, batch.num_rows, BATCH):
                    yield batch.slice(start, BATCH).to_pydict()

    with batches() as opened:
        return Table(opened.schema.names, read)


def _open_parquet(path: Path) -> Table:
    def read(names: list[str]) -> Iterator[Columns]:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH, columns=names):
                yield _without_filled_keys(batch.to_pydict())

    with parquet.ParquetFile(path) as file:
        return Table(file.schema_arrow.names, read)


def _open_text(path: Path) -> Table:
    def read(names: list[str]) -> Iterator[Columns]:
        text = path.read_text(encoding="utf-8-sig")
        yield {name: [text] for name in names}

    return Table(["text"], read)


def _open_saved(path: Path) -> Table:
    splits = path / "dataset_dict.json"
    if splits.exists():
        raise DataError(
            f"data: expected one dataset in the folder {path}, got the splits "
            f"{', '.join(json.loads(splits.read_text(encoding='utf-8'))['splits'])}. Add one to the path."
        )
    if not (path / "state.json").exists():
        raise DataError(
            f"data: expected a file, or a folder written by save_to_disk, got the folder {path}. Name a file in it."
        )
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = Dataset.load_from_disk(str(path)).with_format(None)
    finally:
        if shown:
            datasets.enable_progress_bars()

    def read(names: list[str]) -> Iterator[Columns]:
        for batch in dataset.select_columns(names).iter(BATCH):
            yield _without_filled_keys(batch)

    return Table(dataset.column_names, read)


def _without_filled_keys(columns: Columns) -> Columns:
    """Remove the nulls that Arrow puts in an object for keys that only other objects have."""

    def is_list_of_objects(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict)

    return {
        name: [_without_nulls(value) if is_list_of_objects(value) else value for value in values]
        for name, values in columns.items()
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _open_json,
    ".json": _open_json,
    ".csv": _open_csv,
    ".parquet": _open_parquet,
    ".txt": _open_text,
}
SUFFIXES = tuple(_READERS)
