"""Encode the rows that a trainer is given, by the rules of `potstill.data.encode`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import COLLATED, PaddingCollator, encode
from potstill.data.columns import chooses_loss
from potstill.data.disk_cache import BATCH, cached_in
from potstill.data.masking import MaskedRows
from potstill.data.readers import suppress_output
from potstill.data.sources import Source, listed
from potstill.errors import DataError, EmptyDataError
from potstill.losses.alignment import Task, check_unshifted
from potstill.train.columns import check_padding

logger = logging.getLogger(__name__)

CHECKED = ("input_ids", "labels", "attention_mask")


@dataclass(frozen=True)
class RowsEncoder:
    """Encodes data sets of texts, of prompts and completions, or of messages; rows with input_ids stay as they are.

    Args:
        tokenizer: None where all rows have input_ids.
        max_length: tokens of the longest example.
        classes: numbers of classes by name.
        seed: of the masks of a masked model.
        collator: makes the batches. One of the user's own gets the rows as they are.
        pad: id of the pad token, where it is known.
        read: columns that a model would read, and that `PaddingCollator` leaves out.
        layers: whether terms read layers, at each position without padding.
    """

    tokenizer: PreTrainedTokenizerBase | None
    task: Task
    max_length: int
    classes: Mapping[str, int]
    seed: int
    collator: Any
    pad: int | None
    read: frozenset[str]
    layers: bool

    def __call__(self, rows: Any, name: str, training: bool = False) -> Any:
        """Return a data set of rows with input_ids.

        Args:
            rows: a data set of torch or `datasets`, streamed too, a list of dicts, or several held-out sets by name.
            name: of the argument, for messages.
            training: whether the masks of a masked model change from epoch to epoch.
        """
        if isinstance(rows, Mapping):
            if training:
                raise DataError(
                    f"data: expected one data set as {name}, got {listed(list(rows))}. Name one of them, as in "
                    f"{name}=data[{next(iter(rows), 'train')!r}]."
                )
            return {part: self(value, f"{name}_{part}") for part, value in rows.items()}
        if isinstance(rows, Iterator):  # which is read once: its first row is not to be lost
            rows = list(rows)
        if type(rows).__module__.partition(".")[0] == "pandas":
            rows = Dataset.from_pandas(rows, preserve_index=False)
        first = None if rows is None else next(_iterate(rows), None)
        if not isinstance(first, Mapping):
            self._check_other(rows, first, name)
            return rows  # made for a collator of the user's own
        if not isinstance(self.collator, PaddingCollator) and self.collator is not None:
            if "input_ids" not in first and type(self.collator).__module__.startswith("transformers."):
                raise DataError(
                    f"data: expected input_ids in {name} for {type(self.collator).__name__}, got "
                    f"{listed(list(first))}. Leave data_collator out: then the rows are encoded."
                )
            return rows
        if "input_ids" in first:
            columns = set(first).union(*(rows if isinstance(rows, list) else ()))
            self._check_columns(first, columns, name)
            return rows
        if self.tokenizer is None:
            raise DataError(
                f"data: expected input_ids in {name}, or a processing_class that makes them, got "
                f"{listed(list(first))}. Give the tokenizer as processing_class."
            )
        if isinstance(rows, IterableDataset):
            return EncodedStream(rows, self, name)
        dataset = self.encode(rows, name)
        if self.task != "masked":
            return dataset
        masked = MaskedRows(dataset, self.tokenizer, seed=self.seed)
        return masked if training else masked.fixed()

    def encode(self, rows: Any, name: str) -> Dataset:
        """Encode rows through a file, as those of a recipe are."""
        assert self.tokenizer is not None
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.{'parquet' if isinstance(rows, Dataset) else 'jsonl'}"
            if isinstance(rows, Dataset):  # nulls for keys that other rows have are known as such
                with suppress_output():
                    rows.to_parquet(path)
            else:
                with path.open("w", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in _iterate(rows))
            options: dict[str, Any] = {"max_length": self.max_length, "task": self.task, "classes": self.classes}
            examples = encode(Source(path), self.tokenizer, **options)
        for note in examples.notes:
            logger.warning(note)
        return examples.dataset

    def _check_other(self, rows: Any, first: Any, name: str) -> None:
        """Refuse rows that are no dicts, and a data set without rows, where there is no collator of the user's own."""
        if isinstance(self.collator, PaddingCollator | None) and rows is not None:
            got = "no rows" if first is None else f"{type(first).__name__} as the first"
            raise DataError(
                f"data: expected rows that are dicts, as of `datasets`, in {name}, got {got}. Give rows such as "
                '{"text": "..."}.'
            )

    def _check_columns(self, example: Mapping[str, Any], columns: set[str], name: str) -> None:
        """Refuse columns that would change the training and are not read, and name all others that are not."""
        unused = columns - COLLATED
        if refused := {name for name in unused if chooses_loss(name)} | unused & self.read:
            column, hint = min(refused), "Give labels, with -100 on tokens without a loss, or remove the column."
            if column.startswith("prompt_"):
                hint = "A prompt has labels of -100, or is the first prompt_tokens of a Rollout: remove the column."
            raise DataError(
                f"data: expected input_ids and labels in {name}, got the column {column}, which is not read. {hint}"
            )
        if self.task == "causal":
            row = {key: torch.as_tensor(example[key])[None] for key in CHECKED if example.get(key) is not None}
            check_padding(row, self.pad, f"the first row of {name}", layers=self.layers)
            PaddingCollator(-1 if self.pad is None else self.pad)([example])  # what it refuses, before the training
            if "labels" in row:
                check_unshifted([*example["input_ids"]], [*example["labels"]], name)
        if unused:
            logger.warning("%s: columns that are not used: %s.", name, listed(sorted(unused)))


class EncodedStream(IterableDataset[dict[str, Any]]):
    """Rows of a streamed data set, encoded some at a time while they are read."""

    def __init__(self, rows: Any, encoder: RowsEncoder, name: str) -> None:
        if encoder.task == "masked":
            raise DataError(
                f"data: expected a data set with a length as {name} for the task masked, whose masks are made by row, "
                "got a stream. Load it whole, or encode and mask it yourself."
            )
        self.rows, self.encoder, self.name = rows, encoder, name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self.rows)
        while chunk := list(islice(rows, BATCH)):
            with TemporaryDirectory() as folder, cached_in(Path(folder)):
                try:
                    examples = list(self.encoder.encode(chunk, self.name))
                except EmptyDataError:  # a chunk of empty rows does not end the stream
                    continue
            yield from examples

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the rows for an epoch, where they can be."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def _iterate(rows: Any) -> Iterator[Any]:
    """The rows of anything with a length or an iterator."""
    if isinstance(rows, Iterable):
        return iter(rows)
    return (rows[i] for i in range(len(rows)))
