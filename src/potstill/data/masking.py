"""Dynamic masking for masked language models, reproducible when a run is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.errors import DataError
from potstill.losses.alignment import IGNORE
from potstill.models.loading import vocabulary_size

MASKED_SHARE = 0.15  # of the tokens, as in BERT
MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stays as it is


class MaskedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Mask the tokens of rows as BERT did.

    Of the tokens of a row whose label is not -100 a share is chosen, at least one. 80% of them become the mask, 10% a
    random token, 10% stay; the label of all others is -100. The choice depends on seed, epoch and the row's number
    alone, not on the order, the batch, the worker or earlier draws.

    Args:
        rows: [i] is {"input_ids": [T], "labels": [T], ...}, as `encode` gives them for the task masked.
        share: of the tokens that may be chosen, in (0, 1).

    Raises:
        DataError: the tokenizer has no mask token.

    References:
        Devlin et al. 2018 (BERT), arXiv 1810.04805, section 3.1; Liu et al. 2019 (RoBERTa), arXiv 1907.11692, for
        masks that change.
    """

    def __init__(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, *, share: float = MASKED_SHARE, seed: int = 0
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise DataError(
                "data: expected a tokenizer with a mask token for the task masked, got one without. "
                "Use the tokenizer of a masked language model, or another task."
            )
        self.rows, self.share, self.seed = rows, share, seed
        self.mask_token_id = int(tokenizer.mask_token_id)
        self.vocabulary = vocabulary_size(tokenizer)
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it too

    def set_epoch(self, epoch: int) -> None:
        """Use the masks of an epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: Mapping[str, Any] = self.rows[i]
        generator = np.random.default_rng([self.seed, int(self._epoch), i])
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        free = np.flatnonzero(labels != IGNORE)
        chosen = generator.permutation(free)[: max(1, round(self.share * len(free)))]
        draw = generator.random(len(chosen))
        ids[chosen[draw < MASKED]] = self.mask_token_id
        randomized = chosen[(draw >= MASKED) & (draw < MASKED + RANDOM)]
        ids[randomized] = generator.integers(self.vocabulary, size=len(randomized))
        masked_labels = np.full_like(labels, IGNORE)
        masked_labels[chosen] = labels[chosen]
        return {**row, "input_ids": ids.tolist(), "labels": masked_labels.tolist()}

    def fixed(self) -> Dataset:
        """Return the rows with the current masks, so that held-out rows are the same at every evaluation."""
        rows = list(self)
        return Dataset.from_dict({name: [row[name] for row in rows] for name in ("input_ids", "labels")})
