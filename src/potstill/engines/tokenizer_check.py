"""Does a server read token ids as a tokenizer does?"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from potstill.engines.server import ModelServer
from potstill.errors import VocabularyError
from potstill.models.loading import vocabulary_size

STRETCH = 512  # token ids in one question


def check_tokenizer_matches(server: ModelServer, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Ask how a server reads every token id; False where it does not tell, for it has no /detokenize.

    Raises:
        VocabularyError: it reads one otherwise.
    """
    every = list(range(vocabulary_size(tokenizer)))
    if server.detokenize(every[:1]) is None:
        return False
    for start in range(0, len(every), STRETCH):
        found = _first_other(server, tokenizer, every[start : start + STRETCH])
        if found is not None:
            refuse(server, tokenizer, found, str(server.detokenize([found])))
    return True


def refuse(server: ModelServer, tokenizer: PreTrainedTokenizerBase, token: int, word: str) -> None:
    """Say that a server reads a token otherwise.

    Raises:
        VocabularyError: always.
    """
    raise VocabularyError(
        f"{server}: expected the student's token ids, got others: {token} is {read(tokenizer, [token])!r} for the "
        f"student and {word!r} for the server. What one writes the other reads. Give both one tokenizer."
    )


def read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids."""
    return str(tokenizer.decode(list(ids)))


def _first_other(server: ModelServer, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """A token id that the server reads otherwise, by halves; None where it reads all of them alike."""
    if server.detokenize(ids) == read(tokenizer, ids):
        return None
    if len(ids) == 1:
        return ids[0]
    for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
        if (found := _first_other(server, tokenizer, half)) is not None:
            return found
    return None
