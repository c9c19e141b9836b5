"""What generates text, its sampling settings, and the text that comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from potstill.losses.declared import Range, Record


@dataclass(frozen=True)
class TokenSampling(Record):
    """How tokens are drawn from a model's distribution.

    Args:
        max_new_tokens: maximum number of generated tokens.
        sampling_temperature: divides the logits; 0 is greedy decoding.
        top_p: sample among the likeliest tokens with this total probability.
        top_k: sample among this many of the likeliest tokens; 0 for all.
    """

    max_new_tokens: Annotated[int, Range(ge=1)] = 256
    sampling_temperature: Annotated[float, Range(ge=0)] = 1.0
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Range(ge=0)] = 0

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, unchanged."""
        return self.sampling_temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Sampling(TokenSampling):
    """How texts are sampled.

    Args:
        samples: completions per prompt.
        stop: strings that end a completion; not part of it.
        seed: the same seed gives the same text, up to rounding in an engine that serves other requests too; None draws
            a random one.
    """

    samples: Annotated[int, Range(ge=1)] = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """Text generated after one prompt, with its special tokens, but without the token or stop string that ended it."""

    text: str
    ended: bool  # by the model or a stop string; False where max_new_tokens cut it
    ids: tuple[int, ...] = ()  # with the end token; none where a stop string ended it, or a server returns none


# A text, which gets the tokenizer's special tokens; or token ids, which are used as they are.
Prompt = str | Sequence[int]


class Engine(Protocol):
    """Generates text after prompts."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Generate `sampling.samples` completions of each prompt, in order."""
