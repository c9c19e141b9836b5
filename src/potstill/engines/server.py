"""A model behind a vLLM or OpenAI-compatible server: generates text, and scores given tokens where the server can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from potstill.engines.client import JsonClient
from potstill.engines.sampling import Completion, Sampling
from potstill.errors import RefusedError, ServerError, nearest
from potstill.losses.alignment import MOST_TOKENS
from potstill.losses.declared import NonEmpty, Range, Record

FLOOR = -9999.0  # what vLLM writes for log(0), which JSON cannot express


@dataclass(frozen=True)
class ServerConfig(Record):
    """A model behind a server that generates text, such as vLLM's or OpenAI's.

    Args:
        url: such as http://127.0.0.1:8000
        model: the name under which it is served
        key_variable: the environment variable with the API key; by default POTSTILL_API_KEY, then OPENAI_API_KEY
        concurrency: maximum number of requests at once
        timeout_s: how long the server may be silent
    """

    url: Annotated[str, NonEmpty()]
    model: Annotated[str, NonEmpty()]
    key_variable: str | None = None
    concurrency: Annotated[int, Range(ge=1)] = 16
    timeout_s: Annotated[float, Range(gt=0)] = 120.0

    def connect(self, end_ids: frozenset[int] = frozenset()) -> ModelServer:
        options = {"key_variable": self.key_variable, "concurrency": self.concurrency, "timeout_s": self.timeout_s}
        return ModelServer(self.url, self.model, end_ids=end_ids, **options)


@dataclass(frozen=True)
class Scores:
    """A model's log-probabilities for one prompt of T tokens. Row t is about token t + 1, given tokens 0 to t.

    `log_probs` are float32 nats; -inf in unused slots.
    """

    ids: Tensor  # [T - 1, K] the likeliest tokens
    log_probs: Tensor  # [T - 1, K] theirs
    actual: Tensor  # [T - 1] that of the prompt's own token
    words: dict[int, str | None]  # token id -> its text on the server, for all tokens in the answer


class ModelServer:
    """One model behind a server. All methods raise RefusedError and ServerError, as `JsonClient.request`.

    Args:
        url: such as http://127.0.0.1:8000.
        model: the name under which it is served.
        end_ids: tokens that end a generated text, besides those that the server knows.
        **options: of `JsonClient`, which raises the errors: key_variable, concurrency, timeout_s and attempts.
    """

    def __init__(self, url: str, model: str, *, end_ids: frozenset[int] = frozenset(), **options: Any) -> None:
        self.client = JsonClient(url, **options)
        self.model = model
        # vLLM's own keys. They are left out once a server has refused them, as OpenAI's do.
        self._token_options: dict[str, Any] = {"skip_special_tokens": False, "return_token_ids": True}
        self._token_options |= {"stop_token_ids": sorted(end_ids)} if end_ids else {}

    def __repr__(self) -> str:
        return f"{self.model} at {self.client.url}"

    def card(self) -> dict[str, Any]:
        """The model's entry in /v1/models, if the model is served; vLLM's has max_model_len."""
        answer = self.client.request("GET", "/v1/models")
        try:
            cards = {str(card["id"]): dict(card) for card in answer["data"]}
        except (KeyError, TypeError, ValueError):
            raise ServerError(f"{self}: expected a list of models from /v1/models, got something else.") from None
        if self.model not in cards:
            raise RefusedError(
                f"{self}: expected one of the models that are served there, got another. Served are "
                f"{', '.join(cards) or 'none'}.{nearest(self.model, cards)}"
            )
        limit = cards[self.model].get("max_model_len")
        if limit is not None and (not isinstance(limit, int) or limit < 2):
            raise ServerError(f"{self}: expected a number of tokens as max_model_len, got {limit!r:.40}.")
        return cards[self.model]

    def complete(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Generate the completions of each prompt, text or token ids, in order; OpenAI's own servers refuse a top_k.

        Special tokens stay in the texts, and their token ids come with them, where the server knows how (vLLM).
        """
        options: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.sampling_temperature}
        options |= {"top_p": sampling.top_p, "n": sampling.samples}
        # Defaults are left out, for servers that do not know the key.
        options |= {"top_k": sampling.top_k} if sampling.top_k else {}
        options |= {"stop": list(sampling.stop)} if sampling.stop else {}
        options |= {"seed": sampling.seed} if sampling.seed is not None else {}
        completions = []
        for answer in self._post_for_tokens(prompts, options):
            choices = self.choices(answer)
            indices = sorted(choices)
            if indices != [*range(sampling.samples)]:
                raise ServerError(
                    f"{self}: expected {sampling.samples} choices in an answer, got those of index {indices}."
                )
            ordered = [choices[i] for i in indices]
            completions.append([_completion(choice) for choice in ordered])
        return completions

    def score(self, prompts: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        """Compute log-probabilities for the tokens of each prompt, and for the `top_k` likeliest at each position.

        One token is generated and dropped, for no server does without: a prompt must be shorter than its limit.
        """
        answers = self._post_prompts(prompts, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k})
        return [self._scores(answer, prompt, top_k) for answer, prompt in zip(answers, prompts, strict=True)]

    def detokenize(self, ids: Sequence[int]) -> str | None:
        """The server's text of token ids, or None where it has no /detokenize, which is vLLM's."""
        try:
            answer = self.client.request("POST", "/detokenize", {"model": self.model, "tokens": list(ids)})
        except RefusedError as error:
            if error.status in (404, 405):
                return None
            raise
        return str(answer["prompt"]) if isinstance(answer, dict) and "prompt" in answer else None

    def _post_for_tokens(self, prompts: Sequence[str | Sequence[int]], options: dict[str, Any]) -> list[Any]:
        try:
            return self._post_prompts(prompts, options | self._token_options)
        except RefusedError as error:
            if error.status not in (400, 422) or not self._token_options:
                raise
            answers = self._post_prompts(prompts, options)
            self._token_options = {}
            return answers

    def _post_prompts(self, prompts: Sequence[str | Sequence[int]], options: dict[str, Any]) -> list[Any]:
        plain = [prompt if isinstance(prompt, str) else [int(token) for token in prompt] for prompt in prompts]
        bodies = [{"model": self.model, "prompt": prompt, **options} for prompt in plain]
        return self.client.post_all("/v1/completions", bodies)

    def _scores(self, answer: Any, prompt: Sequence[int], top_k: int) -> Scores:
        entries = self.choices(answer).get(0, {}).get("prompt_logprobs")
        if entries is None:
            raise RefusedError(
                f"{self}: expected prompt_logprobs in the answer, got none. OpenAI's servers give log-probabilities of "
                "generated tokens alone, which is enough to generate data; serve a teacher with vLLM."
            )
        try:
            return _parse_scores(entries, prompt, top_k)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ServerError(
                f"{self}: expected log-probabilities of the likeliest tokens and of the token itself, for each of "
                f"{len(prompt)} tokens but the first, got something else ({type(error).__name__}: {error})."
            ) from None

    def choices(self, answer: Any) -> dict[int, dict[str, Any]]:
        """The choices of an answer by their index, in whatever order they come."""
        try:
            choices = {int(choice["index"]): dict(choice) for choice in answer["choices"]}
            if len(choices) < len(answer["choices"]) or not all(map(_is_choice, choices.values())):
                raise ValueError("one index twice, or a value of another type")
            return choices
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ServerError(f"{self}: expected choices with index and text, got something else.") from None


def _is_choice(choice: dict[str, Any]) -> bool:
    """Whether a choice has a text, and no other token ids than whole numbers."""
    ids = choice.get("token_ids")
    return isinstance(choice["text"], str) and (ids is None or (isinstance(ids, list) and all(map(_is_id, ids))))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_TOKENS


def _completion(choice: dict[str, Any]) -> Completion:
    """A choice of an answer; without token ids where it has none, or where a stop string, its reason, ended it."""
    ids = () if isinstance(choice.get("stop_reason"), str) else tuple(choice.get("token_ids") or ())
    return Completion(choice["text"], choice.get("finish_reason") == "stop", ids)


def _parse_scores(entries: list[Any], prompt: Sequence[int], top_k: int) -> Scores:
    """Parse prompt_logprobs: for each token a mapping id -> {logprob, decoded_token}; None for the first.

    It holds the top_k likeliest tokens, and the prompt's own token where it is not among them.
    """
    if len(entries) != len(prompt):
        raise ValueError(f"{len(entries)} entries")
    ids, log_probs, actual = [], [], []
    words: dict[int, str | None] = {}
    for token, entry in zip(prompt[1:], entries[1:], strict=True):
        by_id = {int(key): float(value["logprob"]) for key, value in entry.items()}
        if not all(map(_is_id, by_id)):
            raise ValueError("an id that no token has")
        likeliest = sorted(by_id, key=by_id.__getitem__, reverse=True)[:top_k]
        unused = top_k - len(likeliest)
        ids.append(likeliest + [0] * unused)
        log_probs.append([by_id[i] for i in likeliest] + [-math.inf] * unused)
        actual.append(by_id[int(token)])
        words |= {int(key): value.get("decoded_token") for key, value in entry.items()}
    top = torch.tensor(log_probs, dtype=torch.float32).reshape(-1, top_k)
    own = torch.tensor(actual, dtype=torch.float32)
    if not bool((top <= 1e-3).all() and (own <= 1e-3).all()):
        raise ValueError("a log-probability above 0")
    if bool((top.exp().sum(-1) > 1 + 1e-2).any()):
        raise ValueError("probabilities whose sum is above 1")
    top = top.masked_fill(top <= FLOOR, -math.inf)
    return Scores(torch.tensor(ids, dtype=torch.long).reshape(-1, top_k), top, own, words)
