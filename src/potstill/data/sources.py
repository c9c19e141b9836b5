"""From a file to a memory-mapped dataset whose columns have their standard names and types."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from datasets import Dataset

from potstill.data.disk_cache import cache_path, write_arrow
from potstill.data.files import digest
from potstill.data.readers import SUFFIXES, Table, empty, open_table, reading, said
from potstill.data.weighing import SPANS, SpanWeights
from potstill.errors import DataError
from potstill.losses.alignment import SEQUENCE_TASKS, Task

Kind = Literal["text", "completion", "messages", "input_ids", "labelled"]

COLUMNS: dict[Kind, tuple[str, ...]] = {  # by which a kind is found
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "input_ids": ("input_ids",),
}
COMPANIONS = ("labels", "attention_mask", "weights")  # taken along with input_ids when they are there
# The same text as the teacher is to read it: the name of its column here, by kind. Of ids both or none.
OWN_PROMPT: dict[Kind, str] = {"completion": "teacher_prompt", "messages": "teacher_messages"}
OWN_IDS = ("teacher_input_ids", "teacher_labels")


@dataclass(frozen=True)
class Source:
    """A file and the names of its columns.

    With no column named, the kind is found by the standard names: text, prompt and completion, messages, or
    input_ids.

    Args:
        path: a .jsonl, .json, .csv, .parquet or .txt file, or a folder written by `Dataset.save_to_disk`. A .txt
            is one document, in a column named text.
        field: the column of documents.
        prompt: the column of what is given; needs `completion`.
        completion: the column of what is to be said; needs `prompt`.
        messages: the column of conversations, each a list of {role, content, ...} or that list as JSON text.
        input_ids: the column of token ids; columns named labels and weights are taken along, and teacher_input_ids with
            teacher_labels.
        teacher_prompt: the column of what the teacher reads instead before the same answer: text beside prompts, a list
            of messages beside conversations, in place of all before the assistant's first turn.
        pair: the column of second texts, where rows are judged; a column named text_pair is taken along.
        label: the column of classes or numbers, where rows are judged; default: label.
        weight: the column of how much a row's tokens count, for rows that are no plain text.
        span_weights: how much a token of the `reasoning`, of the `answer` and any `other` token counts, by the columns
            reasoning_span and answer_span (characters of the completion, or of the last message); see
            `potstill.data.weighing.token_weights`.
    """

    path: str | Path
    field: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    input_ids: str | None = None
    teacher_prompt: str | None = None
    pair: str | None = None
    label: str | None = None
    weight: str | None = None
    span_weights: SpanWeights | None = None


def load(source: Source, task: Task = "causal") -> tuple[Dataset, Kind]:
    """Read a file into a memory-mapped dataset with the standard columns of its kind.

    Row i of the dataset is row i + 1 of the file; empty rows are there too. The columns are text; or prompt and
    completion; or messages, each conversation as JSON text, because Arrow would give every message the keys of all
    others; or input_ids, with labels, attention_mask and weights where the file has them. With them come weight,
    reasoning_span and answer_span where the source asks for them. For the tasks classification and
    regression they are text, text_pair where there is one, and label, as text.

    Returns:
        The dataset and its kind.

    Raises:
        DataError: the file is missing, empty or not of its format, a column is missing, the kind is ambiguous, or
            a row holds something else than its kind does.
    """
    path = Path(source.path).expanduser()
    require_file(path)
    with reading(path):
        table = open_table(path)
        chosen = _labelled if task in SEQUENCE_TASKS else _choose
        kind, names = chosen(source, table.columns, path.name)
        kept = cache_path(["source", digest(path), path.suffix.lower(), names])
    if not kept.exists():
        schema = pa.schema({standard: _TYPES[standard].arrow for standard in names})
        write_arrow(kept, schema, _checked(table, names, schema, path))
    dataset = Dataset.from_file(str(kept))
    if not len(dataset):
        raise empty(path)
    return dataset, kind


def require_file(path: Path) -> None:
    """See that there is a file that can be read, with something in it, or a folder.

    Raises:
        DataError: there is none.
    """
    if not path.exists():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"data: expected a file, got {path}, which does not exist.{_nearest(path.name, beside)} Correct the path."
        )
    if path.is_dir():
        return
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"data: expected a file that ends in one of {_listed(SUFFIXES)}, got {path.name}. "
            "Rename or convert it; JSON Lines hold any text."
        )
    if path.stat().st_size == 0:
        raise empty(path)


# Which columns


def _choose(source: Source, columns: list[str], file: str) -> tuple[Kind, dict[str, str]]:
    """The kind, and for each of its standard columns the name in the file."""
    asked: dict[Kind, dict[str, str | None]] = {
        "text": {"text": source.field},
        "completion": {"prompt": source.prompt, "completion": source.completion},
        "messages": {"messages": source.messages},
        "input_ids": {"input_ids": source.input_ids},
    }
    kinds = [kind for kind, names in asked.items() if any(name is not None for name in names.values())]
    if len(kinds) > 1:
        raise DataError(
            f"data: expected columns of one kind for {file}, got "
            f"{' and '.join(kind.replace('text', 'field') for kind in kinds)}. Name one of field, prompt with "
            "completion, messages or input_ids."
        )
    kind = kinds[0] if kinds else _find_kind(columns, file)
    names = asked[kind] if kinds else {name: name for name in COLUMNS[kind]}
    found = {standard: _require_column(name, standard, columns, file) for standard, name in names.items()}
    if kind == "input_ids":
        found |= {name: name for name in COMPANIONS if name in columns}
        found |= {name: name for name in OWN_IDS if set(OWN_IDS) <= set(columns)}
    if source.teacher_prompt is not None:
        if kind not in OWN_PROMPT:
            raise DataError(
                f"data: expected answers for the teacher's own prompts in {file}, got {kind}. Both read one answer "
                "behind prompts of their own. Give prompt and completion, or messages."
            )
        found[OWN_PROMPT[kind]] = _require_column(source.teacher_prompt, "teacher_prompt", columns, file)
    return kind, found | _weighing(source, kind, columns, file)


def _weighing(source: Source, kind: Kind, columns: list[str], file: str) -> dict[str, str]:
    """The columns that say how much counts."""
    if source.weight is not None and kind == "text":
        raise DataError(
            f"data: expected rows that are no plain text for a column of weights, got text in {file}. "
            "Give prompt and completion, messages or input_ids."
        )
    if source.span_weights is not None and kind not in ("completion", "messages"):
        raise DataError(
            f"data: expected prompt and completion, or messages, for span_weights, got {kind} in {file}. "
            "Spans are places in a completion."
        )
    found = {} if source.weight is None else {"weight": _require_column(source.weight, "weight", columns, file)}
    if source.span_weights is not None:
        found |= {name: _require_column(name, name, columns, file) for name in SPANS}
    return found


def _labelled(source: Source, columns: list[str], file: str) -> tuple[Kind, dict[str, str]]:
    """The columns of rows that are judged."""
    names = {"text": source.field or "text", "label": source.label or "label"}
    if source.pair or "text_pair" in columns:
        names["text_pair"] = source.pair or "text_pair"
    found = {standard: _require_column(name, standard, columns, file) for standard, name in names.items()}
    return "labelled", found


def _find_kind(columns: list[str], file: str) -> Kind:
    kinds = [kind for kind, names in COLUMNS.items() if set(names) <= set(columns)]
    if not kinds:
        raise DataError(
            f"data: expected a column text, messages or input_ids, or both prompt and completion, in {file}, got "
            f"{_listed(columns)}. Say which to read, as in `field: {columns[0] if columns else 'text'}`."
        )
    if len(kinds) > 1:
        found = [name for kind in kinds for name in COLUMNS[kind]]
        raise DataError(
            f"data: expected columns of one kind in {file}, got {_listed(found)}. "
            "Say which to read: field, prompt with completion, messages or input_ids."
        )
    return kinds[0]


def _require_column(name: str | None, standard: str, columns: list[str], file: str) -> str:
    if name is None:
        raise DataError(
            f"data: expected both prompt and completion for {file}, got no {standard}. Name its column too."
        )
    if name not in columns:
        raise DataError(
            f"data: expected a column {name!r} in {file}, got {_listed(columns)}.{_nearest(name, columns)} "
            "Name one of these."
        )
    return name


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


# What a row must hold


def _checked(table: Table, names: dict[str, str], schema: pa.Schema, path: Path) -> Iterator[pa.RecordBatch]:
    row = 1
    with reading(path):
        for batch in table.read(list(dict.fromkeys(names.values()))):
            arrays = [_convert(batch[name], standard, name, row, path) for standard, name in names.items()]
            yield pa.record_batch(arrays, schema=schema)
            row += len(arrays[0])


_MISFITS = (TypeError, ValueError, OverflowError)  # what Arrow and the converters below raise


def _convert(values: list[Any], standard: str, name: str, first_row: int, path: Path) -> pa.Array:
    """The values as an Arrow array, or an error that says which row does not fit."""
    expected = _TYPES[standard]
    try:
        return expected.convert(values)
    except _MISFITS:
        for row, value in enumerate(values, first_row):
            try:
                expected.convert([value])
            except UnicodeEncodeError:
                got = "half of a surrogate pair"
            except _MISFITS:
                got = said(value)
            else:
                continue
            raise DataError(
                f"data: expected {expected.words} in column {name!r} of {path.name}, got {got} in row {row}. "
                "Correct or remove the row."
            ) from None
        raise


def _texts(values: list[Any]) -> pa.Array:
    return _without_null(pa.array(values, type=pa.large_string()))


def _labels(values: list[Any]) -> pa.Array:
    if any(isinstance(value, bool) or not isinstance(value, str | int | float) for value in values):
        raise TypeError("neither text nor numbers")
    return _texts([str(value).strip() for value in values])


def _id_lists(values: list[Any]) -> pa.Array:
    # The type is inferred first, because Arrow that is asked for integers cuts 1.5 to 1.
    array = pa.array(values)
    if not pa.types.is_list(array.type) or not (
        pa.types.is_integer(array.type.value_type) or pa.types.is_null(array.type.value_type)
    ):
        raise TypeError("not lists of whole numbers")
    _without_null(array.flatten())
    return _without_null(array).cast(pa.list_(pa.int64()))


def _weights(values: list[Any]) -> pa.Array:
    if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in values):
        raise TypeError("not weights")
    return pa.array(values, type=pa.float32())


def _weight_lists(values: list[Any]) -> pa.Array:
    for value in values:
        _weights(value)
    return _without_null(pa.array(values, type=pa.list_(pa.float32())))


def _spans(values: list[Any]) -> pa.Array:
    for value in values:
        if value is not None and not _is_span(value):
            raise TypeError("not a span")
    return pa.array(values, type=pa.list_(pa.int64()))


def _is_span(value: Any) -> bool:
    whole = isinstance(value, list) and [type(place) for place in value] == [int, int]
    return whole and 0 <= value[0] <= value[1]


def _without_null(array: pa.Array) -> pa.Array:
    if array.null_count:
        raise TypeError("null")
    return array


def _conversations(values: list[Any]) -> pa.Array:
    return _texts([_conversation(value) for value in values])


def _conversation(value: Any) -> str:
    messages = json.loads(value) if isinstance(value, str) else value
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise TypeError("not a list of messages")
    return json.dumps(messages, ensure_ascii=False)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str | list | None)


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
    **dict.fromkeys(("input_ids", "labels", "attention_mask", *OWN_IDS), _IDS),
    "weights": _Type(pa.list_(pa.float32()), "a list of numbers >= 0", _weight_lists),
    "weight": _Type(pa.float32(), "a number >= 0", _weights),
    **dict.fromkeys(SPANS, _Type(pa.list_(pa.int64()), "the start and end of a span, or null", _spans)),
}
