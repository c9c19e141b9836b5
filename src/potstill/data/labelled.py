"""Rows that are judged as a whole: texts, or pairs of them, with a class or a number; and texts with nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from potstill.data.rows import Encoding, Row
from potstill.errors import DataError


def labelled_rows(dataset: Dataset, encoding: Encoding) -> Iterator[Row]:
    """A text, or a pair, with the class or the number that its label names; cut at max_length."""
    for numbers, batch in encoding.filled(dataset, "text"):
        pairs = batch.get("text_pair")
        wanted = [
            _label(text, f"row {number} of {encoding.file}", encoding)
            for number, text in zip(numbers, batch["label"], strict=True)
        ]
        yield from _rows(batch["text"], pairs, wanted, encoding)


def bare_rows(dataset: Dataset, encoding: Encoding) -> Iterator[Row]:
    """A text, whose label says no more than that the row counts; cut at max_length."""
    for _, batch in encoding.filled(dataset, "text"):
        yield from _rows(batch["text"], None, [0] * len(batch["text"]), encoding)


def _rows(
    texts: list[str], pairs: list[str] | None, labels: list[int] | list[float], encoding: Encoding
) -> Iterator[Row]:
    tokenizer = encoding.tokenizer
    typed = pairs is not None and "token_type_ids" in tokenizer.model_input_names

    def encode(some: list[int], **options: Any) -> list[tuple[list[int], list[int] | None]]:
        encoded = tokenizer(
            [texts[i] for i in some],
            None if pairs is None else [pairs[i] for i in some],
            return_attention_mask=False,
            return_token_type_ids=typed,
            verbose=False,
            **options,
        )
        types: Any = encoded["token_type_ids"] if typed else [None] * len(some)
        return list(zip(encoded["input_ids"], types, strict=True))

    whole = encode([*range(len(texts))])
    long = [i for i, (ids, _) in enumerate(whole) if len(ids) > encoding.max_length]
    encoding.facts["cut"] += len(long)
    if long:
        for i, cut in zip(long, encode(long, truncation=True, max_length=encoding.max_length), strict=True):
            whole[i] = cut
    return (Row(ids, label, types) for (ids, types), label in zip(whole, labels, strict=True))


def _label(text: str, where: str, encoding: Encoding) -> int | float:
    """The class of a name, or of its number; a number itself for a regression."""
    if encoding.task == "regression":
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"data: expected a number as the label, got {text!r} in {where}. Correct or remove the row."
            )
        return value
    classes = encoding.classes
    if text in classes:
        return classes[text]
    if text.isdigit() and int(text) in classes.values():
        return int(text)
    known = ", ".join(list(classes)[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    raise DataError(
        f"data: expected a label of {known}, or its number, got {text!r} in {where}. "
        "Correct the row, or name the classes in label2id of the model's config.json."
    )
