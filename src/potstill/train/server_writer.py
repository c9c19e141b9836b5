"""On-policy samples from a vLLM server that takes the student's weights as it trains."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.engines.decode import GeneratedTokens
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer, ServerConfig
from potstill.engines.tokenizer_check import check_tokenizer_matches
from potstill.engines.weight_sync import WeightSync
from potstill.errors import RecipeError, RefusedError, ServerError
from potstill.losses.declared import Range
from potstill.models.adapted import is_adapted, save_student
from potstill.models.chat import end_token_ids
from potstill.models.split import run, undisturbed

MAX_LOGPROB_DRIFT = 0.25  # mean nats per token above which the server has other weights; bfloat16 differs by 0.02


@dataclass(eq=False)
class ServedWriter:
    """A vLLM server that generates as the student, with weights that are at most so many optimiser steps old.

    Weights go through a folder that the server reads: full weights, or the adapter alone. The first sample's
    log-probabilities after a push are compared with the student's.

    Args:
        server: a model of the student's shape, or the base of its adapter.
        tokenizer: the student's; the server's token ids are compared with it here.
        folder: for the weights; the server sees it under the same path.
        adapter: whether the student is a LoRA adapter.
        max_staleness: maximum number of optimiser steps since the last push; 0 pushes at every step.

    Raises:
        VocabularyError: the server's token ids mean other tokens.
        RefusedError: the model is not served there, or not by vLLM.
        ServerError: there is no answer.
    """

    server: ModelServer
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    _: KW_ONLY
    adapter: bool = False
    max_staleness: int = 0

    def __post_init__(self) -> None:
        self.limit = int(self.server.card().get("max_model_len", 0))  # maximum number of tokens in a row
        if not self.limit or not check_tokenizer_matches(self.server, self.tokenizer):
            raise RefusedError(
                f"{self.server}: expected vLLM, with max_model_len and /detokenize, got another server. Serve the "
                "student with vLLM, 0.32 or later: no other takes its weights."
            )
        self.step = 0  # optimiser step of the weights on the server
        self._weights: Path | None = None  # within the folder, which may hold other files
        self._sync = WeightSync(self.server, adapter=self.adapter)
        self.push_due = True  # at the next step, whatever the age of the weights on the server
        self._just_pushed = False

    def update(self, student: nn.Module, step: int, rank: int = 0) -> None:
        """Push the student's weights if the server's are too old. Every rank calls this at every step."""
        self._just_pushed = self.push_due or step - self.step > self.max_staleness
        if not self._just_pushed:
            return
        if rank == 0:
            self.close()  # the server has the last weights in memory
            self._weights = self.folder / f"potstill-{step}-{secrets.token_hex(4)}"
            save_student(student, self._weights)
            self._sync.push(self._weights, self._weights.name)
        version = [self._sync.version]
        broadcast_object_list(version)  # other ranks wait here
        self._sync.version = version[0]
        self.step, self.push_due = step, False

    def generate(
        self, student: Any, prompts: list[list[int]], sampling: Sampling, max_tokens: list[int], vocabulary: int | None
    ) -> list[GeneratedTokens]:
        """Generate one continuation of each prompt from the first `vocabulary` tokens, as the student alone would."""
        num_rows = student.get_output_embeddings().weight.shape[0]
        excluded = range(num_rows if vocabulary is None else vocabulary, num_rows)
        eos_ids = end_token_ids(self.tokenizer, student)
        outputs = self._sync.generate(prompts, sampling, eos_ids=eos_ids, max_tokens=max_tokens, excluded=excluded)
        if self._just_pushed and outputs:
            ids, log_probs = outputs[0].ids, torch.tensor(outputs[0].log_probs)
            drift = float((token_log_probs(student, prompts[0], ids) - log_probs).abs().mean())
            if not drift <= MAX_LOGPROB_DRIFT:
                raise ServerError(
                    f"{self.server}: expected the student's log-probabilities, with the weights in {self.folder}, "
                    f"got {drift:.2f} nats per token from them. Check that the server sees that folder and serves a "
                    "model of the student's shape and config, then resume."
                )
        return outputs

    def close(self) -> None:
        """Delete the weights from the disk."""
        if self._weights is not None:
            shutil.rmtree(self._weights)
            self._weights = None
            with suppress(OSError):
                self.folder.rmdir()  # unless it holds other files


@dataclass(frozen=True)
class StudentServer(ServerConfig):
    """A vLLM server that generates in the student's place, and takes its weights as it trains.

    Args:
        folder: where the weights are put, seen by the server under the same path; by default `served` in the run
            directory
        max_staleness: maximum number of optimiser steps since the last push of weights; 0 pushes at each step
    """

    folder: str | None = None
    max_staleness: Annotated[int, Range(ge=0)] = 0

    def writer(self, student: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> ServedWriter:
        """Connect to the server, for a student with its adapter and a run directory."""
        adapter = student.active_peft_config if is_adapted(student) else None
        kind = "lora" if adapter is None else str(adapter.peft_type.value).lower()
        if kind != "lora":
            raise RecipeError(
                f"rollout.server: expected full weights or a LoRA adapter, got one of {kind}, which vLLM cannot "
                "replace while it runs. Leave rollout.server out."
            )
        if adapter is not None and adapter.bias != "none":
            raise RecipeError(
                f"rollout.server: expected an adapter without biases, got bias: {adapter.bias}. vLLM ignores them: "
                "leave student.adapter.bias out, or rollout.server."
            )
        folder = directory / "served" if self.folder is None else Path(self.folder).expanduser()
        options: dict[str, Any] = {"adapter": adapter is not None, "max_staleness": self.max_staleness}
        return ServedWriter(self.connect(), tokenizer, folder, **options)


@torch.no_grad()
def token_log_probs(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """A model's log-probabilities [len(ids)] of tokens after a prompt."""
    with undisturbed(model):
        row = torch.tensor([[*prompt, *ids]], device=next(model.parameters()).device)
        logits = run(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0].float()
    log_probs = logits.log_softmax(-1)[:-1].gather(-1, row[0, 1:, None])[:, 0]
    return log_probs[-len(ids) :].cpu()
