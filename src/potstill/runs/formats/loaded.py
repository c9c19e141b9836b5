"""A language model in a file, loaded by the program that the file is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

CHUNK = 256  # tokens of one pass: their logits are held at once


class LoadedFile(ABC):
    """A language model with its cache; close it, or use it in a with statement."""

    program: str  # that runs it, with its version
    num_tokens: int
    context_length: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Free the memory of the program."""

    @abstractmethod
    def ends(self) -> frozenset[int]:
        """The tokens that end a generated text."""

    @abstractmethod
    def _clear(self) -> None:
        """Empty the cache."""

    @abstractmethod
    def _decode(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Read tokens at the positions from `start` on, with what is in the cache, and give their logits."""

    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Give the next-token logits of all positions of a row, float32 [up to CHUNK, V] at a time."""
        self._clear()
        for start in range(0, len(ids), CHUNK):
            yield self._decode(ids[start : start + CHUNK], start)

    def generate(self, ids: Sequence[int], new_tokens: int, ends: frozenset[int] | None = None) -> list[int]:
        """Continue a row greedily, to an end token, which is the last one then; by default to those of the file."""
        *_, logits = self.logits(ids)
        return self.proceed(logits, len(ids), new_tokens, self.ends() if ends is None else ends)

    def proceed(self, logits: np.ndarray, start: int, new_tokens: int, ends: frozenset[int]) -> list[int]:
        """Continue the row in the cache, of `start` tokens, from its last logits; see `generate`."""
        written: list[int] = []
        while len(written) < new_tokens:
            written.append(int(logits[-1].argmax()))
            if written[-1] in ends or len(written) == new_tokens:
                break
            logits = self._decode(written[-1:], start + len(written) - 1)
        return written
