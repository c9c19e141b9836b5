"""The tokens of a plain prompt, and the text of what a model wrote behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT = 8  # tokens of a prompt that are decoded with its completion


def surrounding_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find what a tokenizer itself puts before and after a text: BOS and EOS, [CLS] and [SEP]."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text that a model continues: the tokenizer's special tokens stand before it, but not behind it."""
    ids, (_, closing) = list(tokenizer(text)["input_ids"]), surrounding_tokens(tokenizer)
    return ids[: -len(closing)] if closing and ids[-len(closing) :] == closing else ids


def completion_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int], ends: frozenset[int]
) -> str:
    """Decode what a model wrote after a prompt: with its special tokens, but without end tokens and padding at its end.

    The prompt's last tokens are decoded with it, because many tokenizers strip the space before a text's first word.
    """
    last = len(ids)
    while last and ids[last - 1] in ends | {tokenizer.pad_token_id}:
        last -= 1
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    context = [*prompt[-CONTEXT:]]
    before, whole = (str(tokenizer.decode(part, **options)) for part in (context, [*context, *ids[:last]]))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode([*ids[:last]], **options))
