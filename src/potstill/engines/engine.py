"""The interface of every engine that generates text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from potstill.engines.sampling import Completion, Sampling

Prompt = str | Sequence[int]


class Engine(Protocol):
    """Generates text after prompts."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Generate `sampling.samples` completions of each prompt, in order.

        Args:
            prompts: texts, which get the tokenizer's special tokens; or token ids, which are used as they are.
            sampling: how tokens are drawn.
        """
