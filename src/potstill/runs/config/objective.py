"""What is minimised: terms."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from potstill.losses.alignment import ANSWERS, DISTRIBUTIONS, Task
from potstill.runs.config.across import ChunksPart, MappedLogitsPart, ULDPart
from potstill.runs.config.divergence import DivergencePart, NamedDivergence
from potstill.runs.config.document import Part
from potstill.runs.config.inside import AttentionPart, DeepSupervisionPart, HiddenPart, RelationsPart, SimilarityPart
from potstill.runs.config.numbers import SchedulePart, Share, Temperature, Weight
from potstill.runs.config.policy import MiniLLMPart, PolicyPart


class LogitsPart(Part):
    """Match the teacher's next-token distribution."""

    term: Literal["logits"]
    tasks: ClassVar[frozenset[Task]] = DISTRIBUTIONS
    divergence: NamedDivergence = DivergencePart(kind="forward_kl")
    weight: Weight = 1.0
    temperature: Temperature = 1.0
    tokens: Literal["all", "entropy", "confident", "confidence"] = Field(
        "all",
        description="which count: a share where the teacher is least sure (entropy) or most (confident), "
        "or each by its sureness (confidence)",
    )
    share: Share = Field(0.5, description="of the tokens, for entropy and confident")
    top_k: int | None = Field(None, ge=1, description="compare the teacher's likeliest tokens alone")
    text: Literal["all", "data", "own"] = Field(
        "all", description="own: what the student has written alone (rollout); data: all else alone"
    )


class BiLDPart(Part):
    """Match differences between the largest logits, as both rank them (BiLD). Makes logits twice, some at a time."""

    term: Literal["bild"]
    tasks: ClassVar[frozenset[Task]] = DISTRIBUTIONS
    weight: Weight = 1.0
    top_k: int = Field(8, ge=2, description="how many logits of each")
    temperature: Temperature = 3.0


class AdaptiveKLPart(Part):
    """Forward and reverse KL, weighted by where the models differ (AKL). Makes logits twice, some at a time."""

    term: Literal["adaptive_kl"]
    tasks: ClassVar[frozenset[Task]] = DISTRIBUTIONS
    weight: Weight = 1.0
    head_mass: float = Field(0.5, gt=0, lt=1, description="the share of the teacher's probability that is its head")
    temperature: Temperature = 1.0


class TAIDPart(Part):
    """Forward KL to a target that moves from the student to the teacher (TAID). Makes logits twice, some at a time."""

    term: Literal["taid"]
    tasks: ClassVar[frozenset[Task]] = DISTRIBUTIONS
    share: Share = Field(
        SchedulePart.model_validate({"schedule": "linear", "start": 0.4, "end": 1.0}),
        description="of the teacher; linear from 0.4 to 1",
    )
    weight: Weight = 1.0
    temperature: Temperature = 1.0


class LabelsPart(Part):
    """Match the data's own tokens, classes or numbers."""

    term: Literal["labels"]
    tasks: ClassVar[frozenset[Task]] = ANSWERS
    weight: Weight = 1.0


class ValuesPart(Part):
    """Match what the teacher says before any softmax: its number in a regression."""

    term: Literal["values"]
    tasks: ClassVar[frozenset[Task]] = ANSWERS
    weight: Weight = 1.0


TermPart = Annotated[
    LogitsPart
    | LabelsPart
    | ValuesPart
    | BiLDPart
    | AdaptiveKLPart
    | TAIDPart
    | PolicyPart
    | MiniLLMPart
    | HiddenPart
    | AttentionPart
    | RelationsPart
    | SimilarityPart
    | DeepSupervisionPart
    | ChunksPart
    | MappedLogitsPart
    | ULDPart,
    Field(discriminator="term"),
]
