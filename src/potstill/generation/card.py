"""Write the files of generated data: rows, dropped rows, and a data card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from potstill.data.sources import WRITTEN_COLUMNS
from potstill.errors import one_line
from potstill.files import atomic_path, write_text
from potstill.generation.requests import UnusableRow


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON Lines or Parquet, by the suffix; no rows give an empty file.

    In Parquet, columns whose objects have different keys in each row (messages, tools) are JSON text.
    """
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: _column(name, [row.get(name) for row in rows]) for name in columns})
    with atomic_path(path) as partial:
        parquet.write_table(table, partial)


def _column(name: str, values: list[Any]) -> pa.Array:
    if name.endswith("_span") or name in WRITTEN_COLUMNS:
        return pa.array(values, pa.list_(pa.int64()))
    if any(isinstance(value, dict | list) for value in values) and name != "provenance":
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    # Halves of surrogate pairs are replaced: no file of text can hold them.
    return pa.array([value.encode(errors="replace").decode() if isinstance(value, str) else value for value in values])


def write_card(
    path: Path,
    *,
    name: str,
    facts: dict[str, str],
    counts: dict[str, int],
    dropped: Sequence[tuple[str, str, str]],
    lengths: Sequence[int],
    bad: Sequence[UnusableRow],
    notes: Sequence[str] = (),
) -> None:
    """Write the data card. It has no YAML header, so that `datasets.load_dataset` finds the files by their names.

    Args:
        facts: teacher, task, sampling and so on.
        counts: how many there were at each stage, from requests to rows.
        dropped: the filter, the reason and the text of each dropped text.
        lengths: characters of each completion.
    """
    lines = [f"# {_escape(name)}", "", "Written by a teacher model, for a student to learn from.", ""]
    lines += [*_table(("", ""), facts.items()), ""]
    lines += ["## Counts", "", *_table(("", ""), ((key, f"{count:,}") for key, count in counts.items())), ""]
    lines += ["## Notes", "", *(f"- {_escape(note)}" for note in notes), ""] if notes else []
    lines += ["## Dropped", "", *_dropped(dropped), "", "## Lengths", "", *_histogram(lengths)]
    if bad:
        lines += ["", "## Rows of the source that could not be used", ""]
        lines += [f"- {number}: {_escape(reason)}" for number, reason in bad[:100]]
        lines += [f"- and {len(bad) - 100:,} more"] if len(bad) > 100 else []
    write_text(path, "\n".join(lines) + "\n")


def _dropped(dropped: Sequence[tuple[str, str, str]]) -> list[str]:
    if not dropped:
        return ["Nothing."]
    examples = {name: (text[:80], reason) for name, reason, text in reversed(dropped)}  # the first of each filter
    counts = Counter(name for name, _, _ in dropped)
    rows = [(name, f"{count:,}", *examples[name]) for name, count in counts.most_common()]
    lines = ["They are in the file `dropped`, with the reason. An example of each:", ""]
    return [*lines, *_table(("filter", "texts", "such as", "why"), rows)]


def _histogram(lengths: Sequence[int]) -> list[str]:
    """Count rows by their number of characters, in powers of two."""
    if not lengths:
        return ["No rows."]
    counts = Counter(max(length, 1).bit_length() for length in lengths)
    most = max(counts.values())
    rows = (
        (f"{2 ** (bits - 1):,} to {2**bits - 1:,}", f"{counts[bits]:,}", "█" * round(30 * counts[bits] / most))
        for bits in range(min(counts), max(counts) + 1)
    )
    return _table(("characters", "rows", ""), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows]


def _escape(text: str) -> str:
    """Put a text on one line, without HTML or Markdown."""
    entities = {"<": "&lt;", ">": "&gt;"}
    return "".join(entities.get(sign, f"\\{sign}" if sign in "\\`*_[]|#" else sign) for sign in one_line(text))
