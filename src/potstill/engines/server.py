"""A model behind a server of vLLM's or OpenAI's kind: it writes text, and scores given tokens where it can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.engines.client import JsonClient
from potstill.engines.sampling import Completion, Sampling
from potstill.errors import RefusedError, ServerError, nearest

FLOOR = -9999.0  # what vLLM writes for the logarithm of 0, which JSON has no word for


@dataclass(frozen=True)
class Scores:
    """What a model says about the tokens of one prompt of T tokens. Row t speaks of token t + 1, given tokens 0 to t.

    Args:
        ids: [T - 1, K] the likeliest tokens.
        log_probs: [T - 1, K] their log-probabilities, nats, float32; -inf in slots that are not used.
        actual: [T - 1] the log-probability of the token that stands there.
        words: token id -> how the server writes it, of all tokens that it mentions.
    """

    ids: Tensor
    log_probs: Tensor
    actual: Tensor
    words: dict[int, str | None]


class ModelServer:
    """One model behind a server.

    Args:
        url: such as http://127.0.0.1:8000.
        model: the name under which it is served.
        key_variable: see `JsonClient`; concurrency, timeout_s and attempts likewise.

    Raises:
        UserError: see `JsonClient`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        attempts: int = 6,
    ) -> None:
        self.client = JsonClient(
            url, key_variable=key_variable, concurrency=concurrency, timeout_s=timeout_s, attempts=attempts
        )
        self.model = model

    def __repr__(self) -> str:
        return f"{self.model} at {self.client.url}"

    def card(self) -> dict[str, Any]:
        """What /v1/models says of the model; vLLM tells its max_model_len there.

        Raises:
            RefusedError: it is not served.
            ServerError: see `JsonClient.ask`.
        """
        said = self.client.ask("GET", "/v1/models")
        try:
            cards = {str(card["id"]): dict(card) for card in said["data"]}
        except (KeyError, TypeError, ValueError):
            raise ServerError(f"{self}: expected a list of models from /v1/models, got something else.") from None
        if self.model not in cards:
            raise RefusedError(
                f"{self}: expected a model that is served there, got one that is not: {', '.join(cards) or 'none'} is."
                f"{nearest(self.model, cards)}"
            )
        return cards[self.model]

    def complete(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """The completions of each prompt, in the order of the prompts.

        Args:
            prompts: texts, or token ids.
            sampling: see there; OpenAI's own servers refuse a top_k.

        Raises:
            RefusedError, ServerError: see `JsonClient.ask`.
        """
        options: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.sampling_temperature,
            "top_p": sampling.top_p,
            "n": sampling.samples,
        }
        # What is left out means the same, and suits servers that do not know the word.
        options |= {"top_k": sampling.top_k} if sampling.top_k else {}
        options |= {"stop": list(sampling.stop)} if sampling.stop else {}
        options |= {"seed": sampling.seed} if sampling.seed is not None else {}
        return [self._completions(answer, sampling.samples) for answer in self._ask_about(prompts, options)]

    def score(self, prompts: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        """What the model says about the tokens of each prompt, in the order of the prompts.

        One token is generated and thrown away, for no server does less: a prompt must be shorter than its limit.

        Args:
            prompts: token ids, at least one in each.
            top_k: how many of the likeliest tokens at each place.

        Raises:
            RefusedError: the server does not tell log-probabilities of prompts, or see `JsonClient.ask`.
            ServerError: see `JsonClient.ask`.
        """
        answers = self._ask_about(prompts, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k})
        return [self._scores(answer, prompt, top_k) for answer, prompt in zip(answers, prompts, strict=True)]

    def detokenize(self, ids: Sequence[int]) -> str | None:
        """The text of token ids as the server reads them, or None where it has no /detokenize, which is vLLM's."""
        try:
            answer = self.client.ask("POST", "/detokenize", {"model": self.model, "tokens": list(ids)})
        except RefusedError as error:
            if error.status in (404, 405):
                return None
            raise
        return str(answer["prompt"]) if isinstance(answer, dict) and "prompt" in answer else None

    def _ask_about(self, prompts: Sequence[str | Sequence[int]], options: dict[str, Any]) -> list[Any]:
        plain = [prompt if isinstance(prompt, str) else [int(token) for token in prompt] for prompt in prompts]
        bodies = [{"model": self.model, "prompt": prompt, **options} for prompt in plain]
        return self.client.post_all("/v1/completions", bodies)

    def _completions(self, answer: Any, samples: int) -> list[Completion]:
        choices = self.choices(answer)
        if set(choices) != set(range(samples)):
            raise ServerError(f"{self}: expected {samples} choices in an answer, got those of index {sorted(choices)}.")
        return [Completion(choices[i]["text"], choices[i].get("finish_reason") == "stop") for i in range(samples)]

    def _scores(self, answer: Any, prompt: Sequence[int], top_k: int) -> Scores:
        entries = self.choices(answer).get(0, {}).get("prompt_logprobs")
        if entries is None:
            raise RefusedError(
                f"{self}: expected prompt_logprobs in the answer, got none. A server that tells log-probabilities "
                "only of tokens that it generates, as OpenAI's do, cannot say what a teacher thinks of given tokens: "
                "it works for generating data. Serve the teacher with vLLM."
            )
        try:
            return _read_scores(entries, prompt, top_k)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{self}: expected log-probabilities of the likeliest tokens and of the token itself, for each of "
                f"{len(prompt)} tokens but the first, got something else ({type(error).__name__}: {error})."
            ) from None

    def choices(self, answer: Any) -> dict[int, dict[str, Any]]:
        """The choices of an answer by their index, in whatever order they come."""
        try:
            choices = {int(choice["index"]): {"text": str(choice["text"]), **choice} for choice in answer["choices"]}
            if len(choices) < len(answer["choices"]):
                raise ValueError("one index twice")
            return choices
        except (KeyError, TypeError, ValueError):
            raise ServerError(f"{self}: expected choices with index and text, got something else.") from None


def _read_scores(entries: list[Any], prompt: Sequence[int], top_k: int) -> Scores:
    """Read prompt_logprobs: for each token a mapping id -> {logprob, decoded_token}, and nothing for the first.

    It holds the top_k likeliest tokens, and the token that stands there where it is not among them.
    """
    if len(entries) != len(prompt):
        raise ValueError(f"{len(entries)} entries")
    ids, log_probs, actual = [], [], []
    words: dict[int, str | None] = {}
    for token, entry in zip(prompt[1:], entries[1:], strict=True):
        said = {int(word): float(one["logprob"]) for word, one in entry.items()}
        likeliest = sorted(said, key=said.__getitem__, reverse=True)[:top_k]
        unused = top_k - len(likeliest)
        ids.append(likeliest + [0] * unused)
        log_probs.append([said[one] for one in likeliest] + [-math.inf] * unused)
        actual.append(said[int(token)])
        words |= {int(word): one.get("decoded_token") for word, one in entry.items()}
    kept = torch.tensor(log_probs, dtype=torch.float32).reshape(-1, top_k)
    told = torch.tensor(actual, dtype=torch.float32)
    if not bool((kept <= 1e-3).all() and (told <= 1e-3).all()):
        raise ValueError("a logarithm that is of no probability")
    kept = kept.masked_fill(kept <= FLOOR, -math.inf)
    return Scores(torch.tensor(ids, dtype=torch.long).reshape(-1, top_k), kept, told, words)
