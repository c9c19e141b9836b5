"""A teacher that gives signals as a cache does, without files: rows of packed bytes, unpacked at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from potstill.losses.targets import Targets
from potstill.teachers.cache.codec import Codec
from potstill.teachers.cache.store import COMPRESSION
from potstill.teachers.teacher import Teacher, TeacherOutput


def language_like_logits(n: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Logits [n, V] like a language model's: frequent tokens first, a few likely ones in each context."""
    generator = torch.Generator().manual_seed(seed)
    prior = -1.65 * torch.arange(1, vocabulary + 1).log()
    return prior + 4.0 * torch.randn(n, vocabulary, generator=generator)


class Recorded(Teacher):
    """The targets of each row of one batch, on the batch's device."""

    def __init__(self, codec: Codec, targets: Sequence[Targets]) -> None:
        self.codec, self.tokens = codec, [row.leading.numel() for row in targets]
        packed = [codec.encode(row, 0) for row in targets]
        self.rows = [(COMPRESSION.compress(row, asbytes=True), len(row)) for row in packed]

    def __call__(self, batch: Any, alignment: Any) -> TeacherOutput:
        signals = [COMPRESSION.decompress(row, size, asbytes=True) for row, size in self.rows]
        targets, device = self.codec.decode(signals, self.tokens)[0], batch["input_ids"].device
        moved = {name: value.to(device) for name, value in vars(targets).items() if isinstance(value, Tensor)}
        return TeacherOutput(replace(targets, **moved))
