"""Terms that look inside of student and teacher: hidden states, attention, relations.

Each names its layers by a `LayerMap`; only those are computed and kept. What a term trains (projections, a mixture of
heads) is optimised, saved and resumed with the student, and is no part of it. All are computed in float32, outside of
the student's autocast.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from potstill.errors import ModelError, ShapeError
from potstill.losses.attention import (
    attention_divergence,
    attention_mse,
    head_importance,
    head_overlap,
    match_heads,
    relation_divergence,
)
from potstill.losses.divergences import Divergence
from potstill.losses.embedding import embedding_divergence
from potstill.losses.hidden import hidden_cosine, hidden_l1, hidden_mse, linear_cka
from potstill.losses.relation import rkd_angle, rkd_distance
from potstill.models.capture import ActivationRequest, Anatomy, Vectors
from potstill.models.layer_map import LayerMap, Pairs, Projection, ProjectionKind
from potstill.train.objective import Number, Signals, Term, value_at

DISTANCES = {"mse": hidden_mse, "l1": hidden_l1, "cosine": hidden_cosine}


class InsideTerm(nn.Module, Term):
    """A term over pairs of layers: the mean over its pairs.

    Args:
        layers: which teacher layer each student layer learns from.
        weight: >= 0.
    """

    needs_teacher = True
    looks_inside = True
    over: Literal["counting", "attended"] = "attended"

    def __init__(self, layers: LayerMap, weight: Number) -> None:
        super().__init__()
        self.layers = layers
        self.weight = weight
        self.pairs: Pairs = ()

    def fit(self, student: Anatomy, teacher: Anatomy) -> tuple[ActivationRequest, ActivationRequest]:
        """See `Term`."""
        self.pairs = self.layers.pairs(student.layers, teacher.layers)
        self.build(student, teacher)
        students, teachers = (frozenset(side) for side in zip(*self.pairs, strict=True))
        return self.needs(students), self.needs(teachers)

    def build(self, student: Anatomy, teacher: Anatomy) -> None:
        """Make what is trained for the pairs, if anything is."""

    @abstractmethod
    def needs(self, layers: frozenset[int]) -> ActivationRequest:
        """What is asked of some layers."""

    @abstractmethod
    def compare(self, signals: Signals, pair: int, student: int, teacher: int) -> Tensor:
        """The scalar of the pair of that number: these two layers."""

    def forward(self, signals: Signals) -> Tensor:
        """The mean over the pairs."""
        with torch.autocast(signals.labels.device.type, enabled=False):
            return torch.stack([self.compare(signals, n, s, t) for n, (s, t) in enumerate(self.pairs)]).mean()


class Hidden(InsideTerm):
    """The distance between hidden states at the attended positions (`positions.attended`), prompts included.

    A mean over the positions of the optimiser step; with cka a quantity of the batch, whose mean over batches is
    weighted by their counting tokens.

    Args:
        layers: which teacher layer each student layer learns from.
        distance: mse, l1 or cosine (see `potstill.losses.hidden`), or cka: 1 - `linear_cka`.
        projection: what brings the student's states to the teacher's width, one for each pair: linear, mlp or none.
            None (default): linear where widths differ. With cka there is none.
        dimensions: teacher layer -> ids of as many of its dimensions as the student is wide, to compare with instead
            (Flex-KD); see `important_dimensions`. There is no projection then.
        weight: >= 0.

    Raises:
        ShapeError: the distance is not known, or options exclude each other.

    References:
        Jiao et al. 2019 (TinyBERT), arXiv 1909.10351, section 3.1; Sanh et al. 2019 (DistilBERT), arXiv 1910.01108.
    """

    name = "hidden"

    def __init__(
        self,
        layers: LayerMap | None = None,
        distance: Literal["mse", "l1", "cosine", "cka"] = "mse",
        *,
        projection: ProjectionKind | None = None,
        dimensions: Mapping[int, Tensor] | None = None,
        weight: Number = 1.0,
    ) -> None:
        super().__init__(layers or LayerMap.uniform(), weight)
        if distance not in (*DISTANCES, "cka"):
            raise ShapeError(f"Hidden: expected a distance of mse, l1, cosine, cka, got {distance!r}.")
        if projection not in (None, "none") and (distance == "cka" or dimensions is not None):
            other = "cka, which takes any widths" if distance == "cka" else "selected dimensions"
            raise ShapeError(f"Hidden: expected no projection with {other}, got {projection!r}.")
        self.distance = distance
        self.over = "counting" if distance == "cka" else "attended"
        self.projection = projection
        self.dimensions = dimensions
        self.projections = nn.ModuleList()

    def needs(self, layers: frozenset[int]) -> ActivationRequest:
        """Hidden states."""
        return ActivationRequest(hidden=layers)

    def build(self, student: Anatomy, teacher: Anatomy) -> None:
        """A projection for each pair."""
        self.projections = nn.ModuleList()
        if self.distance == "cka":
            return
        if self.dimensions is not None:
            self._check_dimensions(self.dimensions, student.width)
            return
        kind = self.projection or ("none" if student.width == teacher.width else "linear")
        self.projections.extend(Projection(kind, student.width, teacher.width) for _ in self.pairs)

    def _check_dimensions(self, dimensions: Mapping[int, Tensor], width: int) -> None:
        for _, layer in self.pairs:
            if layer not in dimensions or dimensions[layer].shape != (width,):
                found = list(dimensions[layer].shape) if layer in dimensions else f"layers {sorted(dimensions)}"
                raise ShapeError(
                    f"Hidden: expected {width} dimensions (the student's width) of teacher layer {layer}, got {found}."
                )

    def compare(self, signals: Signals, pair: int, student: int, teacher: int) -> Tensor:
        """See `InsideTerm`."""
        s, t = _attended(signals, student, teacher)
        if self.distance == "cka":
            return signals.batch_mean(1 - linear_cka(s, t))
        if self.dimensions is not None:
            t = t[:, self.dimensions[teacher].to(t.device)]
        else:
            s = self.projections[pair](s)
        return signals.attended_mean(DISTANCES[self.distance](s, t))


class Attention(InsideTerm):
    """The distance between attention maps, a mean over the attended positions, which do the looking.

    Both models compute attention the plain way (eager), because no other keeps the maps.

    Args:
        layers: which teacher layer each student layer learns from.
        divergence: between a token's attention as distributions; None (default): the squared distance of their
            directions, see `attention_mse`.
        heads: overlap (`head_overlap`: equal counts pair up, others share), entropy or variance (the same, and a
            teacher's focused heads count more, `head_importance`), or learned: a trained mixture of the student's
            heads learns from each of the teacher's; or pairs (student head, teacher head), from 0, for all layers.
        weight: >= 0.

    Raises:
        ShapeError: there is no such way to match heads, or a head is not there.
        ModelError: the student drops attention in training and a divergence is asked for.

    References:
        Zagoruyko and Komodakis 2016, arXiv 1612.03928; Jiao et al. 2019 (TinyBERT), arXiv 1909.10351.
    """

    name = "attention"

    def __init__(
        self,
        layers: LayerMap | None = None,
        divergence: Divergence | None = None,
        *,
        heads: Literal["overlap", "entropy", "variance", "learned"] | Sequence[tuple[int, int]] = "overlap",
        weight: Number = 1.0,
    ) -> None:
        super().__init__(layers or LayerMap.uniform(), weight)
        if not heads or (isinstance(heads, str) and heads not in ("overlap", "entropy", "variance", "learned")):
            raise ShapeError(
                f"Attention: expected heads of overlap, entropy, variance, learned, or pairs, got {heads!r}."
            )
        self.divergence = divergence
        self.heads = heads
        self.mixtures = nn.ParameterList()

    def needs(self, layers: frozenset[int]) -> ActivationRequest:
        """Attention maps."""
        return ActivationRequest(attentions=layers)

    def build(self, student: Anatomy, teacher: Anatomy) -> None:
        """A mixture of heads for each pair, where it is learned."""
        if self.divergence is not None and student.attention_dropout:
            raise ModelError(
                f"Attention: expected a student without attention dropout, got {student.attention_dropout}. What is "
                "dropped has no probability, and the divergence no bound. Set it to 0, or leave out the divergence."
            )
        if not isinstance(self.heads, str):
            for place, (who, model) in enumerate((("student", student), ("teacher", teacher))):
                strange = [pair[place] for pair in self.heads if not 0 <= pair[place] < model.heads]
                if strange:
                    raise ShapeError(
                        f"Attention: expected {who} heads in 0..{model.heads - 1}, as the {who} has {model.heads}, "
                        f"got {strange[0]}."
                    )
        self.mixtures = nn.ParameterList()
        if self.heads == "learned":
            # Near the overlap, and nowhere so far from it that a head could not be chosen any more.
            start = (head_overlap(teacher.heads, student.heads) + 0.1).log()
            self.mixtures.extend(nn.Parameter(start.clone()) for _ in self.pairs)

    def compare(self, signals: Signals, pair: int, student: int, teacher: int) -> Tensor:
        """See `InsideTerm`."""
        assert signals.teacher is not None
        assert signals.attended is not None
        s, t = signals.inside.attentions[student].float(), signals.teacher.inside.attentions[teacher].float()
        weights = None
        if self.heads == "learned":
            s, _ = match_heads(s, self.mixtures[pair].softmax(-1))
        elif not isinstance(self.heads, str):
            mine, theirs = zip(*self.heads, strict=True)
            s, t = s[:, mine], t[:, theirs]
        else:
            importance = None if self.heads == "overlap" else head_importance(t, signals.attended, self.heads)
            t, weights = match_heads(t, head_overlap(s.shape[1], t.shape[1]), importance)
        if self.divergence is None:
            values = attention_mse(s, t, weights)
        else:
            values = attention_divergence(s, t, weights, self.divergence)
        return signals.attended_mean(values[signals.attended])


class Relations(InsideTerm):
    """MiniLMv2: how the tokens of a row relate by their queries, keys and values; a mean over attended positions.

    Widths and head counts of the models need not be the same. See `relation_divergence`.

    Args:
        layers: which teacher layer each student layer learns from; the paper takes one: the student's last, from the
            teacher's last or one in its upper half.
        of: which relations; their mean is taken.
        heads: the number of relation heads; None: as many as the teacher has heads.
        weight: >= 0.

    Raises:
        ShapeError: there are no such relations, or more heads than dimensions.

    References:
        Wang et al. 2021 (MiniLMv2), arXiv 2012.15828, section 3.
    """

    name = "relations"

    def __init__(
        self,
        layers: LayerMap | None = None,
        of: tuple[str, ...] = Vectors._fields,
        *,
        heads: int | None = None,
        weight: Number = 1.0,
    ) -> None:
        super().__init__(layers or LayerMap.last_k(1), weight)
        if not of or not set(of) <= set(Vectors._fields):
            raise ShapeError(
                f"Relations: expected some of {', '.join(Vectors._fields)}, got {', '.join(of) or 'none'}."
            )
        self.of = tuple(of)
        self.heads = heads
        self.fitted_heads = heads or 0

    def needs(self, layers: frozenset[int]) -> ActivationRequest:
        """Queries, keys and values."""
        return ActivationRequest(vectors=layers)

    def build(self, student: Anatomy, teacher: Anatomy) -> None:
        """The number of relation heads, which both must be wide enough for."""
        self.fitted_heads = teacher.heads if self.heads is None else self.heads
        narrowest = min(student.narrowest, teacher.narrowest)
        if not 0 < self.fitted_heads <= narrowest:
            raise ShapeError(
                f"Relations: expected heads in 1..{narrowest}, the narrowest keys' width, got {self.fitted_heads}."
            )

    def compare(self, signals: Signals, pair: int, student: int, teacher: int) -> Tensor:
        """See `InsideTerm`."""
        assert signals.teacher is not None
        assert signals.attended is not None
        mine, theirs = signals.inside.vectors[student], signals.teacher.inside.vectors[teacher]
        mask = signals.attended
        apart = [
            relation_divergence(getattr(mine, name).float(), getattr(theirs, name), mask, self.fitted_heads)
            for name in self.of
        ]
        return signals.attended_mean(torch.stack(apart).mean(0)[mask])


class Similarity(InsideTerm):
    """Relations between the examples of a batch, by the mean of each example's hidden states.

    A quantity of the batch of one rank, whose mean over batches is weighted by their counting tokens: it learns from
    large batches, and accumulation does not make them larger.

    Args:
        layers: which teacher layer each student layer learns from.
        kind: distance or angle (RKD), or distribution: `embedding_divergence`.
        temperature: of the distributions, > 0. No T^2 factor is applied.
        divergence: between the distributions; default: forward KL.
        weight: >= 0.

    Raises:
        ShapeError: there is no such kind.

    References:
        Park et al. 2019 (RKD), arXiv 1904.05068; Fang et al. 2021 (SEED), arXiv 2101.04731.
    """

    name = "similarity"
    over: Literal["counting", "attended"] = "counting"

    def __init__(
        self,
        layers: LayerMap | None = None,
        kind: Literal["distance", "angle", "distribution"] = "distance",
        *,
        temperature: Number = 0.1,
        divergence: Divergence | None = None,
        weight: Number = 1.0,
    ) -> None:
        super().__init__(layers or LayerMap.last_k(1), weight)
        if kind not in ("distance", "angle", "distribution"):
            raise ShapeError(f"Similarity: expected a kind of distance, angle, distribution, got {kind!r}.")
        self.kind = kind
        self.temperature = temperature
        self.divergence = divergence

    def needs(self, layers: frozenset[int]) -> ActivationRequest:
        """Hidden states."""
        return ActivationRequest(hidden=layers)

    def compare(self, signals: Signals, pair: int, student: int, teacher: int) -> Tensor:
        """See `InsideTerm`."""
        s, t = _pooled(signals, student, teacher)
        if self.kind == "distribution":
            if len(s) < 2:
                return signals.batch_mean(s[:0].sum())
            temperature = value_at(self.temperature, signals.step)
            apart = embedding_divergence(s, t, temperature=temperature, divergence=self.divergence)
            return signals.batch_mean(apart)
        return signals.batch_mean((rkd_distance if self.kind == "distance" else rkd_angle)(s, t))


def _attended(signals: Signals, student: int, teacher: int) -> tuple[Tensor, Tensor]:
    """The hidden states [A, Hs] and [A, Ht] of two layers at the attended positions."""
    assert signals.teacher is not None
    assert signals.attended is not None
    s, t = signals.inside.hidden[student], signals.teacher.inside.hidden[teacher]
    return s[signals.attended].float(), t[signals.attended].float()


def _pooled(signals: Signals, student: int, teacher: int) -> tuple[Tensor, Tensor]:
    """The mean hidden state of each example that has an attended position: [E, Hs] and [E, Ht]."""
    assert signals.teacher is not None
    assert signals.attended is not None
    there = signals.attended[signals.attended.any(1)].unsqueeze(-1)
    rows = signals.attended.any(1)

    def mean(states: Tensor) -> Tensor:
        return (states[rows].float() * there).sum(1) / there.sum(1)

    return mean(signals.inside.hidden[student]), mean(signals.teacher.inside.hidden[teacher])
