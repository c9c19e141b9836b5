"""Held-out rows that are training rows too, and training rows that repeat, by their text and by their token ids.

Rows are compared by hashes of 8 bytes each, so that a million rows take 8 MB and some seconds.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from potstill.data.batches import Examples
from potstill.data.disk_cache import BATCH

Hashes = NDArray[np.uint64]

CONTENT = ("text", "text_pair", "prompt", "completion", "messages", "tools", "documents", "input_ids")  # of a row
MIN_TOKENS = 16  # of a row that is compared by its ids: the last windows of long texts are alike by chance
RUN = 8  # words that are compared as one
COVERED = 0.7  # of a row's runs of words: from there on it is nearly a duplicate
EMPTY = np.uint64(0)

_MULTIPLIERS = np.array([pow(0x9E3779B97F4A7C15, k + 1, 1 << 64) for k in range(RUN)], np.uint64)
_WORDS = re.compile(r"\d+(?:[.,]\d+)*|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d]+")


class Overlap(NamedTuple):
    """Held-out rows that are in the training data, and the first of them, counted from 1."""

    rows: int
    of: int
    held_out_row: int
    train_row: int

    @property
    def share(self) -> float:
        return self.rows / self.of


@dataclass(frozen=True)
class Duplicates:
    """What held-out and training data share.

    Args:
        share: of the held-out rows that are training rows, or nearly so where that was asked for.
        warnings: lines for the user about held-out rows that are not held out.
        notes: lines for the user about the training data alone.
    """

    share: float
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def find_duplicates(train: Examples, held_out: Examples, *, near: bool = False) -> Duplicates:
    """Compare training and held-out rows: their content, their prompts, and the ids that they are encoded to.

    Args:
        near: also look for held-out rows most of whose runs of 8 words stand in the training data, which takes some
            minutes for a million rows.

    References:
        Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, section 8: 70% of a row's runs of 8 words.
    """
    both = train, held_out
    sources = tuple([rows for _, rows in examples.sources] for examples in both)
    train_rows, held_rows = (hash_rows(chain(*map(_contents, rows))) for rows in sources)
    train_ids, held_ids = (hash_rows(_contents(examples.dataset, MIN_TOKENS)) for examples in both)
    texts = (chain(*map(_texts, rows)) for rows in sources)
    share, warnings = 0.0, []
    for overlap, what, place in (
        (find_overlap(train_rows, held_rows), "are training rows too", _row),
        (find_overlap(train_ids, held_ids), "have the token ids of a training row", _example),
        (find_covered(*texts) if near else None, "are nearly training rows too", _row),
    ):
        if overlap is not None and overlap.share > share:
            share = overlap.share
            warnings.append(_sentence(overlap, what, place, both))
    if prompts := _find_prompts(sources, np.isin(held_rows, train_rows)):
        warnings.append(_sentence(prompts, "have the prompt of a training row, with another answer", _row, both))
    rows, repeats = np.count_nonzero(train_rows), count_repeats(train_rows)
    notes = (f"data.train: {repeats:,} of {rows:,} rows repeat an earlier row.",) if repeats else ()
    return Duplicates(share, tuple(warnings), notes)


def hash_rows(contents: Iterable[bytes]) -> Hashes:
    """Hash each row; EMPTY for a row without content."""
    return np.frombuffer(
        b"".join(blake2b(content, digest_size=8).digest() if content else bytes(8) for content in contents), np.uint64
    )


def find_overlap(train: Hashes, held_out: Hashes) -> Overlap | None:
    """Find held-out rows that are training rows; None if there are none."""
    shared = np.isin(held_out, train) & (held_out != EMPTY)
    if not shared.any():
        return None
    first = int(shared.argmax())
    train_row = int((train == held_out[first]).argmax())
    return Overlap(int(shared.sum()), len(held_out), first + 1, train_row + 1)


def count_repeats(rows: Hashes) -> int:
    """Count the rows that repeat an earlier one."""
    filled = rows[rows != EMPTY]
    return len(filled) - len(np.unique(filled))


def find_covered(train: Iterable[str], held_out: Iterable[str]) -> Overlap | None:
    """Find held-out texts most of whose runs of words stand in training texts, in one of them or in several.

    Memory grows with the held-out texts alone.
    """
    runs, owners = (np.concatenate(arrays) for arrays in zip(*_runs(held_out), strict=True))
    known, places = np.unique(runs, return_inverse=True)
    train_row = np.zeros(len(known) + 1, np.int64)  # where a run stands first, from 1; the last is of all other runs
    for of_batch, rows in _runs(train):
        found = np.searchsorted(known, of_batch)
        found[np.append(known, EMPTY)[found] != of_batch] = len(known)
        new = train_row[found] == 0
        train_row[found[new][::-1]] = rows[new][::-1] + 1  # of several the first
        train_row[-1] = 0
    if not len(runs):
        return None
    hits = train_row[places]
    shares = np.bincount(owners, hits > 0) / np.bincount(owners).clip(min=1)
    if not (covered := shares >= COVERED).any():
        return None
    first = int(covered.argmax())
    of_first = hits[(owners == first) & (hits > 0)]
    return Overlap(int(covered.sum()), len(covered), first + 1, int(np.bincount(of_first).argmax()))


def words(text: str) -> list[str]:
    """Split a text into words in lower case; numbers, and characters of scripts without spaces, are one word each."""
    return _WORDS.findall(text.lower())


def _runs(texts: Iterable[str]) -> Iterator[tuple[Hashes, NDArray[np.int64]]]:
    """Hash the runs of words of texts, with the text's number from 0; a shorter text is one run, padded."""
    yield np.empty(0, np.uint64), np.empty(0, np.int64)
    numbered = enumerate(texts)
    while batch := [(number, words(text)) for number, text in islice(numbered, BATCH)]:
        padded = [(number, found + [""] * (RUN - len(found))) for number, found in batch if found]
        hashes = np.fromiter((_hash_word(word) for _, found in padded for word in found), np.uint64)
        owners = np.repeat([number for number, _ in padded], [len(found) for _, found in padded]).astype(np.int64)
        if len(hashes):
            whole = owners[: 1 - RUN] == owners[RUN - 1 :]
            windows = np.lib.stride_tricks.sliding_window_view(hashes, RUN)
            yield windows[whole] @ _MULTIPLIERS, owners[: 1 - RUN][whole]


@lru_cache(maxsize=1 << 16)
def _hash_word(word: str) -> int:
    return zlib.crc32(word.encode(errors="replace"))


def _once(rows: Hashes) -> Hashes:
    """The rows that stand there once: a prompt that all rows have is a form, not a question."""
    values, counts = np.unique(rows, return_counts=True)
    return np.where(np.isin(rows, values[counts == 1]), rows, EMPTY)


def _contents(dataset: Dataset, min_tokens: int = 1) -> Iterator[bytes]:
    """The content of each row, without the space around it; nothing for rows of fewer ids."""
    for columns in _batches(dataset, CONTENT):
        for values in zip(*(_as_bytes(column, min_tokens) for column in columns.values()), strict=True):
            yield b"\0".join(values) if any(values) else b""


def _batches(dataset: Dataset, names: Sequence[str]) -> Iterator[dict[str, pa.Array]]:
    names = [name for name in names if name in dataset.column_names]
    if names:
        for table in dataset.select_columns(names).with_format("arrow").iter(BATCH):
            yield {name: table[name].combine_chunks() for name in names}


def _as_bytes(column: pa.Array, min_tokens: int) -> Iterator[bytes]:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        ids = column.values.to_numpy()
        bounds = pairwise(column.offsets.to_numpy())
        return (ids[start:end].tobytes() if end - start >= min_tokens else b"" for start, end in bounds)
    return ((text or b"").strip() for text in column.cast(pa.large_binary()).to_pylist())


def _find_prompts(sources: tuple[list[Dataset], ...], duplicates: NDArray[np.bool_]) -> Overlap | None:
    """Find held-out prompts that are training prompts, without those of rows that are duplicates as a whole."""
    if any({"prompt", "messages"}.isdisjoint(rows.column_names) for rows in chain(*sources)):
        return None
    train, held_out = (hash_rows(chain(*map(_prompts, rows))) for rows in sources)
    return find_overlap(train, np.where(duplicates, EMPTY, _once(held_out)))


def _prompts(dataset: Dataset) -> Iterator[bytes]:
    """What stands before the answer of each row."""
    for columns in _batches(dataset, ("prompt", "messages")):
        for name, column in columns.items():
            for value in column.to_pylist():
                yield value.strip().encode() if name == "prompt" else json.dumps(_before_answer(value)).encode()


def _before_answer(conversation: str) -> list[dict[str, Any]]:
    messages = json.loads(conversation)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else []


def _texts(dataset: Dataset) -> Iterator[str]:
    """The words of each row; ids are their own words."""
    for columns in _batches(dataset, CONTENT):
        for values in zip(*(column.to_pylist() for column in columns.values()), strict=True):
            yield " ".join(_text(name, value) for name, value in zip(columns, values, strict=True))


def _text(column: str, value: Any) -> str:
    if column == "messages":
        return " ".join(str(message.get("content") or "") for message in json.loads(value))
    return " ".join(map(str, value)) if isinstance(value, list) else value or ""


def _row(examples: Examples, row: int) -> str:
    """Name a row of the sources, which is counted over all of them."""
    for title, rows in examples.sources:
        if row <= len(rows):
            return f"row {row:,} of {title}"
        row -= len(rows)
    raise IndexError(row)


def _example(examples: Examples, row: int) -> str:
    return f"example {row:,} of the {len(examples.dataset):,} encoded"


def _sentence(
    overlap: Overlap, what: str, place: Callable[[Examples, int], str], both: tuple[Examples, Examples]
) -> str:
    of = "all" if overlap.rows == overlap.of else f"{overlap.rows:,} of {overlap.of:,}"
    train, held_out = both
    return (
        f"data.eval: {of} held-out rows {what}, such as {place(held_out, overlap.held_out_row)} and "
        f"{place(train, overlap.train_row)}. They are not held out: remove them from one of the two."
    )
