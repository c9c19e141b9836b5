"""What is asked of any engine that writes text, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.errors import ShapeError


@dataclass(frozen=True)
class Sampling:
    """How text is sampled.

    Args:
        max_new_tokens: how many tokens at most.
        sampling_temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens that together have this probability.
        top_k: sample among so many of the likeliest tokens; 0 for all.
        samples: how many completions for each prompt.
        stop: texts that end a completion; they are not part of it.
        seed: the same seed gives the same text, but for the rounding of an engine that does other work beside it; None
            for chance.

    Raises:
        ShapeError: a number is outside its range.
    """

    max_new_tokens: int = 256
    sampling_temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("sampling_temperature", 0), ("top_k", 0), ("samples", 1)):
            if not getattr(self, name) >= least:
                raise ShapeError(f"Sampling: expected {name} >= {least}, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise ShapeError(f"Sampling: expected top_p in (0, 1], got {self.top_p}.")

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the very distribution that a model gives."""
        return self.sampling_temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Completion:
    """One way in which a prompt goes on.

    Args:
        text: without the prompt and without what stopped it.
        ended: the model or a stop text ended it; False where max_new_tokens cut it off.
    """

    text: str
    ended: bool
