"""Terms for a teacher with another tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from potstill.recipe.divergence import DivergencePart, NamedDivergence
from potstill.recipe.document import Part
from potstill.recipe.numbers import Temperature, Weight


class ChunksPart(Part):
    """Match how likely each chunk of bytes is, whatever the tokenizers (ALM)."""

    term: Literal["chunks"]
    divergence: NamedDivergence = DivergencePart(kind="forward_kl")
    weight: Weight = 1.0
    temperature: Temperature = Field(100.0, description="of a chunk's probability; the loss keeps its size")
    bias_threshold: float = Field(
        0.1, ge=0, le=1, description="how much of a chunk's probability the teacher may keep for longer tokens"
    )
    biased: Literal["merge", "drop"] = Field("merge", description="beyond that: take it with the next, or leave it out")


class SharedTokensPart(Part):
    """Match next-token distributions over the tokens that both have, where both have the same token."""

    term: Literal["shared_tokens"]
    divergence: NamedDivergence = DivergencePart(kind="forward_kl")
    weight: Weight = 1.0
    temperature: Temperature = 1.0
    top_k: int = Field(256, ge=1, description="the likeliest shared tokens; the others count as everything else")


class ULDPart(Part):
    """Match the probabilities in falling order, whatever tokens they are of (ULD). Builds whole logits."""

    term: Literal["uld"]
    weight: Weight = 1.0
    temperature: Temperature = 1.0
