"""Encode the rows of classification and regression, and of encoders without a head: texts, or pairs of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.data.rows import EncodedRow, RowEncoder
from potstill.data.sources import listed
from potstill.errors import DataError


def sequence_rows(dataset: Dataset, encoder: RowEncoder) -> Iterator[EncodedRow]:
    """Encode texts or pairs, truncated to max_length, with their class or number; for encoders all have the label 0."""
    has_types = has_token_types(dataset.column_names, encoder.tokenizer)

    def tokenize(rows: list[dict[str, Any]], **options: Any) -> list[tuple[list[int], list[int] | None]]:
        pairs = [row["text_pair"] for row in rows] if "text_pair" in dataset.column_names else None
        options |= {"return_attention_mask": False, "return_token_type_ids": has_types, "verbose": False}
        encoded = encoder.tokenizer([row["text"] for row in rows], pairs, **options)
        types: Any = encoded["token_type_ids"] if has_types else [None] * len(rows)
        return list(zip(encoded["input_ids"], types, strict=True))

    for batch in encoder.nonempty(dataset, "text"):
        labels = [_label(row, encoder.where(number), encoder) for number, row in batch.items()]
        rows = list(batch.values())
        encoded = tokenize(rows)
        long = [i for i, (ids, _) in enumerate(encoded) if len(ids) > encoder.max_length]
        encoder.counts["cut"] += len(long)
        if long:  # tokenized again, because a pair is truncated on both sides
            cut = tokenize([rows[i] for i in long], truncation=True, max_length=encoder.max_length)
            for i, row in zip(long, cut, strict=True):
                encoded[i] = row
        yield from (EncodedRow(ids, label, types) for (ids, types), label in zip(encoded, labels, strict=True))


def has_token_types(columns: Collection[str], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the rows are pairs whose texts the tokenizer tells apart by token_type_ids."""
    return "text_pair" in columns and "token_type_ids" in tokenizer.model_input_names


def numbered_classes(
    classes: Mapping[str, int], names: Sequence[str], file: str
) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """Add the numbers that a data set has for its classes to a model's own, by their names; notes where none fit.

    Data and model number the same classes in orders of their own.

    >>> numbered_classes({"no": 0, "yes": 1}, ["Yes", "No"], "rows")
    ({'no': 0, 'yes': 1, '0': 1, '1': 0}, ())
    """
    of_model = {name.lower(): number for name, number in classes.items()}
    known = [name for name in names if name.lower() in of_model]
    if names and classes and not known:
        pairs = [f"{number} is {name}" for number, name in enumerate(names)]
        return classes, (
            f"{file}: the model names its classes otherwise ({listed([*classes], 8)}): {listed(pairs, 8)}.",
        )
    if len(known) < len(names) and classes:
        missing = next(name for name in names if name not in known)
        raise DataError(
            f"data: expected the classes of the model ({listed([*classes], 8)}), got {missing} in {file}. Name the "
            "classes in label2id of the model's config.json."
        )
    numbers = {str(number): of_model[name.lower()] for number, name in enumerate(names)} if classes else {}
    return {**classes, **numbers}, ()


def _label(row: dict[str, Any], where: str, encoder: RowEncoder) -> int | float:
    """Read the class of a name or a number, or the number of a regression; 0 where rows have none."""
    if "label" not in row:
        return 0.0 if encoder.task == "regression" else 0
    text, classes = row["label"], encoder.classes
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
    if text in classes:
        return classes[text]
    if text.isdigit() and int(text) in classes.values():
        return int(text)
    known = (
        f"a label of {listed(list(classes), 8)}, or its number" if classes else "a class in label2id, which is empty"
    )
    raise DataError(
        f"data: expected {known}, got {text!r} in {where}. "
        "Correct the row, or name the classes in label2id of the model's config.json."
    )
