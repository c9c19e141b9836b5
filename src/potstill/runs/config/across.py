"""Terms for a teacher with another tokenizer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from potstill.losses.alignment import Task
from potstill.runs.config.divergence import DivergencePart, NamedDivergence
from potstill.runs.config.document import Part
from potstill.runs.config.numbers import Temperature, Weight

OF_TEXT: frozenset[Task] = frozenset({"causal"})


class ChunksPart(Part):
    """Match how likely each chunk of bytes is, whatever the tokenizers (ALM)."""

    tasks: ClassVar[frozenset[Task]] = OF_TEXT
    term: Literal["chunks"]
    divergence: NamedDivergence = DivergencePart(kind="forward_kl")
    weight: Weight = 1.0
    temperature: Temperature = Field(100.0, description="of a chunk's probability; the loss keeps its size")
    bias_threshold: float = Field(
        0.1, ge=0, le=1, description="how much of a chunk's probability the teacher may keep for longer tokens"
    )
    biased: Literal["drop", "merge"] = Field("drop", description="beyond that: leave it out, or take it with the next")


class MappedLogitsPart(Part):
    """Match next-token distributions in the student's tokens, where both begin a token at the same byte. A token of the
    teacher counts for the one with which the student begins to say it.
    """

    tasks: ClassVar[frozenset[Task]] = OF_TEXT
    term: Literal["mapped_logits"]
    divergence: NamedDivergence = DivergencePart(kind="forward_kl")
    weight: Weight = 1.0
    temperature: Temperature = 1.0
    top_k: int = Field(256, ge=1, description="the likeliest of the student's tokens; the others are one event")


class ULDPart(Part):
    """Match the probabilities in falling order, whatever tokens they are of (ULD). Builds whole logits."""

    tasks: ClassVar[frozenset[Task]] = OF_TEXT
    term: Literal["uld"]
    weight: Weight = 1.0
    temperature: Temperature = 1.0
