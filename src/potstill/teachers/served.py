"""A teacher behind a server that tells the log-probabilities of given tokens, such as vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.engines.server import ModelServer
from potstill.engines.tokenizer_check import check_tokenizer_matches, read, refuse
from potstill.errors import VocabularyError
from potstill.losses.alignment import Alignment
from potstill.losses.targets import SparseTargets
from potstill.models.loading import vocabulary_size
from potstill.teachers.teacher import Teacher, TeacherOutput


class ServedTeacher(Teacher):
    """The top_k likeliest tokens at every position, from a server, and a bucket for all others; at temperature 1.

    Token ids are sent, not text, so that nothing is tokenized twice. That the server reads them as the student does is
    proven here, before anything is taught.

    Args:
        server: where the model is.
        tokenizer: the student's.
        top_k: how many tokens; vLLM allows 20 unless it is started with --max-logprobs.

    Attributes:
        max_length: tokens in a row at most, where the server tells.

    Raises:
        VocabularyError: the server's token ids mean other tokens.
        RefusedError: the model is not served, or the server does not tell log-probabilities of given tokens.
        ServerError: it does not answer.
    """

    def __init__(self, server: ModelServer, tokenizer: PreTrainedTokenizerBase, *, top_k: int = 20) -> None:
        self.server = server
        self.top_k = top_k
        self.vocabulary = vocabulary_size(tokenizer)
        longest = server.card().get("max_model_len")
        self.max_length: int | None = None if longest is None else int(longest) - 1  # it always adds a token
        self._must_read_alike(tokenizer)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        home = batch["input_ids"].device
        ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
        positions = alignment.positions.cpu()
        rows, which = torch.unique(positions // alignment.length, return_inverse=True)
        # The place of each position in its row without padding. Behind the last one that counts nothing is asked.
        place = (mask.cumsum(1) - 1).flatten()[positions]
        last = place.new_zeros(len(rows)).scatter_reduce(0, which, place, "amax")
        prompts = [ids[row][mask[row]][: end + 2].tolist() for row, end in zip(rows, last.tolist(), strict=True)]
        scores = self.server.score(prompts, self.top_k)
        start = torch.cumsum(last + 1, 0) - (last + 1)
        asked = start[which] + place

        def at(parts: list[Tensor], empty: Tensor) -> Tensor:
            return torch.cat([empty, *parts])[asked]

        kept = at([one.ids for one in scores], torch.empty(0, self.top_k, dtype=torch.long))
        log_probs = at([one.log_probs for one in scores], torch.empty(0, self.top_k))
        # Padding rows of the teacher's head are no tokens: what they have falls to the bucket.
        log_probs = log_probs.masked_fill(kept >= self.vocabulary, -math.inf)
        targets = SparseTargets(kept.to(home), log_probs.to(home), kind="bucket", temperature=1.0)
        return TeacherOutput(targets, at([one.actual for one in scores], torch.empty(0)).to(home))

    def _must_read_alike(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Every token id is the same token here and there, as far as the server lets that be seen."""
        # This also shows whether it tells log-probabilities of prompts, and so many of them.
        sample = min(64, self.max_length or 64, self.vocabulary)
        probe = [i * self.vocabulary // sample for i in range(sample)]
        (scores,) = self.server.score([probe], self.top_k)
        if check_tokenizer_matches(self.server, tokenizer):
            return
        words = {token: word for token, word in scores.words.items() if word is not None and token < self.vocabulary}
        if not words:
            raise VocabularyError(
                f"{self.server}: expected a server that tells how it reads token ids, got one that does not. Whether "
                "they are the student's cannot be seen. Start it with its tokenizer."
            )
        for token, word in words.items():
            if not _same_word(word, read(tokenizer, [token])):
                refuse(self.server, tokenizer, token, word)


def _same_word(theirs: str, ours: str) -> bool:
    """Servers write a single token with or without its space; half a character says nothing."""
    return theirs.strip() == ours.strip() or "\N{REPLACEMENT CHARACTER}" in theirs + ours
