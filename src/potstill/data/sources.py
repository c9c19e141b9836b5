"""Data sources: a file, and which of its columns have which meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from potstill.data.token_weights import SPAN_COLUMNS, SpanWeights
from potstill.errors import DataError, nearest
from potstill.losses.alignment import SEQUENCE_TASKS, Task
from potstill.losses.declared import Record

SourceKind = Literal["text", "completion", "messages", "input_ids", "labelled"]

COLUMNS: dict[SourceKind, tuple[str, ...]] = {  # by which a kind is recognised
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "input_ids": ("input_ids",),
}
OPTIONAL_ID_COLUMNS = ("labels", "attention_mask", "weights")  # read with input_ids where the file has them
# The prompt that the teacher reads in place of the student's: its standard column by kind. Of ids both or none.
TEACHER_PROMPT_COLUMNS: dict[SourceKind, str] = {"completion": "teacher_prompt", "messages": "teacher_messages"}
TEACHER_ID_COLUMNS = ("teacher_input_ids", "teacher_labels")


@dataclass(frozen=True)
class Source(Record):
    """A data file and the names of its columns. Without a column's name the standard ones are looked for: text, prompt
    and completion, messages, input_ids; text, text_pair and label for classification and regression.

    Args:
        path: a .jsonl, .json, .csv, .parquet or .txt file, or a folder written by `Dataset.save_to_disk`. A .txt is one
            document, in a column named text.
        field: the column of plain text.
        prompt: the column of prompts; needs completion. Only completions have a loss.
        completion: the column of completions; needs prompt.
        messages: the column of conversations, each a list of {role, content, ...} or that list as JSON text; only the
            assistant's turns have a loss.
        input_ids: the column of token ids; columns named labels and weights are read with it, and teacher_input_ids
            with teacher_labels.
        teacher_prompt: the column of what the teacher reads before the same answer, in place of the prompt: text beside
            prompts; a list of messages beside conversations, in place of all before the assistant's first turn.
        pair: the column of second texts, for classification and regression; a column named text_pair is read by itself.
        label: the column of classes (names or numbers) or of numbers, for classification and regression.
        weight: the column of loss weights of rows, which all tokens of a row have; not for plain text.
        span_weights: loss weights of tokens by the spans of the row; see `potstill.data.token_weights`.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.span_weights, Mapping):
            object.__setattr__(self, "span_weights", SpanWeights(**self.span_weights))


def choose_columns(source: Source, columns: list[str], task: Task) -> tuple[SourceKind, dict[str, str]]:
    """Choose the kind of source, and for each standard column of that kind the file's own, of all its columns."""
    file = Path(source.path).name
    if task in SEQUENCE_TASKS:
        names = {"text": source.field or "text", "label": source.label or "label"}
        if source.pair or "text_pair" in columns:
            names["text_pair"] = source.pair or "text_pair"
        return "labelled", _require_columns(names, columns, file)
    given = {
        kind: {name: getattr(source, "field" if name == "text" else name) for name in names}
        for kind, names in COLUMNS.items()
    }
    kinds = [kind for kind, chosen in given.items() if any(name is not None for name in chosen.values())]
    if len(kinds) > 1:
        raise DataError(
            f"data: expected columns of one kind for {file}, got "
            f"{' and '.join(kind.replace('text', 'field') for kind in kinds)}. Name one of field, prompt with "
            "completion, messages or input_ids."
        )
    kind = kinds[0] if kinds else _find_kind(columns, file)
    names = given[kind] if kinds else {name: name for name in COLUMNS[kind]}
    absent = [standard for standard, name in names.items() if name is None]
    if absent:
        raise DataError(
            f"data: expected both prompt and completion for {file}, got no {absent[0]}. Name its column too."
        )
    if kind == "input_ids":
        names |= {name: name for name in OPTIONAL_ID_COLUMNS if name in columns}
        names |= {name: name for name in TEACHER_ID_COLUMNS if set(TEACHER_ID_COLUMNS) <= set(columns)}
    if source.teacher_prompt is not None:
        if kind not in TEACHER_PROMPT_COLUMNS:
            raise DataError(
                f"data: expected answers for the teacher's own prompts in {file}, got {kind}. Both read one answer "
                "behind prompts of their own. Give prompt and completion, or messages."
            )
        names[TEACHER_PROMPT_COLUMNS[kind]] = source.teacher_prompt
    if source.weight is not None:
        if kind == "text":
            raise DataError(
                f"data: expected rows that are no plain text for a column of weights, got text in {file}. "
                "Give prompt and completion, messages or input_ids."
            )
        names["weight"] = source.weight
    if source.span_weights is not None:
        if kind not in ("completion", "messages"):
            raise DataError(
                f"data: expected prompt and completion, or messages, for span_weights, got {kind} in {file}. "
                "Spans are places in a completion."
            )
        names |= {name: name for name in SPAN_COLUMNS}
    return kind, _require_columns(names, columns, file)


def _find_kind(columns: list[str], file: str) -> SourceKind:
    kinds = [kind for kind, names in COLUMNS.items() if set(names) <= set(columns)]
    if not kinds:
        raise DataError(
            f"data: expected a column text, messages or input_ids, or both prompt and completion, in {file}, got "
            f"{listed(columns)}. Name the one to read, as in `field: {columns[0] if columns else 'text'}`."
        )
    if len(kinds) > 1:
        ambiguous = [name for kind in kinds for name in COLUMNS[kind]]
        raise DataError(
            f"data: expected columns of one kind in {file}, got {listed(ambiguous)}. "
            "Name those to read: field, prompt with completion, messages or input_ids."
        )
    return kinds[0]


def _require_columns(names: dict[str, str], columns: list[str], file: str) -> dict[str, str]:
    for name in names.values():
        if name not in columns:
            raise DataError(
                f"data: expected a column {name!r} in {file}, got {listed(columns)}.{nearest(name, columns)} "
                "Name one of these."
            )
    return names


def listed(names: Sequence[str], most: int = 12) -> str:
    """Join names for an error, the first dozen of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
