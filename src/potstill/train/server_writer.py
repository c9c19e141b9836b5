"""The student's own text from a vLLM server, which takes the student's weights while it learns."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.engines.decode import Written, ends_of
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.engines.tokenizer_check import check_tokenizer_matches
from potstill.engines.weight_sync import LentWeights
from potstill.errors import RefusedError, ServerError
from potstill.models.adapted import save_student
from potstill.models.split import run, undisturbed

MAX_LOGPROB_DRIFT = 0.25  # nats a token, on average, beyond which it has others: one in bfloat16 is within 0.02


class ServedWriter:
    """A vLLM server writes as the student, with weights that are at most so many optimiser steps old.

    The weights go to a folder that the server reads, and the server is told to take them: all of them, or the adapter
    alone of a student that is one. What the server then says of a text that it wrote must be what the student says.

    Args:
        server: a model of the student's shape, or the base of its adapter.
        tokenizer: the student's. That the server reads its token ids alike is proven here.
        folder: where the weights are put; the server sees it under the same path.
        adapter: whether the student is a LoRA adapter.
        max_staleness: optimiser steps since the weights that write, at most; with 0 the server has new ones at each.

    Attributes:
        limit: tokens in a row at most.
        step: of which the weights are that write.

    Raises:
        VocabularyError: the server's token ids mean other tokens.
        RefusedError: the model is not served there, or not by vLLM.
        ServerError: there is no answer.
    """

    def __init__(
        self,
        server: ModelServer,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        adapter: bool = False,
        max_staleness: int = 0,
    ) -> None:
        self.limit = int(server.card().get("max_model_len", 0))
        if not self.limit or not check_tokenizer_matches(server, tokenizer):
            raise RefusedError(
                f"{server}: expected vLLM, which tells max_model_len and has /detokenize, got another server. No other "
                "takes the student's weights. Serve the student with vLLM, 0.32 or later."
            )
        self.step = 0
        self._server, self._tokenizer = server, tokenizer
        self._folder, self._max_staleness = folder, max_staleness
        self._weights: Path | None = None  # in that folder, which may hold other things
        self._lent = LentWeights(server, adapter=adapter)
        self._due = True  # whatever the age of those that are there
        self._new = False  # the weights of this very step have just been taken

    def follow(self, student: nn.Module, step: int, rank: int = 0) -> None:
        """Have the server take the student's weights where its own are too old; every rank calls this at every step.

        Raises:
            RefusedError: the server does not take them.
            ServerError: it could not.
        """
        self._new = self._due or step - self.step > self._max_staleness
        if not self._new:
            return
        if rank == 0:
            self._lend(student, step)
        version = [self._lent.version]
        broadcast_object_list(version)  # the others wait here
        self._lent.version = version[0]
        self.step, self._due = step, False

    def renew(self) -> None:
        """Take new weights at the next step, whatever their age: so does a run that goes on from a checkpoint."""
        self._due = True

    def write(
        self,
        student: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        rooms: Sequence[int],
        vocabulary: int | None = None,
    ) -> list[Written]:
        """One continuation of each prompt; see `LentWeights.write`.

        Args:
            student: whose weights are there.
            prompts: token ids.
            sampling: how tokens are drawn.
            rooms: how many tokens each may have at most.
            vocabulary: only the first so many tokens are ever drawn; None for all.

        Raises:
            ServerError: what it says of them is not what the student says, or see `LentWeights.write`.
            RefusedError: see `LentWeights.write`.
        """
        rows = student.get_output_embeddings().weight.shape[0]  # type: ignore[operator]  # of any model of transformers
        never = range(rows if vocabulary is None else vocabulary, rows)
        ends = ends_of(student, self._tokenizer.eos_token_id)
        written = self._lent.write(prompts, sampling, ends=ends, rooms=rooms, never=never)
        if self._new and written:
            self._must_be_the_student(student, prompts[0], written[0])
        return written

    def close(self) -> None:
        """Take the weights off the disk."""
        if self._weights is not None:
            shutil.rmtree(self._weights)
            self._weights = None
            with suppress(OSError):
                self._folder.rmdir()  # unless it holds other things

    def _lend(self, student: nn.Module, step: int) -> None:
        self.close()  # what was lent is in the server's memory
        version = f"potstill-{step}-{secrets.token_hex(4)}"
        self._weights = self._folder / version
        save_student(student, self._weights)
        self._lent.push(self._weights, version)

    def _must_be_the_student(self, student: nn.Module, prompt: Sequence[int], text: Written) -> None:
        apart = float((_log_probs(student, prompt, text.ids) - torch.tensor(text.log_probs)).abs().mean())
        if not apart <= MAX_LOGPROB_DRIFT:
            raise ServerError(
                f"{self._server}: expected what the student says, with the weights in {self._folder}, got {apart:.2f} "
                "nats a token from it. Does the server see that folder, and serve a model of the student's shape and "
                "config? Then go on."
            )


@torch.no_grad()
def _log_probs(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """What a model gives each token behind a prompt."""
    with undisturbed(model):
        row = torch.tensor([[*prompt, *ids]], device=next(model.parameters()).device)
        logits = run(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0].float()
    told = logits.log_softmax(-1)[:-1].gather(-1, row[0, 1:, None])[:, 0]
    return told[-len(ids) :].cpu()
