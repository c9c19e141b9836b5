"""A teacher behind a server that scores given tokens, such as vLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.engines.server import ModelServer, ServerConfig
from potstill.engines.tokenizer_check import check_tokenizer_matches, read, refuse
from potstill.errors import RecipeError, VocabularyError
from potstill.losses.alignment import Alignment, Task
from potstill.losses.declared import Range
from potstill.losses.targets import SparseTargets
from potstill.models.loading import load_tokenizer
from potstill.teachers.source import LoadedTeacher, MemberSource
from potstill.teachers.teacher import Teacher, TeacherOutput


class ServedTeacher(Teacher):
    """The top_k likeliest tokens at every position, from a server, and a bucket for all others; at temperature 1.

    Token ids are sent, not text, so that nothing is tokenized twice. Whether the server's tokenizer is the student's
    is checked at once. vLLM allows a top_k of 20 unless it is started with --max-logprobs.

    Raises:
        VocabularyError: the server's token ids mean other tokens.
        RefusedError: the model is not served, or the server does not score given tokens.
        ServerError: it does not answer.
    """

    def __init__(self, server: ModelServer, tokenizer: PreTrainedTokenizerBase, *, top_k: int = 20) -> None:
        self.server, self.top_k = server, top_k
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        limit = server.card().get("max_model_len")
        self.max_length = None if limit is None else int(limit) - 1  # the server always generates a token
        self._check_tokenizer(tokenizer)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        home = batch["input_ids"].device
        ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
        rows, row = torch.unique(alignment.row.cpu(), return_inverse=True)
        # The place of each target position in its row without padding. A prompt ends behind its last target.
        column = (mask.cumsum(1) - 1).flatten()[alignment.positions.cpu()]
        last = column.new_zeros(len(rows)).scatter_reduce(0, row, column, "amax")
        prompts = [ids[i][mask[i]][: end + 2].tolist() for i, end in zip(rows, last.tolist(), strict=True)]
        scores = self.server.score(prompts, self.top_k)
        places = (torch.cumsum(last + 1, 0) - (last + 1))[row] + column
        kept = torch.cat([torch.empty(0, self.top_k, dtype=torch.long), *(score.ids for score in scores)])[places]
        log_probs = torch.cat([torch.empty(0, self.top_k), *(score.log_probs for score in scores)])[places]
        actual = torch.cat([torch.empty(0), *(score.actual for score in scores)])[places]
        # Padding rows of the teacher's head are no tokens: their mass goes to the bucket.
        log_probs = log_probs.masked_fill(kept >= self.vocabulary, -math.inf)
        return TeacherOutput(SparseTargets(kept.to(home), log_probs.to(home)), actual.to(home))

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        sample = min(64, self.max_length or 64, self.vocabulary)
        probe = [i * self.vocabulary // sample for i in range(sample)]
        (scores,) = self.server.score([probe], self.top_k)
        if check_tokenizer_matches(self.server, tokenizer):
            return
        words = {token: word for token, word in scores.words.items() if word is not None and token < self.vocabulary}
        if not words:
            raise VocabularyError(
                f"{self.server}: expected a server that decodes token ids, got one that does not, so that its "
                "tokenizer cannot be compared with the student's. Start it with its tokenizer."
            )
        for token, word in words.items():
            expected = read(tokenizer, [token])
            # Servers decode a token with or without its space; half a character cannot be compared.
            if word.strip() != expected.strip() and "\N{REPLACEMENT CHARACTER}" not in word + expected:
                refuse(self.server, tokenizer, token, word)


@dataclass(frozen=True)
class TeacherEndpoint(ServerConfig):
    """A model behind a server that scores given tokens, as vLLM does.

    Args:
        top_k: number of likeliest tokens to request at each position; the others share a bucket
    """

    top_k: Annotated[int, Range(ge=1)] = 20


@dataclass(frozen=True)
class ServerSource(MemberSource):
    """A model behind a server, with the student's tokenizer.

    Args:
        server: its address
    """

    server: TeacherEndpoint
    name = "server"
    tasks = frozenset({"causal"})

    @property
    def title(self) -> str:
        return f"{self.server.model} behind {self.server.url}"

    @property
    def max_top_k(self) -> int:
        return self.server.top_k

    def load(self, student: str | None, task: Task = "causal", key: str = "teacher") -> LoadedTeacher:
        if student is None:
            raise RecipeError(
                "student.design: expected a teacher with a config to derive it from, got one behind a server. Name a "
                "student with student.model instead."
            )
        tokenizer = load_tokenizer(student, "student.model")
        return LoadedTeacher(ServedTeacher(self.server.connect(), tokenizer, top_k=self.server.top_k), tokenizer)
