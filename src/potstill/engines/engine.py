"""What everyone who writes text does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from potstill.engines.sampling import Completion, Sampling

Prompt = str | Sequence[int]


class Engine(Protocol):
    """Who continues prompts."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """For each prompt, in order, its `sampling.samples` completions.

        Args:
            prompts: texts, which get the tokenizer's special tokens; or token ids, which are taken as they are.
            sampling: how they are drawn.
        """
