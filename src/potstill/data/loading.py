"""Load a data file as a memory-mapped dataset whose columns have their standard names and types."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset

from potstill.data.disk_cache import cache_path, write_arrow
from potstill.data.files import digest
from potstill.data.readers import SUFFIXES, Table, describe_value, empty, open_table, reading
from potstill.data.sources import TEACHER_ID_COLUMNS, Source, SourceKind, choose_columns, listed
from potstill.data.token_weights import SPAN_COLUMNS
from potstill.errors import DataError, nearest
from potstill.losses.alignment import Task


def load(source: Source, task: Task = "causal") -> tuple[Dataset, SourceKind]:
    """Load a file as a memory-mapped dataset with the standard columns of its kind.

    Row i of the dataset is row i + 1 of the file, empty rows included. Conversations are JSON text, because Arrow would
    give every message the keys of all others; labels are text.

    Raises:
        DataError: the file is missing, empty or not of its format, a column is missing, the kind is ambiguous, or
            a row does not hold what its kind needs.
    """
    path = Path(source.path).expanduser()
    require_file(path)
    with reading(path):
        table = open_table(path)
        kind, names = choose_columns(source, table.columns, task)
        cached = cache_path(["source", digest(path), path.suffix.lower(), names])
    if not cached.exists():
        schema = pa.schema({standard: _TYPES[standard].arrow for standard in names})
        write_arrow(cached, schema, _convert_batches(table, names, schema, path))
    dataset = Dataset.from_file(str(cached))
    if not len(dataset):
        raise empty(path)
    return dataset, kind


def require_file(path: Path) -> None:
    """Check that there is a folder, or a file of a known format that is not empty."""
    if not path.exists():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"data: expected a file, got {path}, which does not exist.{nearest(path.name, siblings)} Correct the path."
        )
    if path.is_dir():
        return
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"data: expected a file that ends in one of {listed(SUFFIXES)}, got {path.name}. "
            "Rename or convert it; JSON Lines hold any text."
        )
    if path.stat().st_size == 0:
        raise empty(path)


# Values


def _convert_batches(table: Table, names: dict[str, str], schema: pa.Schema, path: Path) -> Iterator[pa.RecordBatch]:
    row = 1
    with reading(path):
        for batch in table.read(list(dict.fromkeys(names.values()))):
            arrays = [_convert(batch[name], standard, name, row, path) for standard, name in names.items()]
            yield pa.record_batch(arrays, schema=schema)
            row += len(arrays[0])


_CONVERSION_ERRORS = (TypeError, ValueError, OverflowError)  # what Arrow and the converters below raise


def _convert(values: list[Any], standard: str, name: str, first_row: int, path: Path) -> pa.Array:
    """The values as an Arrow array, or an error that says which row does not fit."""
    expected = _TYPES[standard]
    try:
        return expected.convert(values)
    except _CONVERSION_ERRORS:
        for row, value in enumerate(values, first_row):
            try:
                expected.convert([value])
            except UnicodeEncodeError:
                got = "half of a surrogate pair"
            except _CONVERSION_ERRORS:
                got = describe_value(value)
            else:
                continue
            raise DataError(
                f"data: expected {expected.words} in column {name!r} of {path.name}, got {got} in row {row}. "
                "Correct or remove the row."
            ) from None
        raise


def _require(holds: bool) -> None:
    if not holds:
        raise TypeError


def _without_null(array: pa.Array) -> pa.Array:
    _require(not array.null_count)
    return array


def _texts(values: list[Any]) -> pa.Array:
    return _without_null(pa.array(values, type=pa.large_string()))


def _labels(values: list[Any]) -> pa.Array:
    _require(all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in values))
    return _texts([str(value).strip() for value in values])


def _id_lists(values: list[Any]) -> pa.Array:
    # The type is inferred first, because Arrow that is asked for integers cuts 1.5 to 1.
    array = pa.array(values)
    _require(pa.types.is_list(array.type))
    items = array.type.value_type
    _require(pa.types.is_integer(items) or pa.types.is_null(items))
    _without_null(array.flatten())
    return _without_null(array).cast(pa.list_(pa.int64()))


def _weights(values: list[Any]) -> pa.Array:
    _require(all(isinstance(value, int | float) and 0 <= value < math.inf for value in values))
    return pa.array(values, type=pa.float32())


def _weight_lists(values: list[Any]) -> pa.Array:
    for value in values:
        _weights(value)
    return _without_null(pa.array(values, type=pa.list_(pa.float32())))


def _spans(values: list[Any]) -> pa.Array:
    for span in values:
        if span is not None:
            _require(isinstance(span, list) and [type(place) for place in span] == [int, int])
            _require(0 <= span[0] <= span[1])
    return pa.array(values, type=pa.list_(pa.int64()))


def _conversations(values: list[Any]) -> pa.Array:
    conversations = [json.loads(value) if isinstance(value, str) else value for value in values]
    for messages in conversations:
        _require(isinstance(messages, list))
        for message in messages:
            _require(isinstance(message, dict) and isinstance(message.get("role"), str))
            _require(isinstance(message.get("content"), str | list | None))
    return _texts([json.dumps(messages, ensure_ascii=False) for messages in conversations])


class _Type(NamedTuple):
    arrow: pa.DataType
    words: str
    convert: Callable[[list[Any]], pa.Array]


_TEXT = _Type(pa.large_string(), "text", _texts)
_IDS = _Type(pa.list_(pa.int64()), "a list of whole numbers", _id_lists)
_MESSAGES = _Type(pa.large_string(), "a list of messages with role and content", _conversations)
_TYPES: dict[str, _Type] = {
    **dict.fromkeys(("text", "text_pair", "prompt", "completion", "teacher_prompt"), _TEXT),
    "label": _Type(pa.large_string(), "the name or number of a class, or a number", _labels),
    **dict.fromkeys(("messages", "teacher_messages"), _MESSAGES),
    **dict.fromkeys(("input_ids", "labels", "attention_mask", *TEACHER_ID_COLUMNS), _IDS),
    "weights": _Type(pa.list_(pa.float32()), "a list of numbers >= 0", _weight_lists),
    "weight": _Type(pa.float32(), "a number >= 0", _weights),
    **dict.fromkeys(SPAN_COLUMNS, _Type(pa.list_(pa.int64()), "the start and end of a span, or null", _spans)),
}
