"""Tokens of texts, and where in the texts they stand."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.data.token_weights import Span
from potstill.errors import DataError


@dataclass(frozen=True)
class LocatedTokens:
    """The tokens of a text, and where in it they stand; slow tokenizers do not give the places."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    ids: list[int]
    offsets: list[Span] | None
    special: bool  # whether the special tokens of the tokenizer are among the ids

    def before(self, border: int) -> int:
        """Count the tokens that stand before a character, up to the first that reaches over it.

        Where there are no offsets, it is those that the text up to there begins with, tokenized alone.
        """
        if self.offsets is not None:
            return bisect_right(list(accumulate((end for _, end in self.offsets), max)), border)
        head = self.tokenizer(self.text[:border], add_special_tokens=self.special, verbose=False)["input_ids"]
        return common_prefix(head, self.ids)

    def over(self, border: int) -> int | None:
        """Find the token that stands on both sides of a character."""
        first = self.before(border)
        stands_over = self.offsets and first < len(self.ids) and self.offsets[first][0] < border
        return self.ids[first] if stands_over else None

    def shifted(self, start: int) -> list[Span]:
        """Where each token stands, counted from a character on."""
        if self.offsets is None:
            raise DataError("spans: expected a fast tokenizer, got a slow one, which has no offsets.")
        return [(begin - start, end - start) for begin, end in self.offsets]


def locate(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> Iterator[LocatedTokens]:
    """Tokenize texts, with or without the special tokens that the tokenizer adds."""
    options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    encoded = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=tokenizer.is_fast, **options)
    offsets = encoded["offset_mapping"] if tokenizer.is_fast else [None] * len(texts)
    for text, ids, places in zip(texts, encoded["input_ids"], offsets, strict=True):
        yield LocatedTokens(tokenizer, text, ids, places, special)


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Count the items that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
