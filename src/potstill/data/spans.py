"""From a span of characters to the tokens that say it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from potstill.errors import DataError

Span = tuple[int, int]


def span_tokens(tokenizer: PreTrainedTokenizerBase, text: str, span: Span) -> tuple[int, int]:
    """The tokens of a text that hold any character of a span, as start and end among the tokens.

    A token that reaches over the span's edge belongs to it. The text is encoded as completions are: alone, without
    special tokens.

    Args:
        tokenizer: a fast one, which knows where its tokens stand in the text.
        text: the completion.
        span: start and end in characters, as `Solution` has them.

    Raises:
        DataError: the tokenizer does not know places.
    """
    return tokens_within(places(tokenizer, [text])[0], span)


def places(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[Span]]:
    """Where the tokens of texts stand in them, in characters; without special tokens.

    Raises:
        DataError: the tokenizer does not know places.
    """
    if not tokenizer.is_fast:
        raise DataError("spans: expected a fast tokenizer, got a slow one. It does not say where tokens stand.")
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found: list[list[Span]] = encoded["offset_mapping"]
    return found


def tokens_within(offsets: Sequence[Span], span: Span) -> tuple[int, int]:
    """The tokens that hold any character of a span, as start and end among them; (0, 0) for none."""
    inside = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
