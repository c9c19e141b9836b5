"""Check that a server's token ids mean the same tokens as a tokenizer's."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from potstill.engines.server import ModelServer
from potstill.errors import VocabularyError
from potstill.models.loading import vocabulary_size

IDS_PER_REQUEST = 512


def check_tokenizer_matches(server: ModelServer, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Compare every token id; return False where the server has no /detokenize."""
    ids = range(vocabulary_size(tokenizer))
    if server.detokenize(ids[:1]) is None:
        return False
    for start in range(0, len(ids), IDS_PER_REQUEST):
        _compare(server, tokenizer, ids[start : start + IDS_PER_REQUEST])
    return True


def refuse(server: ModelServer, tokenizer: PreTrainedTokenizerBase, token: int, word: str) -> None:
    """Raise the error for a token id that means another token on the server."""
    raise VocabularyError(
        f"{server}: expected the student's token ids, got others: {token} is {read(tokenizer, [token])!r} for the "
        f"student and {word!r} for the server. Serve a model with the student's tokenizer."
    )


def read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def _compare(server: ModelServer, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Find the token that differs by bisection."""
    text = server.detokenize(ids)
    if text == read(tokenizer, ids):
        return
    if len(ids) == 1:
        refuse(server, tokenizer, ids[0], str(text))
    for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
        _compare(server, tokenizer, half)
