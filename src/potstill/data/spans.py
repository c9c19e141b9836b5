"""From a span of characters to the tokens that say it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from potstill.errors import DataError


def span_tokens(tokenizer: PreTrainedTokenizerBase, text: str, span: tuple[int, int]) -> tuple[int, int]:
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
    if not tokenizer.is_fast:
        raise DataError("span_tokens: expected a fast tokenizer, got a slow one. It does not say where tokens stand.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [i for i, (start, end) in enumerate(encoded["offset_mapping"]) if start < span[1] and end > span[0]]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
