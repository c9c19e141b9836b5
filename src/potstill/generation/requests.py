"""Requests to a teacher, and the rows of a file that they are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.data.readers import is_json_lines, numbered_json, open_table, reading
from potstill.errors import DataError, one_line

Message = dict[str, Any]
NumberedRow = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt for the teacher.

    Args:
        number: of the row in its file (in JSON Lines, its line), or its place in a list.
        task: chain_of_thought, program_of_thought, instructions or responses.
        template: its name, or the template itself.
        messages: the conversation; without a chat template there is one message, and its content is the prompt.
        source: the columns of the row, unchanged.
        question: without the template.
        gold: the known answer, if there is one.
    """

    number: int
    task: str
    template: str
    messages: list[Message]
    source: dict[str, Any]
    question: str | None = None
    gold: str | None = None


@dataclass(frozen=True)
class UnusableRow:
    """A row that no request can be made of."""

    number: int
    reason: str


def conversation(value: Any) -> list[Message]:
    """Read a conversation from a list of messages or that list as JSON text."""
    return list(json.loads(value) if isinstance(value, str) else value)


# Each check gives what is wrong with a row, or None.


def text_problem(row: dict[str, Any], field: str) -> str | None:
    """Check that a field holds text."""
    if field not in row:
        return f"expected a field {field!r}, got {', '.join(row) or 'none'}"
    if not isinstance(row[field], str) or not row[field].strip():
        return f"expected a text in {field!r}, got {str(row[field])[:40]!r}"
    return None


def answer_problem(row: dict[str, Any], field: str) -> str | None:
    """Check that a field holds a known answer: a text or a number."""
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        return f"expected an answer in {field!r}, got {str(value)[:40]!r}"
    return None


def turn_problem(row: dict[str, Any], field: str) -> str | None:
    """Check that a field holds a conversation in which it is the assistant's turn."""
    try:
        roles = [message["role"] for message in conversation(row[field])]
    except (KeyError, TypeError, ValueError):
        return f"expected a list of messages in {field!r}, got {str(row.get(field))[:40]!r}"
    if not roles or roles[-1] in ("assistant", "system"):
        return f"expected a conversation that ends with the user or a tool, got {roles[-1] if roles else 'none'}"
    return None


def read_rows(
    path: Path, problem: Callable[[dict[str, Any]], str | None], skip_bad: bool
) -> tuple[list[NumberedRow], list[UnusableRow]]:
    """Read the rows of a file with their numbers and all columns, and those that are not usable.

    Args:
        path: a file of any format that a recipe reads. In JSON Lines a row's number is its line.
        problem: gives what is wrong with a row, or None.
        skip_bad: return unusable rows instead of raising.

    Raises:
        DataError: the file cannot be read, has no usable row, or has unusable ones and `skip_bad` is false.
    """
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"data: expected a file, got {path}, which does not exist. Correct the path.")
    rows: list[NumberedRow] = []
    bad: list[UnusableRow] = []
    with reading(path):
        for number, value in _numbered_values(path):
            reason = problem(value) if isinstance(value, dict) else _not_an_object(value)
            if reason is None:
                rows.append((number, value))
            else:
                bad.append(UnusableRow(number, reason))
    if bad and not skip_bad:
        unit = "line" if is_json_lines(path) else "row"
        reasons = [f"{unit} {row.number}: {row.reason}" for row in bad[:5]]
        reasons += [f"and {len(bad) - 5} more"] if len(bad) > 5 else []
        raise DataError(
            f"data: expected usable rows in {path.name}, got {len(bad)} bad of {len(bad) + len(rows)}: "
            f"{'; '.join(reasons)}. Correct them, or set skip_bad_rows to true."
        )
    if not rows:
        raise DataError(f"data: expected at least one usable row in {path.name}, got none. Give a file with data.")
    return rows, bad


def _numbered_values(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix.lower() in (".json", ".jsonl") and not path.is_dir():
        return numbered_json(path)
    return enumerate(open_table(path).rows(), 1)


def _not_an_object(value: Any) -> str:
    if isinstance(value, UnicodeDecodeError):
        return f"expected UTF-8, got the byte 0x{value.object[value.start]:02x}"
    if isinstance(value, json.JSONDecodeError):
        return f"expected JSON, got {one_line(value, 200)!r}" if value.doc else "expected a row, got an empty line"
    return f"expected an object, got {type(value).__name__}"
