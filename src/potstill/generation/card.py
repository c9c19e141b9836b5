"""The files of generated data: rows, dropped rows, and a card that says what they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from potstill.data.files import atomic_path, write_text
from potstill.generation.requests import Bad


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON Lines or Parquet, by the suffix; no rows give an empty file.

    In Parquet what has keys of its own in each row (messages, tools) is JSON text, because a column has one type there.
    """
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: _column(name, [row.get(name) for row in rows]) for name in columns})
    with atomic_path(path) as partial:
        parquet.write_table(table, partial)


def _column(name: str, values: list[Any]) -> pa.Array:
    if name.endswith("_span"):
        return pa.array(values, pa.list_(pa.int64()))
    if any(isinstance(value, dict | list) for value in values) and name != "provenance":
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array([_encodable(value) for value in values])


def _encodable(value: Any) -> Any:
    """Without halves of surrogate pairs, which no file of text can hold."""
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else value


def write_card(
    path: Path,
    *,
    name: str,
    facts: dict[str, str],
    counts: dict[str, int],
    dropped: Sequence[tuple[str, str, str]],
    lengths: Sequence[int],
    bad: Sequence[Bad],
) -> None:
    """Write the data card.

    Args:
        path: README.md.
        name: of the data.
        facts: what it was made with.
        counts: how many there were at each stage, from asks to rows.
        dropped: for each dropped text the filter, the reason and the text.
        lengths: characters of each row's completion.
        bad: rows of the source that could not be used.
    """
    lines = [f"# {_cell(name)}", ""]
    lines += ["Written by a teacher model, for a student to learn from.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in facts.items()]
    lines += ["", "## Counts", "", "| | |", "|---|---|", *(f"| {key} | {count:,} |" for key, count in counts.items())]
    lines += ["", "## Dropped", "", *_dropped(dropped)]
    lines += ["", "## Lengths", "", *_histogram(lengths)]
    if bad:
        lines += ["", "## Rows of the source that could not be used", ""]
        lines += [f"- {one.number}: {_cell(one.reason)}" for one in bad[:100]]
        lines += [f"- and {len(bad) - 100:,} more"] if len(bad) > 100 else []
    write_text(path, "\n".join(lines) + "\n")


def _dropped(dropped: Sequence[tuple[str, str, str]]) -> list[str]:
    if not dropped:
        return ["Nothing."]
    counts = Counter(name for name, _, _ in dropped)
    lines = ["They are in the file `dropped`, with the reason. An example of each:", ""]
    lines += ["| filter | texts | such as | why |", "|---|---|---|---|"]
    for name, count in counts.most_common():
        _, reason, text = next(one for one in dropped if one[0] == name)
        lines.append(f"| {name} | {count:,} | {_cell(text[:80])} | {_cell(reason)} |")
    return lines


def _histogram(lengths: Sequence[int]) -> list[str]:
    """How many rows have how many characters, in powers of two."""
    if not lengths:
        return ["No rows."]
    counts = Counter(max(length, 1).bit_length() for length in lengths)
    most = max(counts.values())
    lines = ["| characters | rows | |", "|---|---|---|"]
    for bits in range(min(counts), max(counts) + 1):
        bar = "█" * round(30 * counts[bits] / most)
        lines.append(f"| {2 ** (bits - 1):,} to {2**bits - 1:,} | {counts[bits]:,} | {bar} |")
    return lines


def _cell(text: str) -> str:
    """On one line of a table, and never as HTML or Markdown."""
    line = " ".join(str(text).split())
    for sign in "\\`*_[]<>|#":
        line = line.replace(sign, {"<": "&lt;", ">": "&gt;"}.get(sign, f"\\{sign}"))
    return line
