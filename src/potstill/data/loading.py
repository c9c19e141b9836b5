"""Load a source as a memory-mapped dataset whose columns have their standard names and types."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset

from potstill.data.columns import ColumnChoice, choose_columns
from potstill.data.conversations import MESSAGES, ColumnError, read_messages, read_object, read_objects, read_tools
from potstill.data.disk_cache import cache_path, write_arrow
from potstill.data.locate import locate
from potstill.data.location import Batch, DataLocation
from potstill.data.readers import describe_value
from potstill.data.right_padding import NUMBERS
from potstill.data.sources import TEACHER_ID_COLUMNS, WRITTEN_COLUMNS, Source, SourceKind, listed
from potstill.data.token_weights import SPAN_COLUMNS
from potstill.errors import DataError
from potstill.losses.alignment import Task
from potstill.models.checksums import is_whole


class LoadedSource(NamedTuple):
    """The rows of a source, by the standard names of their columns.

    Args:
        dataset: memory-mapped; row i is row i + 1 of the source, empty rows included. Conversations are JSON text,
            because Arrow would give every message the keys of all others, and so are tools, documents and
            chat_template_kwargs; labels are text. `num_prompt_messages` is the number of a conversation's first
            messages that have no loss.
        notes: what to print.
        class_names: of the numbers in the column label, in their order; empty where they are not known.
    """

    dataset: Dataset
    kind: SourceKind
    notes: tuple[str, ...]
    class_names: tuple[str, ...]


def load(source: Source, task: Task = "causal", *, has_template: bool = True) -> LoadedSource:
    """Load a source as a memory-mapped dataset with the standard columns of its kind.

    Args:
        has_template: whether the tokenizer has a chat template. Without one, questions and answers are plain text.

    Raises:
        DataError: there are no such rows, a file is not of its format, a column is missing, the kind is ambiguous, a
            row does not hold what its kind needs, or holds what its kind does not read.
    """
    location = locate(source)
    others = {field.name: getattr(source, field.name) for field in fields(source) if field.name not in _PLACE}
    cached = cache_path(["source", location.digest(), str(others), source.limit, task, has_template])
    if not is_whole(cached):
        choice = choose_columns(source, location.columns, location.first, task, has_template)
        facts: dict[str, Any] = {
            "kind": choice.kind,
            "unused": choice.unused,
            "prompt": choice.dialogue and choice.dialogue.prompt,
        }
        facts["classes"] = location.class_names.get(choice.names.get("label", ""), [])
        standard = [*choice.names, *(choice.dialogue.made if choice.dialogue else [])]
        types = {name: _TYPES[name].arrow for name in standard if _TYPES[name].arrow != pa.null()}
        schema = pa.schema(types, metadata={"potstill": json.dumps(facts)})
        write_arrow(cached, schema, _convert_batches(location, choice, schema))
    with pa.memory_map(str(cached)) as file:
        facts = json.loads(pa.ipc.open_stream(file).schema.metadata[b"potstill"])
    dataset = Dataset.from_file(str(cached))
    if not len(dataset):
        raise DataError(f"data: expected at least one row in {source.title}, got none. Give a file with data.")
    return LoadedSource(dataset, facts["kind"], tuple(_notes(source, facts)), tuple(facts["classes"]))


_PLACE = ("path", "split", "config", "revision", "streaming", "limit", "share")  # what the digest stands for


def _notes(source: Source, facts: dict[str, Any]) -> Iterator[str]:
    if facts["prompt"] and source.prompt is None:
        shape = "messages of the user and the assistant" if facts["kind"] == "messages" else "plain text"
        yield f"{source.title}: {' and '.join(facts['prompt'])} and the answer are read as {shape}."
    if facts["unused"]:
        yield f"{source.title}: columns that are not used: {listed(facts['unused'])}."


# Values


def _convert_batches(location: DataLocation, choice: ColumnChoice, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for batch in location.batches(choice.columns):
        _check_empty(batch, choice)
        converted = {
            standard: _convert(batch.columns[name], standard, name, batch) for standard, name in choice.names.items()
        }
        if choice.dialogue is not None:
            converted |= _put_together(batch, choice)
        yield pa.record_batch([converted[name] for name in schema.names], schema=schema)


def _wrong_value(batch: Batch, i: int, column: str, expected: str, got: str, fix: str) -> DataError:
    return DataError(
        f"data: expected {expected} in column {column!r} of {batch.file}, got {got} in row {batch.first_row + i}. {fix}"
    )


_CORRECT = "Correct or remove the row."
# What Arrow and the converters below raise.
_CONVERSION_ERRORS = (TypeError, ValueError, OverflowError, AttributeError, RecursionError)


def _convert(values: list[Any], standard: str, name: str, batch: Batch) -> pa.Array:
    """The values as an Arrow array, or an error that says which row does not fit."""
    expected = _TYPES[standard]
    try:
        return expected.convert(values)
    except _CONVERSION_ERRORS:
        for i, value in enumerate(values):
            try:
                expected.convert([value])
            except UnicodeEncodeError:
                got = "half of a surrogate pair"
            except _CONVERSION_ERRORS:
                got = describe_value(value)
            else:
                continue
            raise _wrong_value(batch, i, name, expected.words, got, expected.fix) from None
        raise


def _check_empty(batch: Batch, choice: ColumnChoice) -> None:
    for name, fix in choice.empty.items():
        for i, value in enumerate(batch.columns[name]):
            if name == "label" and not isinstance(value, bool):
                continue
            if value is not None and (value.strip() if isinstance(value, str) else value) not in ("", [], {}):
                raise DataError(
                    f"data: expected no content in column {name!r} of {batch.file}, which {choice.kind} rows do not "
                    f"read, got {describe_value(value)} in row {batch.first_row + i}. {fix}, or name it in ignore."
                )


def _put_together(batch: Batch, choice: ColumnChoice) -> dict[str, pa.Array]:
    assert choice.dialogue is not None
    names, made = choice.dialogue.columns, []
    for i, values in enumerate(zip(*(batch.columns[name] for name in names), strict=True)):
        try:
            made.append(choice.dialogue.make(dict(zip(names, values, strict=True))))
        except ColumnError as error:
            got = describe_value(error.value)
            raise _wrong_value(batch, i, error.column, error.expected, got, _CORRECT) from None
    shown = choice.dialogue.columns[0]
    return {name: _convert([row[name] for row in made], name, shown, batch) for name in choice.dialogue.made}


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
    return _without_null(_optional_id_lists(values))


def _optional_id_lists(values: list[Any]) -> pa.Array:
    if all(value is None for value in values):
        return pa.array(values, pa.list_(pa.int64()))
    # The type is inferred first, because Arrow that is asked for integers cuts 1.5 to 1.
    array = pa.array(values)
    _require(pa.types.is_list(array.type))
    items = array.type.value_type
    _require(pa.types.is_integer(items) or pa.types.is_null(items))
    _without_null(array.flatten())
    return array.cast(pa.list_(pa.int64()))


def _weights(values: list[Any]) -> pa.Array:
    _require(all(isinstance(value, int | float) and 0 <= value < math.inf for value in values))
    return pa.array(values, type=pa.float32())


def _weight_lists(values: list[Any]) -> pa.Array:
    for value in values:
        if value is not None:
            _weights(value)
    return pa.array(values, type=pa.list_(pa.float32()))


def _spans(values: list[Any]) -> pa.Array:
    for span in values:
        if span is not None:
            _require(isinstance(span, list) and [type(place) for place in span] == [int, int])
            _require(0 <= span[0] <= span[1])
    return pa.array(values, type=pa.list_(pa.int64()))


def _positions(values: list[Any]) -> pa.Array:
    _require(all(value is None or list(value) == list(range(len(value))) for value in values))
    return pa.nulls(len(values))


def _one_sequence(values: list[Any]) -> pa.Array:
    _require(all(value is None or len(set(value)) <= 1 for value in values))
    return pa.nulls(len(values))


def _masks(values: list[Any]) -> pa.Array:
    """Attention masks, of whole numbers or true and false."""
    return _optional_id_lists([value and [int(i) if i in (0, 1) else i for i in value] for value in values])


def _token_types(values: list[Any]) -> pa.Array:
    _require(all(value is None or not any(value) for value in values))
    return pa.nulls(len(values))


def _conversations(values: list[Any]) -> pa.Array:
    return _texts([json.dumps(read_messages(value), ensure_ascii=False) for value in values])


def _as_json(read: Callable[[Any], Any]) -> Callable[[list[Any]], pa.Array]:
    """Convert to JSON text what `read` returns, and to null what it finds empty."""

    def convert(values: list[Any]) -> pa.Array:
        contents = [read(value) for value in values]
        texts = [None if content is None else json.dumps(content, ensure_ascii=False) for content in contents]
        return pa.array(texts, pa.large_string())

    return convert


class _Type(NamedTuple):
    arrow: pa.DataType  # null for what is checked and not kept
    words: str
    convert: Callable[[list[Any]], pa.Array]
    fix: str = _CORRECT


_UNPACK = "Give each text of a packed row as a row of its own."
_JSON = pa.large_string()
_ID_LIST = pa.list_(pa.int64())
_OBJECTS = "a list of objects, or null"
_TYPES: dict[str, _Type] = {
    **dict.fromkeys(
        ("text", "text_pair", "prompt", "completion", "teacher_prompt"), _Type(pa.large_string(), "text", _texts)
    ),
    "label": _Type(pa.large_string(), "the name or number of a class, or a number", _labels),
    **dict.fromkeys(("messages", "teacher_messages"), _Type(_JSON, MESSAGES, _conversations)),
    "tools": _Type(_JSON, _OBJECTS, _as_json(read_tools)),
    "documents": _Type(_JSON, _OBJECTS, _as_json(read_objects)),
    "chat_template_kwargs": _Type(_JSON, "an object, or null", _as_json(read_object)),
    "num_prompt_messages": _Type(pa.int32(), "a number of messages", lambda values: pa.array(values, pa.int32())),
    **dict.fromkeys(("input_ids", *TEACHER_ID_COLUMNS), _Type(_ID_LIST, "a list of whole numbers", _id_lists)),
    **dict.fromkeys(
        ("labels", *WRITTEN_COLUMNS), _Type(_ID_LIST, "a list of whole numbers, or null", _optional_id_lists)
    ),
    "attention_mask": _Type(_ID_LIST, "a list of 0 and 1, or null", _masks),
    "weights": _Type(pa.list_(pa.float32()), "a list of numbers >= 0", _weight_lists),
    "weight": _Type(pa.float32(), "a number >= 0", _weights),
    "position_ids": _Type(pa.null(), "positions of one text, 0, 1, 2, ...,", _positions, _UNPACK),
    **dict.fromkeys(NUMBERS, _Type(pa.null(), "one number of a sequence in all of a row", _one_sequence, _UNPACK)),
    "token_type_ids": _Type(
        pa.null(),
        "token types of one text, all 0,",
        _token_types,
        "Name the column in ignore if models do not need it.",
    ),
    **dict.fromkeys(SPAN_COLUMNS, _Type(_ID_LIST, "the start and end of a span, or null", _spans)),
}
