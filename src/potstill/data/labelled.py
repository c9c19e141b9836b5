"""Encode the rows of classification and regression, and of encoders without a head: texts, or pairs of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from potstill.data.rows import EncodedRow, RowEncoder
from potstill.errors import DataError


def labelled_rows(dataset: Dataset, encoder: RowEncoder) -> Iterator[EncodedRow]:
    """Encode texts or pairs with the class or the number of their label; truncated to max_length."""
    for numbers, batch in encoder.nonempty(dataset, "text"):
        rows = zip(numbers, batch["label"], strict=True)
        labels = [_label(text, encoder.where(number), encoder) for number, text in rows]
        yield from _rows(batch["text"], batch.get("text_pair"), labels, encoder)


def unlabelled_rows(dataset: Dataset, encoder: RowEncoder) -> Iterator[EncodedRow]:
    """Encode texts with the label 0, so that each is a target; truncated to max_length."""
    for _, batch in encoder.nonempty(dataset, "text"):
        yield from _rows(batch["text"], None, [0] * len(batch["text"]), encoder)


def _rows(
    texts: list[str], pairs: list[str] | None, labels: list[int] | list[float], encoder: RowEncoder
) -> Iterator[EncodedRow]:
    has_types = pairs is not None and "token_type_ids" in encoder.tokenizer.model_input_names

    def tokenize(chosen: list[int], **options: Any) -> list[tuple[list[int], list[int] | None]]:
        encoded = encoder.tokenizer(
            [texts[i] for i in chosen],
            None if pairs is None else [pairs[i] for i in chosen],
            return_attention_mask=False,
            return_token_type_ids=has_types,
            verbose=False,
            **options,
        )
        types: Any = encoded["token_type_ids"] if has_types else [None] * len(chosen)
        return list(zip(encoded["input_ids"], types, strict=True))

    encoded = tokenize([*range(len(texts))])
    long = [i for i, (ids, _) in enumerate(encoded) if len(ids) > encoder.max_length]
    encoder.counts["cut"] += len(long)
    if long:  # tokenized again, because a pair is truncated on both sides
        for i, row in zip(long, tokenize(long, truncation=True, max_length=encoder.max_length), strict=True):
            encoded[i] = row
    return (EncodedRow(ids, label, types) for (ids, types), label in zip(encoded, labels, strict=True))


def _label(text: str, where: str, encoder: RowEncoder) -> int | float:
    """Read the class of a name or a number, or the number of a regression."""
    if encoder.task == "regression":
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"data: expected a number as the label, got {text!r} in {where}. Correct or remove the row."
            )
        return value
    classes = encoder.classes
    if text in classes:
        return classes[text]
    if text.isdigit() and int(text) in classes.values():
        return int(text)
    known = ", ".join(list(classes)[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    raise DataError(
        f"data: expected a label of {known}, or its number, got {text!r} in {where}. "
        "Correct the row, or name the classes in label2id of the model's config.json."
    )
