"""Read the columns of a data file in batches of Python values.

JSON is parsed here and not by `datasets.load_dataset`, whose reader infers types: a column of dates would become
timestamps, and a number among texts a text.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from csv import Error as BrokenCsv
from csv import field_size_limit
from csv import reader as split_lines
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features
from pyarrow import csv, parquet

from potstill.data.disk_cache import BATCH
from potstill.errors import DataError, one_line

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """The names of a file's columns, and what yields batches of some of them; a row without a column has None there.

    `class_names` has the names of classes by the columns that have their numbers, as `datasets` writes them.
    """

    columns: list[str]
    read: Callable[[list[str]], Iterator[Columns]]
    class_names: dict[str, list[str]] = field(default_factory=dict)


def open_table(path: Path, limit: int | None = None) -> Table:
    """The table of a file that exists and has one of `SUFFIXES`, or of a saved dataset's folder.

    Of JSON, the columns are the keys of all rows, or of the first `limit`.
    """
    if path.is_dir():
        return _open_saved(path)
    if (suffix := file_format(path)) in JSON_SUFFIXES:
        return _open_json(path, limit)
    return _READERS[suffix](path)


def file_format(path: Path) -> str:
    """The suffix that says how to read a file.

    >>> file_format(Path("train.jsonl.gz")), file_format(Path("train.CSV"))
    ('.jsonl', '.csv')
    """
    *others, last = ["", *(suffix.lower() for suffix in path.suffixes)]
    return others[-1] if last in COMPRESSIONS and others[-1] in TEXT_SUFFIXES else last


def open_binary(path: Path) -> BinaryIO:
    """Open a file to read, and decompress what has a suffix of `COMPRESSIONS`."""
    raw = pa.input_stream(str(path), compression="detect")
    if path.suffix.lower() in COMPRESSIONS:
        raw = _Decompressed(raw, Expansion(path))
    return io.BufferedReader(raw, 1 << 16)


class Expansion:
    """Counts the bytes that a file holds compressed; a file of kilobytes may mean terabytes of one letter."""

    def __init__(self, path: Path) -> None:
        self.name, self.bytes = path.name, 0
        self.most = max(MOST_BYTES, MOST_EXPANSION * path.stat().st_size)

    def add(self, number: int) -> None:
        self.bytes += number
        if self.bytes > self.most:
            raise DataError(
                f"data: expected at most {MOST_EXPANSION} times the size of {self.name} when it is decompressed, got "
                "more. Decompress it, if you trust it."
            )


class _Decompressed(io.RawIOBase):
    def __init__(self, stream: Any, expansion: Expansion) -> None:
        self._stream, self._expansion = stream, expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._expansion.add(len(content))
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


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
        if "invalid UTF8" in str(error):
            raise DataError(
                f"data: expected UTF-8 in {path.name}, got another encoding. Save the file as UTF-8."
            ) from None
        raise DataError(
            f"data: expected {path.name} to be readable as {''.join(path.suffixes) or 'a saved dataset'}, got "
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


def is_json(path: Path) -> bool:
    return not path.is_dir() and file_format(path) in JSON_SUFFIXES


def is_json_lines(path: Path) -> bool:
    """Whether a file has a JSON value in each line, and not one list or one object of all."""
    if not is_json(path):
        return False
    with open_binary(path) as file:
        filled = (line for line in (raw.removeprefix(b"\xef\xbb\xbf").strip() for raw in file) if line)
        first = next(filled, b"")
        if first.startswith(b"["):
            return False
        if file_format(path) != ".json":
            return True
        value = _parse_json(first, "utf-8")
        return not isinstance(value, ValueError) and (next(filled, None) is not None or _rows_within(value) is None)


def numbered_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Parse JSON Lines, or a file with one list: each value with its line, or its place in the list, from 1.

    A line that cannot be parsed, an empty one too, yields the ValueError that it raised in place of a value.
    """
    if is_json_lines(path):
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                yield number, _parse_json(line, "utf-8-sig" if number == 1 else "utf-8")
        return
    with open_binary(path) as file:
        document = _parse_json(file.read(), "utf-8-sig")
    rows = document if isinstance(document, list) else _rows_within(document)
    yield from enumerate([document] if rows is None else rows, 1)


def _rows_within(document: Any) -> list[Any] | None:
    """The rows of a document like {"version": 1, "data": [{...}, {...}]}; None where it is a row itself."""
    lists = {}
    if isinstance(document, dict):
        lists = {
            key: value
            for key, value in document.items()
            if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
        }
    if not lists.keys() & ROWS_KEYS:
        return None
    if len(lists) > 1:
        raise DataError(
            f"data: expected one list of rows in an object, got {', '.join(lists)}. Write each to a file of its own."
        )
    (name,) = lists
    if beside := [key for key, value in document.items() if key in READ_BY_ROW and value]:
        raise DataError(
            f"data: expected the rows of {name} to have all that a model reads, got {beside[0]} beside them. Write it "
            "into each row."
        )
    return lists[name]


def _parse_json(text: bytes, encoding: str) -> Any:
    try:
        return json.loads(text.decode(encoding).rstrip(), object_pairs_hook=_object)
    except RecursionError:
        return ValueError("a value that is nested too deeply")
    except ValueError as error:
        return error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:40]!r} twice in an object")
    return value


def _open_json(path: Path, limit: int | None) -> Table:
    names: dict[str, None] = {}
    for row in islice(_json_rows(path), limit):
        names |= dict.fromkeys(row)
    if not names:
        raise empty(path)

    def read(names: list[str]) -> Iterator[Columns]:
        rows = _json_rows(path)
        while chunk := list(islice(rows, BATCH)):
            yield {name: [row.get(name) for row in chunk] for name in names}

    return Table(list(names), read)


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
        if isinstance(value, ValueError):
            raise DataError(
                f"data: expected JSON in {path.name}, got {one_line(value, 99)!r} in line {line}. Correct or remove it."
            )
        if not isinstance(value, dict):
            raise DataError(
                f"data: expected a JSON object in row {row} of {path.name}, got {describe_value(value)}. "
                'Write each row as {"text": "..."}.'
            )
        yield value


def _open_csv(path: Path) -> Table:
    delimiter = _delimiter(path)
    quoted = _has_quoted_cells(path, delimiter)
    parse = csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted)

    def batches(convert: csv.ConvertOptions | None = None) -> csv.CSVStreamingReader:
        options = csv.ReadOptions(block_size=1 << 26)  # a row must fit in a block
        return csv.open_csv(path, read_options=options, parse_options=parse, convert_options=convert)

    def read(names: list[str]) -> Iterator[Columns]:
        # Everything is text: a cell that says NA or 12 means just that.
        types = dict.fromkeys(names, pa.large_string())
        with batches(csv.ConvertOptions(include_columns=names, column_types=types)) as opened:
            yield from _in_columns(opened)

    with batches() as opened:
        return Table(_distinct(opened.schema.names, path), read)


def _delimiter(path: Path) -> str:
    """Find what separates the names in a file's first line; a comma where there is one name alone."""
    with open_binary(path) as file:
        header = file.readline(1 << 16).decode("utf-8-sig", errors="replace").splitlines()[:1]
    return max(",;\t|", key=lambda delimiter: len(next(split_lines(header, delimiter=delimiter), [])))


def _has_quoted_cells(path: Path, delimiter: str) -> bool:
    """Whether quotes stand around cells, and so may cells have line breaks; without them a quote is a character.

    Arrow's reader takes quotes as they come: of `"Hi" she said` it drops two, and an open one joins rows.
    """
    largest = field_size_limit(sys.maxsize)
    try:
        with open_binary(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
            lines = split_lines(text, delimiter=delimiter, strict=True)
            for _ in lines:
                pass
    except BrokenCsv as error:
        if delimiter == "\t":
            return False
        raise DataError(
            f"data: expected cells of {path.name} with quotes around the whole and doubled within, got "
            f"{str(error)!r} in line {lines.line_num}. Write the file again."
        ) from None
    finally:
        field_size_limit(largest)
    return True


def _in_columns(batches: Iterable[pa.RecordBatch]) -> Iterator[Columns]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            yield batch.slice(start, BATCH).to_pydict()


def _distinct(names: list[str], path: Path) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"data: expected columns with names of their own in {path.name}, got {twice[0]!r} twice. Rename one."
        )
    return names


def _open_parquet(path: Path) -> Table:
    def read(names: list[str]) -> Iterator[Columns]:
        expansion = Expansion(path)
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH, columns=names):
                expansion.add(batch.nbytes)
                yield without_filled_keys(batch.to_pydict())

    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
    return Table(_distinct(schema.names, path), read, _class_names(schema))


def _open_arrow(path: Path) -> Table:
    """A file of Arrow IPC, as a stream (as datasets writes it) or with an index (Feather)."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file:
            try:
                yield from pa.ipc.open_stream(file)
            except pa.ArrowInvalid:
                indexed = pa.ipc.open_file(file)
                yield from (indexed.get_batch(i) for i in range(indexed.num_record_batches))

    def read(names: list[str]) -> Iterator[Columns]:
        yield from map(without_filled_keys, _in_columns(batch.select(names) for batch in batches()))

    first = next(batches(), None)
    if first is None:
        raise empty(path)
    return Table(_distinct(first.schema.names, path), read, _class_names(first.schema))


def _open_text(path: Path) -> Table:
    def read(names: list[str]) -> Iterator[Columns]:
        with open_binary(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig").read()
        yield {name: [text] for name in names}

    return Table(["text"], read)


def _open_saved(path: Path) -> Table:
    with suppress_output():
        dataset = Dataset.load_from_disk(str(path)).with_format(None)

    def read(names: list[str]) -> Iterator[Columns]:
        for batch in dataset.select_columns(names).iter(BATCH):
            yield without_filled_keys(batch)

    return Table(dataset.column_names, read, class_names(dataset.features))


def class_names(features: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The names of classes by the columns that have their numbers."""
    return {name: of.names for name, of in (features or {}).items() if isinstance(of, ClassLabel)}


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The same for a file that `datasets` wrote, which has its features beside the schema."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features")
    return class_names(Features.from_dict(written)) if written else {}


@contextmanager
def suppress_output() -> Iterator[None]:
    """Hide the bars of datasets and the remarks about cards of data sets."""
    shown, remarks = not datasets.are_progress_bars_disabled(), logging.getLogger("huggingface_hub")
    level = remarks.level
    datasets.disable_progress_bars()
    remarks.setLevel(logging.ERROR)
    try:
        yield
    finally:
        remarks.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def without_filled_keys(columns: Columns) -> Columns:
    """Remove the nulls that Arrow puts in an object for keys that only other objects have."""

    def is_list_of_objects(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict)

    return {
        name: [
            _without_nulls(value) if isinstance(value, dict) or is_list_of_objects(value) else value for value in values
        ]
        for name, values in columns.items()
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _open_csv,
    ".tsv": _open_csv,
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
    ".txt": _open_text,
}
TEXT_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".txt")  # that may be compressed
COMPRESSIONS = (".gz", ".bz2", ".zst")
MOST_BYTES, MOST_EXPANSION = 1 << 28, 200  # of a decompressed file: the larger one; texts have a tenth of the factor
SUFFIXES = (*JSON_SUFFIXES, *_READERS)
# usual names of a list of all rows
ROWS_KEYS = {"data", "rows", "train", "examples", "instances", "items", "records", "samples"}
READ_BY_ROW = ("system", "system_prompt", "tools", "functions", "documents", "context", "instruction", "prompt")
