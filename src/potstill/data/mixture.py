"""Training data of several sources: all of their rows, or rows in given shares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import Examples, encode
from potstill.data.sources import Source, in_parts, listed
from potstill.errors import DataError


def encode_mixture(sources: Source | Sequence[Source], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Examples:
    """Encode sources one by one (see `encode`), and join their examples.

    With a share for each, the examples of a source are that share of all. No example is left out: the source with the
    most examples for its share is read once, and all others are repeated.

    Raises:
        DataError: a source is not usable, only some have a share, or their examples have different columns.
    """
    parts = in_parts(sources)
    encoded = [encode(source, tokenizer, **options) for source in parts]
    if len(parts) == 1:
        return encoded[0]
    columns = [frozenset(examples.dataset.column_names) for examples in encoded]
    for source, names in zip(parts, columns, strict=True):
        if odd := names ^ columns[0]:
            raise DataError(
                f"data: expected the same columns in all sources, got {listed(sorted(odd))} in one of "
                f"{parts[0].title} and {source.title} alone. Give weights and prompts of the teacher to all or none."
            )
    counts = _counts(parts, [len(examples.dataset) for examples in encoded])
    notes, datasets, tokens = list(chain(*(examples.notes for examples in encoded))), [], 0
    for source, examples, count in zip(parts, encoded, counts, strict=True):
        size = len(examples.dataset)
        datasets.append(_repeated(examples.dataset, count))
        tokens += round(examples.tokens * count / size)
        if source.share is not None:
            percent, times = 100 * count / sum(counts), count / size
            notes.append(f"{source.title}: {percent:.3g}% of the training rows, each of {size:,} {times:.3g} times.")
    longest = max(examples.teacher_longest for examples in encoded)
    rows = tuple(chain(*(examples.sources for examples in encoded)))
    joined = all(examples.joined for examples in encoded)
    return Examples(concatenate_datasets(datasets), tokens, tuple(notes), longest, joined, rows, encoded[0].max_length)


def _counts(sources: Sequence[Source], sizes: list[int]) -> list[int]:
    """The number of examples that each source gives."""
    shares = [source.share for source in sources if source.share is not None]
    if not shares:
        return sizes
    if len(shares) < len(sources):
        without = next(source.title for source in sources if source.share is None)
        raise DataError(f"data: expected a share for each source or for none, got none for {without}. Add share.")
    total = max(size / share for size, share in zip(sizes, shares, strict=True))
    return [max(size, round(total * share)) for size, share in zip(sizes, shares, strict=True)]


def _repeated(dataset: Dataset, count: int) -> Dataset:
    size = len(dataset)
    return dataset if count == size else dataset.select([i % size for i in range(count)])
