"""What a teacher is asked: questions under a template, topics by kinds of tasks, conversations to go on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.data.readers import one_line, open_table, reading
from potstill.errors import DataError
from potstill.generation.reasoning import TEMPLATES, fill, parse, template

PROGRAM_TEMPLATES = {
    "python": (
        "{question}\n\nWrite a Python program that computes the answer and prints it, and nothing else, with print(). "
        "Use the standard library only, and read no input. Put the program between ```python and ```."
    )
}
INSTRUCTIONS = {
    "explain": "Explain {question} to someone who has never heard of it.",
    "summarise": "Summarise in a few sentences what matters most about {question}.",
    "analyse": "Analyse {question}: what it consists of, and how its parts work together.",
    "compare": "Compare the most common approaches to {question}, and say when each fits.",
    "list": "List the main parts of {question}, with one sentence on each.",
    "evaluate": "Evaluate {question}: what speaks for it, what against it, and what follows?",
}

Message = dict[str, Any]


@dataclass(frozen=True)
class GenerationRequest:
    """One thing that the teacher is asked.

    Args:
        number: of the row in its file (in JSON Lines, its line), or its place in a list.
        task: chain_of_thought, program_of_thought, instructions or responses.
        template: its name, or itself.
        messages: what is asked; without a chat template there is one, and its content is the prompt.
        source: the columns of the row, as they were.
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
class Bad:
    """A row that cannot be asked: where it is and what is wrong with it."""

    number: int
    reason: str


def question_asks(
    rows: list[tuple[int, dict[str, Any]]], task: str, name: str, field: str, gold: str | None
) -> list[GenerationRequest]:
    """Each row's question under a template of reasoning or programs; `gold` is the column of known answers."""
    text = template(name, PROGRAM_TEMPLATES if task == "program_of_thought" else TEMPLATES)
    asks = []
    for number, row in rows:
        known = None if gold is None else str(row[gold])
        answer = known if known is None else parse(known).answer or known.strip()
        messages = [{"role": "user", "content": fill(text, row[field])}]
        asks.append(GenerationRequest(number, task, name, messages, row, row[field], answer))
    return asks


def instruction_asks(topics: list[str], kinds: list[str]) -> list[GenerationRequest]:
    """Every kind of task for every topic."""
    pairs = [(topic, kind) for topic in topics for kind in kinds]
    return [
        GenerationRequest(
            number,
            "instructions",
            kind,
            [{"role": "user", "content": fill(template(kind, INSTRUCTIONS), topic)}],
            {"topic": topic, "kind": kind},
            topic,
        )
        for number, (topic, kind) in enumerate(pairs, 1)
    ]


def response_asks(
    rows: list[tuple[int, dict[str, Any]]], field: str | None, messages: str | None
) -> list[GenerationRequest]:
    """Each row's prompt, or its conversation to go on with."""
    asks = []
    for number, row in rows:
        asked = conversation(row[messages]) if messages else [{"role": "user", "content": row[field or "prompt"]}]
        asks.append(GenerationRequest(number, "responses", "none", asked, row))
    return asks


def conversation(value: Any) -> list[Message]:
    """A conversation, from a list of messages or that list as JSON text."""
    return list(json.loads(value) if isinstance(value, str) else value)


# What a row must hold


def lacks_text(field: str) -> Callable[[dict[str, Any]], str | None]:
    """A check that the row has a text there."""

    def check(row: dict[str, Any]) -> str | None:
        if field not in row:
            return f"expected a field {field!r}, got {', '.join(row) or 'none'}"
        if not isinstance(row[field], str) or not row[field].strip():
            return f"expected a text in {field!r}, got {str(row[field])[:40]!r}"
        return None

    return check


def lacks_answer(field: str) -> Callable[[dict[str, Any]], str | None]:
    """A check that the row has a known answer there: a text or a number."""

    def check(row: dict[str, Any]) -> str | None:
        value = row.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            return f"expected an answer in {field!r}, got {str(value)[:40]!r}"
        return None

    return check


def lacks_turn(field: str) -> Callable[[dict[str, Any]], str | None]:
    """A check that the row has a conversation there in which it is the assistant's turn."""

    def check(row: dict[str, Any]) -> str | None:
        try:
            messages = conversation(row[field])
            roles = [message["role"] for message in messages]
        except (KeyError, TypeError, ValueError):
            return f"expected a list of messages in {field!r}, got {str(row.get(field))[:40]!r}"
        if not roles or roles[-1] in ("assistant", "system"):
            return f"expected a conversation that ends with the user or a tool, got {roles[-1] if roles else 'none'}"
        return None

    return check


# Reading


def read_rows(
    path: Path, checks: list[Callable[[dict[str, Any]], str | None]], skip_bad: bool
) -> tuple[list[tuple[int, dict[str, Any]]], list[Bad]]:
    """The rows of a file with their numbers, all columns as they are, and those that are not usable.

    Args:
        path: a file of any format that a recipe reads. In JSON Lines a row's number is its line.
        checks: each says what a row lacks, or None.
        skip_bad: give the bad rows instead of raising.

    Raises:
        DataError: the file cannot be read, has no usable row, or has bad ones and `skip_bad` is false.
    """
    if not path.exists():
        raise DataError(f"data: expected a file, got {path}, which does not exist. Correct the path.")
    rows: list[tuple[int, dict[str, Any]]] = []
    bad: list[Bad] = []
    for number, row in _numbered(path):
        reason = row if isinstance(row, str) else next((why for check in checks if (why := check(row))), None)
        if reason is not None:
            bad.append(Bad(number, reason))
        elif isinstance(row, dict):
            rows.append((number, row))
    if bad and not skip_bad:
        told = "; ".join(f"{'line' if _is_lines(path) else 'row'} {one.number}: {one.reason}" for one in bad[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"data: expected usable rows in {path.name}, got {len(bad)} bad of {len(bad) + len(rows)}: {told}{more}. "
            "Correct them, or set skip_bad_rows to true."
        )
    if not rows:
        raise DataError(f"data: expected at least one usable row in {path.name}, got none. Give a file with data.")
    return rows, bad


def _is_lines(path: Path) -> bool:
    if path.suffix.lower() not in (".jsonl", ".json") or path.is_dir():
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"["


def _numbered(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each row with its number; a text where it is none, which says why."""
    if _is_lines(path):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, _json_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        return
    number = 0
    with reading(path):
        table = open_table(path)
        for batch in table.read(table.columns):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, dict(zip(batch, values, strict=True))


def _json_row(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"expected UTF-8, got the byte 0x{line[error.start]:02x}"
    except ValueError as error:
        return f"expected JSON, got {one_line(error)!r}" if line.strip() else "expected a row, got an empty line"
    return row if isinstance(row, dict) else f"expected an object, got {type(row).__name__}"
