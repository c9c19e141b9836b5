"""Measure models on held-out rows within a time limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import in_batches
from potstill.evaluate.sequence import AnyQuality, measure
from potstill.evaluate.time_limit import TimeLimit
from potstill.losses.alignment import IGNORE, Task

BATCH_ROWS, BATCH_TOKENS = 16, 4096  # of a batch at most: the time is over between two batches
FEWEST_ROWS = 4  # of a batch: encoders are compared on 3 at least


def measure_rows(
    task: Task,
    reference: nn.Module | None,
    models: Mapping[str, nn.Module],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    limit: TimeLimit,
    on_rows: Callable[[int, int], None],
    vocabulary: int | None = None,
) -> tuple[Mapping[str, AnyQuality], Dataset]:
    """Measure models as `measure` does, on rows in random order; return their quality and the rows that were measured.

    Those are all rows, or a random sample where the time limit ends the measurement.

    Args:
        max_length: tokens of the longest row.
        on_rows: called with the number of measured rows, and of all.
    """
    shuffled = rows.select(np.random.default_rng(0).permutation(len(rows)))
    number = 0

    def batches() -> Iterator[dict[str, Tensor]]:
        nonlocal number
        batch_rows = max(FEWEST_ROWS, min(BATCH_ROWS, BATCH_TOKENS // max_length))
        for batch in limit.within(in_batches(shuffled, tokenizer, batch_rows)):
            yield batch
            number += len(batch["input_ids"])
            on_rows(number, len(rows))

    quality = measure(task, reference, models, batches(), vocabulary=vocabulary)
    return quality, shuffled.select(range(number))


def text_bytes(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the UTF-8 bytes of the target tokens' text, without special tokens."""
    targets = ([label for label in row["labels"][1:] if label != IGNORE] for row in rows)
    return sum(len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode()) for ids in targets)
