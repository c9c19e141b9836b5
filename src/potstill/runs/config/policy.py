"""Terms that learn from the tokens that the student has drawn."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from potstill.losses.alignment import Task
from potstill.runs.config.document import Part
from potstill.runs.config.numbers import Weight


class PolicyPart(Part):
    """Reverse KL through the tokens that the student drew: needs only the teacher's log-probability of each."""

    term: Literal["policy"]
    tasks: ClassVar[frozenset[Task]] = frozenset({"causal"})
    weight: Weight = 1.0
    discount: float = Field(0.0, ge=0, le=1, description="of later rewards; 0: each token answers for itself alone")
    whiten: bool = Field(False, description="advantages with mean 0 and deviation 1 in each batch")
    clip: float | None = Field(None, gt=0, description="how far the ratio to the student that wrote may be from 1")
    importance: bool = Field(True, description="weigh by the student's over the sampler's probability")


class MiniLLMPart(Part):
    """Reverse KL of whole texts as MiniLLM lowers it; each piece can be switched off. Goes with rollout.teacher_mix."""

    term: Literal["minillm"]
    tasks: ClassVar[frozenset[Task]] = frozenset({"causal"})
    weight: Weight = 1.0
    single_step: bool = Field(True, description="a token's own reward is summed over the vocabulary, not sampled")
    length_normalization: bool = Field(True, description="returns are divided by how many tokens still come")
    whiten: bool = Field(True, description="returns with mean 0 and deviation 1 in each batch")
    clip: float | None = Field(0.2, gt=0, description="how far the ratio to the student that wrote may be from 1")
    importance: bool = Field(True, description="weigh by the student's over the sampler's probability")
