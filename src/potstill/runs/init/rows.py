"""What a file's first rows tell: which columns to read, and how long the rows are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.data.batches import encode
from potstill.data.loading import require_file
from potstill.data.readers import Table, open_table, reading
from potstill.data.sources import Source
from potstill.errors import DataError
from potstill.losses.alignment import SEQUENCE_TASKS, Task
from potstill.runs.build_task import classes_of
from potstill.runs.init.models import Model

LOOKED_AT = 500  # rows
CHARACTERS = 20_000  # of a plain text: a book is not read to its end

# What columns are called, by the recipe's key. The first of a list that is there is taken.
TEXTS = ("text", "content", "document", "body", "sentence", "sentence1", "text1", "premise")
PAIRS = ("text_pair", "sentence2", "text2", "hypothesis")
LABELS = ("label", "labels", "class", "score", "target")
MESSAGES = ("messages", "conversations", "conversation")
ANSWERED = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)


@dataclass(frozen=True)
class Rows:
    """A file's first rows.

    Args:
        columns: the recipe's key (field, prompt, ...) -> the column.
        count: how many were looked at.
        whole: whether there are no others.
        longest: tokens of the longest; a plain text has no more than the model's positions.
        tokens: how many count in them.
    """

    columns: dict[str, str]
    count: int
    whole: bool
    longest: int
    tokens: int


def table_of(path: Path) -> Table:
    """The columns of a file.

    Raises:
        DataError: it is not there, empty, or not of its format.
    """
    path = path.expanduser()
    require_file(path)
    with reading(path):
        return open_table(path)


def find_columns(path: Path, names: Sequence[str], task: Task, given: Mapping[str, str]) -> dict[str, str]:
    """Which columns a task reads, by the recipe's keys.

    Args:
        path: of the file, for errors.
        names: its columns.
        task: what the rows are for.
        given: those that are named already; nothing is guessed beside them where the rows are not judged.

    Raises:
        DataError: none is plainly meant, or several kinds are.
    """
    if task in SEQUENCE_TASKS:
        found = {"field": _first(TEXTS, names), "pair": _first(PAIRS, names), "label": _first(LABELS, names), **given}
        missing = [key for key in ("field", "label") if found[key] is None]
        if missing:
            raise _unclear(path, names, f"columns for the task {task}", " and ".join(f"--{key}" for key in missing))
        return {key: name for key, name in found.items() if name is not None}
    if given:
        return dict(given)
    text = _first(TEXTS, names)
    kinds: list[dict[str, str]] = [] if text is None else [{"field": text}]
    if task in ("causal", "masked"):
        kinds += [{"messages": name} for name in MESSAGES if name in names][:1]
        kinds += [dict(zip(("prompt", "completion"), pair, strict=True)) for pair in ANSWERED if {*pair} <= {*names}][
            :1
        ]
        kinds += [{"input_ids": "input_ids"}] if "input_ids" in names else []
    if not kinds and len(names) == 1:
        kinds = [{"field": names[0]}]
    if len(kinds) != 1:
        flags = "--field, --messages, or --prompt with --completion" if task in ("causal", "masked") else "--field"
        raise _unclear(path, names, "columns of one kind", flags)
    return kinds[0]


def look_at_rows(
    path: Path, given: Mapping[str, str], teacher: Model, tokenizer: PreTrainedTokenizerBase, positions: int
) -> Rows:
    """Read and encode a file's first rows as a run would.

    Args:
        path: the file.
        given: columns that are named already.
        teacher: whose task, and whose classes, the rows are for.
        tokenizer: the student's.
        positions: tokens in a row at most.

    Raises:
        DataError: the rows are not usable.
    """
    table = table_of(path)
    columns = find_columns(path, table.columns, teacher.task, given)
    with reading(path):
        read = islice(_rows(table, list(columns.values()), path), LOOKED_AT + 1)
        rows = [_shortened(row, columns) for row in read]
    whole = len(rows) <= LOOKED_AT
    with tempfile.TemporaryDirectory() as folder:
        beginning = Path(folder) / f"{path.stem}.jsonl"
        lines = (json.dumps(row, default=str) + "\n" for row in rows[:LOOKED_AT])
        beginning.write_text("".join(lines), encoding="utf-8")
        found = encode(
            Source(beginning, **columns),  # type: ignore[arg-type]  # all of them are columns
            tokenizer,
            max_length=positions,
            task=teacher.task,
            classes=classes_of(teacher.config),
        )
    longest = max(len(found.dataset[i]["input_ids"]) for i in range(len(found.dataset)))
    return Rows(columns, min(len(rows), LOOKED_AT), whole, longest, found.tokens)


def _rows(table: Table, names: list[str], path: Path) -> Iterator[dict[str, Any]]:
    for name in names:
        if name not in table.columns:
            raise _unclear(path, table.columns, f"a column {name!r}", "one of these")
    for batch in table.read(names):
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


def _shortened(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    text = row.get(columns.get("field", ""))
    return row | {columns["field"]: text[:CHARACTERS]} if isinstance(text, str) else row


def _first(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _unclear(path: Path, names: Sequence[str], wanted: str, flags: str) -> DataError:
    return DataError(f"data: expected {wanted} in {path.name}, got {', '.join(names)}. Say which with {flags}.")
