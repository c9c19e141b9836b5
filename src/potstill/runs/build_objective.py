"""From the terms of a recipe to the objective that they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from potstill.errors import RecipeError, UserError
from potstill.models.layer_map import LayerMap
from potstill.runs.config.objective import AdaptiveKLPart, BiLDPart, LabelsPart, LogitsPart, TAIDPart, TermPart, ValuesPart
from potstill.runs.config.inside import AttentionPart, DeepSupervisionPart, HiddenPart, RelationsPart, SimilarityPart
from potstill.runs.config.across import ChunksPart, MappedLogitsPart, ULDPart
from potstill.runs.config.policy import MiniLLMPart, PolicyPart
from potstill.runs.config.numbers import SchedulePart
from potstill.models.capture import Anatomy, ActivationRequest
from potstill.train.terms.dense import TAID, AdaptiveKL, BiLD, Values
from potstill.train.terms.across import ULD, Chunks, MappedLogits
from potstill.train.terms.layers import Attention, Hidden, Relations, Similarity
from potstill.train.terms.supervision import DeepSupervision
from potstill.train.objective import Labels, Logits, Objective
from potstill.train.terms.policy import PolicyGradient
from potstill.train.objective import Term

# (layers, number of batches) -> teacher layer -> its important dimensions
Select = Callable[[LayerMap, int], Mapping[int, Tensor]]


def build(parts: Sequence[TermPart], steps: int, select: Select) -> Objective:
    """The objective.

    Args:
        parts: the recipe's terms.
        steps: how long the run is, for the schedules.
        select: picks dimensions of the teacher, for terms that ask for it.
    """
    return Objective([_term(part, steps, select) for part in parts])


def looks_inside(part: TermPart) -> bool:
    """Does the term ask for layers?"""
    return isinstance(part, HiddenPart | AttentionPart | RelationsPart | SimilarityPart | DeepSupervisionPart)


def reads_across(part: TermPart) -> bool:
    """Does the term compare bytes, with a teacher that may have another tokenizer?"""
    return isinstance(part, ChunksPart | MappedLogitsPart | ULDPart)


def check(objective: Objective, student: Anatomy, teacher: Anatomy | None) -> ActivationRequest:
    """Look that every term goes with the models: what all need of the teacher; None for one that no term looks into.

    Raises:
        RecipeError: one does not; it is named by its key.
    """
    asked = ActivationRequest()
    for place, term in enumerate(objective.terms):
        try:
            asked |= term.fit(student, teacher if term.needs_teacher and teacher else student)[1]
        except UserError as error:
            raise RecipeError(f"objective.{place}: {error}") from None
    return asked


def _term(part: TermPart, steps: int, select: Select) -> Term:
    def number(value: float | SchedulePart) -> Any:
        return value.build(steps) if isinstance(value, SchedulePart) else value

    weight = number(part.weight)
    if isinstance(part, LabelsPart):
        return Labels(weight=weight)
    if isinstance(part, LogitsPart):
        return Logits(
            part.divergence.build(),
            weight=weight,
            temperature=number(part.temperature),
            tokens=part.tokens,
            share=number(part.share),
            top_k=part.top_k,
            text=part.text,
        )
    if isinstance(part, ValuesPart):
        return Values(weight)
    if isinstance(part, BiLDPart):
        return BiLD(weight, part.top_k, number(part.temperature))
    if isinstance(part, AdaptiveKLPart):
        return AdaptiveKL(weight, part.head_mass, number(part.temperature))
    if isinstance(part, TAIDPart):
        return TAID(number(part.share), weight, number(part.temperature))
    if isinstance(part, PolicyPart):
        return PolicyGradient(weight, **part.model_dump(exclude={"term", "weight"}))
    if isinstance(part, MiniLLMPart):
        return PolicyGradient(weight, discount=1.0, **part.model_dump(exclude={"term", "weight"}))
    if isinstance(part, DeepSupervisionPart):
        return DeepSupervision(
            part.layers, part.divergence.build(), weight=weight, temperature=number(part.temperature)
        )
    if isinstance(part, ChunksPart):
        return Chunks(weight, number(part.temperature), part.divergence.build(), part.bias_threshold, part.biased)
    if isinstance(part, MappedLogitsPart):
        return MappedLogits(part.divergence.build(), weight, number(part.temperature), part.top_k)
    if isinstance(part, ULDPart):
        return ULD(weight, number(part.temperature))
    layers = part.layers.build()
    if isinstance(part, HiddenPart):
        chosen = None if part.select_batches is None else select(layers, part.select_batches)
        return Hidden(layers, part.distance, projection=part.projection, dimensions=chosen, weight=weight)
    if isinstance(part, RelationsPart):
        return Relations(layers, tuple(part.of), heads=part.heads, weight=weight)
    divergence = None if part.divergence is None else part.divergence.build()
    if isinstance(part, AttentionPart):
        return Attention(layers, divergence, heads=part.heads, weight=weight)
    return Similarity(layers, part.kind, temperature=number(part.temperature), divergence=divergence, weight=weight)
