"""Requests to a teacher, and the rows of a file that they are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from potstill.data.locate import LocalFiles, locate
from potstill.data.readers import is_json, is_json_lines, numbered_json, reading
from potstill.data.sources import Source
from potstill.errors import DataError, one_line

Message = dict[str, Any]
NumberedRow = tuple[int, dict[str, Any]]
UnusableRow = tuple[int, str]  # a row that no request can be made of, and the reason
# What a chat template reads beside messages: columns of these names, as JSON text or as they are.
CHAT_COLUMNS: dict[str, type] = {"tools": list, "documents": list, "chat_template_kwargs": dict}


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt for the teacher. Without a chat template it is the content of its one message."""

    number: int  # of the row in its file (in JSON Lines, its line), or its place in a list
    task: str  # chain_of_thought, program_of_thought, instructions or responses
    template: str  # its name, or the template itself
    messages: list[Message]
    source: dict[str, Any]  # the columns of the row, unchanged
    question: str | None = None  # without the template
    gold: str | None = None  # the known answer
    chat: dict[str, Any] = field(default_factory=dict)  # the CHAT_COLUMNS that hold something

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is given beside the messages."""
        named = {name: value for name, value in self.chat.items() if name != "chat_template_kwargs"}
        return {**self.chat.get("chat_template_kwargs", {}), **named}

    def with_arguments(self, arguments: dict[str, Any]) -> GenerationRequest:
        """Add arguments of the chat template; those of the row have precedence."""
        named = {**arguments, **self.chat.get("chat_template_kwargs", {})}
        return replace(self, chat={**self.chat, "chat_template_kwargs": named})


def chat_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Read the CHAT_COLUMNS that hold something; a ValueError says which one holds something else."""
    columns: dict[str, Any] = {}
    for name, kind in CHAT_COLUMNS.items():
        value = row.get(name)
        with suppress(ValueError):
            value = json.loads(value) if isinstance(value, str) and value else value
        if value and not isinstance(value, kind):
            raise ValueError(
                f"expected {'a list' if kind is list else 'an object'} in {name!r}, got {str(value)[:40]!r}"
            )
        columns |= {name: value} if value else {}
    return columns


def read_rows(
    file: str, problem: Callable[[dict[str, Any]], str | None], skip_bad: bool
) -> tuple[list[NumberedRow], list[UnusableRow]]:
    """Read the rows of a file with their numbers and all columns, and those that are not usable.

    In JSON Lines a row's number is its line. Unusable rows are an error unless they are skipped.
    """
    location, title = locate(Source(file)), Source(file).title
    files = location.paths if isinstance(location, LocalFiles) else ()
    values: Iterable[tuple[int, Any]] = enumerate(location.rows(), 1)
    if files and all(map(is_json, files)):  # a row keeps its own keys, and a bad line does not end the reading
        parsed = [numbered_json(path) for path in files]
        values = parsed[0] if len(files) == 1 else enumerate((value for _, value in chain(*parsed)), 1)
    rows: list[NumberedRow] = []
    bad: list[UnusableRow] = []
    with reading(Path(file)):
        for number, value in values:
            reason = problem(value) if isinstance(value, dict) else _not_an_object(value)
            if reason is None:
                rows.append((number, value))
            else:
                bad.append((number, reason))
    if bad and not skip_bad:
        unit = "line" if len(files) == 1 and is_json_lines(files[0]) else "row"
        reasons = [f"{unit} {number}: {reason}" for number, reason in bad[:5]]
        reasons += [f"and {len(bad) - 5} more"] if len(bad) > 5 else []
        raise DataError(
            f"data: expected usable rows in {title}, got {len(bad)} bad of {len(bad) + len(rows)}: "
            f"{'; '.join(reasons)}. Correct them, or set skip_bad_rows to true."
        )
    if not rows:
        raise DataError(f"data: expected at least one usable row in {title}, got none. Give a file with data.")
    return rows, bad


def _not_an_object(value: Any) -> str:
    if isinstance(value, UnicodeDecodeError):
        return f"expected UTF-8, got the byte 0x{value.object[value.start]:02x}"
    if isinstance(value, json.JSONDecodeError):
        return f"expected JSON, got {one_line(value, 200)!r}" if value.doc else "expected a row, got an empty line"
    return f"expected an object, got {type(value).__name__}"
