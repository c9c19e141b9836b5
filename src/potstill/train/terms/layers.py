"""Terms over layers, in float32, outside of the student's autocast: hidden states, attention maps, relations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from potstill.errors import ModelError, ShapeError
from potstill.losses import attention
from potstill.losses.alignment import Task
from potstill.losses.declared import Either, InPairs, NonEmpty, PythonOnly, Range
from potstill.losses.divergences import Divergence
from potstill.losses.embedding import embedding_divergence
from potstill.losses.hidden import hidden_cosine, hidden_l1, hidden_mse, linear_cka
from potstill.losses.rkd import rkd_angle, rkd_distance
from potstill.losses.schedule import Temperature, Weight, value_at
from potstill.models.capture import ActivationRequest
from potstill.models.layer_map import LastK, Layer, LayerMap, Pairs, Projection, ProjectionKind, Uniform
from potstill.models.shapes import ModelShape
from potstill.train.signals import Signals
from potstill.train.terms.term import FittedTerm, SelectDimensions, Term

DISTANCES = {"mse": hidden_mse, "l1": hidden_l1, "cosine": hidden_cosine}


@dataclass(frozen=True)
class LayerTerm(Term):
    """The mean of a comparison over pairs of layers.

    Args:
        layers: which teacher layer each student layer learns from.
    """

    layers: LayerMap = Uniform()
    _: KW_ONLY
    weight: Weight = 1.0
    reads_layers = True
    over: ClassVar[Literal["target", "attended"]] = "attended"
    # What is read of each layer:
    activations: ClassVar[Literal["hidden", "attentions", "vectors", "routers"]] = "hidden"
    trained_as: ClassVar[str] = "trained"  # the name in checkpoints of what `make_trained` returns

    def fit(self, student: ModelShape, teacher: ModelShape) -> FittedTerm:
        self.check_heads(student, teacher)
        pairs = self.layers.pairs(student.layers, teacher.layers)
        named = [layer for pair in pairs for layer in pair if isinstance(layer, str)]
        if named and self.activations != "hidden":
            raise ShapeError(
                f"{self.name}: expected layers by their numbers, got {named[0]}, which is a hidden state. "
                "Use hidden or similarity for it."
            )
        compute = PairedLayers(self, pairs, self.make_trained(student, teacher, pairs))
        requests = (ActivationRequest(**{self.activations: frozenset(side)}) for side in zip(*pairs, strict=True))
        return FittedTerm(compute, *requests)

    def check_heads(self, *models: ModelShape) -> None:
        """Check that the models have the attention heads that the term reads."""
        family = next((model.family for model in models if not model.heads), None)
        if self.activations != "hidden" and family is not None:
            raise ModelError(
                f"{self.name}: expected models with attention heads, got the family {family}, which has none. Use "
                "hidden or similarity, which compare hidden states."
            )

    def make_trained(self, student: ModelShape, teacher: ModelShape, pairs: Pairs) -> nn.Module | None:
        """Make what is trained, a list with an entry for each pair; raises UserError for models that do not fit."""
        return None

    def captured(self, signals: Signals, student: Layer, teacher: Layer) -> tuple[Any, Any, Tensor]:
        """Return the activations of a pair of layers, and the mask [B, T] of the attended positions."""
        assert signals.teacher is not None
        assert signals.attended is not None
        s, t = (getattr(inside, self.activations) for inside in (signals.inside, signals.teacher.inside))
        return s[student], t[teacher], signals.attended

    @abstractmethod
    def compare(self, signals: Signals, student: Layer, teacher: Layer, trained: Any) -> Tensor:
        """Compute the scalar of one pair of layers; `trained` is the pair's entry of `make_trained`, or None."""


class PairedLayers(nn.Module):
    """A `LayerTerm` for two models, with what it trains."""

    def __init__(self, term: LayerTerm, pairs: Pairs, trained: nn.Module | None) -> None:
        super().__init__()
        self.term, self.pairs = term, pairs
        self.register_module(term.trained_as, trained)

    def forward(self, signals: Signals) -> Tensor:
        trained: Any = getattr(self, self.term.trained_as) or [None] * len(self.pairs)
        with torch.autocast(signals.labels.device.type, enabled=False):
            values = [self.term.compare(signals, s, t, trained[n]) for n, (s, t) in enumerate(self.pairs)]
            return torch.stack(values).mean()


@dataclass(frozen=True)
class Hidden(LayerTerm):
    """Match the teacher's hidden states at the attended positions, prompts included.

    A mean over the positions of the optimiser step; with cka a quantity of the batch, averaged over batches by their
    target tokens.

    Args:
        distance: mse, l1 or cosine (see `potstill.losses.hidden`), or cka: 1 - `linear_cka`.
        projection: trained map of the student's states to the teacher's width, one for each pair: linear, mlp or none.
            By default linear where widths differ. cka takes any widths and no projection.
        select_batches: instead of a projection, compare with as many of the teacher's dimensions as the student has:
            the most important ones, by the gradient of its loss on so many batches (Flex-KD).
        dimensions: those dimensions, if they are known: teacher layer -> ids; see `important_dimensions`.

    References:
        Jiao et al. 2019 (TinyBERT), arXiv 1909.10351, section 3.1; Sanh et al. 2019 (DistilBERT), arXiv 1910.01108.
    """

    distance: Literal["mse", "l1", "cosine", "cka"] = "mse"
    _: KW_ONLY
    projection: ProjectionKind | None = None
    select_batches: Annotated[int | None, Range(ge=1)] = None
    dimensions: Annotated[Mapping[Layer, Tensor] | None, PythonOnly()] = field(default=None, compare=False)
    name = "hidden"
    trained_as = "projections"

    def __post_init__(self) -> None:
        super().__post_init__()
        selects = self.select_batches is not None or self.dimensions is not None
        if self.projection not in (None, "none") and (self.distance == "cka" or selects):
            other = "cka, which takes any widths" if self.distance == "cka" else "selected dimensions"
            raise ShapeError(f"Hidden: expected no projection with {other}, got {self.projection!r}.")

    @property
    def over(self) -> Literal["target", "attended"]:  # type: ignore[override]
        return "target" if self.distance == "cka" else "attended"

    def task_mistake(self, task: Task) -> str | None:
        if task == "encoder" and self.select_batches is not None:
            return (
                f".select_batches: expected none for the task encoder, got {self.select_batches}. Dimensions are "
                "selected by the loss of a head. Use a projection."
            )
        return super().task_mistake(task)

    def select(self, dimensions: SelectDimensions) -> Self:
        if self.select_batches is None:
            return self
        return replace(self, dimensions=dimensions(self.layers, self.select_batches))

    def make_trained(self, student: ModelShape, teacher: ModelShape, pairs: Pairs) -> nn.Module | None:
        if self.distance == "cka":
            return None
        if self.dimensions is None:
            kind = self.projection or ("none" if student.width == teacher.width else "linear")
            return nn.ModuleList(Projection(kind, student.width, teacher.width) for _ in pairs)
        for _, layer in pairs:
            ids = self.dimensions.get(layer)
            if ids is None or ids.shape != (student.width,):
                got = f"layers {sorted(self.dimensions)}" if ids is None else list(ids.shape)
                raise ShapeError(
                    f"Hidden: expected {student.width} dimensions (the student's width) of teacher layer {layer}, "
                    f"got {got}."
                )
        return None

    def compare(self, signals: Signals, student: Layer, teacher: Layer, trained: Any) -> Tensor:
        s, t, attended = self.captured(signals, student, teacher)
        s, t = s[attended].float(), t[attended].float()
        if self.distance == "cka":
            return signals.batch_mean(1 - linear_cka(s, t))
        if self.dimensions is None:
            s = trained(s)
        else:
            t = t[:, self.dimensions[teacher].to(t.device)]
        return signals.attended_mean(DISTANCES[self.distance](s, t))


HeadPairs = Annotated[tuple[tuple[int, int], ...], NonEmpty(), InPairs()]
Heads = Literal["overlap", "entropy", "variance", "learned"] | HeadPairs


@dataclass(frozen=True)
class Attention(LayerTerm):
    """Match the teacher's attention maps; a mean over the attended positions as queries.

    Both models compute eager attention, because no other implementation returns the maps, whose memory grows with the
    square of the row's length.

    Args:
        divergence: between a query's attention weights as distributions; by default the squared distance of their
            directions, see `attention_mse`.
        normalize: false compares the attention weights themselves and not their directions.
        heads: overlap (`head_overlap`: equal counts pair up, others share), entropy or variance (the same, weighted by
            how focused the teacher's heads are, `head_importance`), learned (a trained mixture of the student's heads
            for each of the teacher's), or pairs [student head, teacher head], from 0, for all layers.

    References:
        Zagoruyko and Komodakis 2016, arXiv 1612.03928; Jiao et al. 2019 (TinyBERT), arXiv 1909.10351.
    """

    divergence: Divergence | None = None
    _: KW_ONLY
    heads: Annotated[Heads, Either(lambda value: isinstance(value, str))] = "overlap"
    normalize: bool = True
    name = "attention"
    activations = "attentions"
    trained_as = "mixtures"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence is not None and not self.normalize:
            raise ShapeError("Attention: expected normalize true with a divergence, got false. Leave one of them out.")

    def make_trained(self, student: ModelShape, teacher: ModelShape, pairs: Pairs) -> nn.Module | None:
        if self.divergence is not None and student.attention_dropout:
            raise ModelError(
                f"Attention: expected a student without attention dropout, got {student.attention_dropout}. A dropped "
                "weight makes the divergence infinite. Set the dropout to 0, or leave out the divergence."
            )
        if not isinstance(self.heads, str):
            sides = {"student": student, "teacher": teacher}.items()
            for (who, model), heads in zip(sides, zip(*self.heads, strict=True), strict=True):
                strange = [head for head in heads if not 0 <= head < model.heads]
                if strange:
                    raise ShapeError(
                        f"Attention: expected {who} heads in 0..{model.heads - 1}, as the {who} has {model.heads}, "
                        f"got {strange[0]}."
                    )
        if self.heads != "learned":
            return None
        # Near the overlap, and nowhere so far from it that a head could not be chosen any more.
        start = (attention.head_overlap(teacher.heads, student.heads) + 0.1).log()
        return nn.ParameterList(nn.Parameter(start.clone()) for _ in pairs)

    def map_bytes(self, student: ModelShape, teacher: ModelShape, tokens: int) -> int:
        of_student, of_teacher = (
            {*side} for side in zip(*self.layers.pairs(student.layers, teacher.layers), strict=True)
        )
        return 4 * tokens**2 * (len(of_student) * student.heads + len(of_teacher) * teacher.heads)

    def compare(self, signals: Signals, student: Layer, teacher: Layer, trained: Any) -> Tensor:
        s, t, attended = self.captured(signals, student, teacher)
        s, t, weights = s.float(), t.float(), None
        if self.heads == "learned":
            s, _ = attention.match_heads(s, trained.softmax(-1))
        elif not isinstance(self.heads, str):
            student_heads, teacher_heads = zip(*self.heads, strict=True)
            s, t = s[:, student_heads], t[:, teacher_heads]
        else:
            importance = None if self.heads == "overlap" else attention.head_importance(t, attended, self.heads)
            t, weights = attention.match_heads(t, attention.head_overlap(s.shape[1], t.shape[1]), importance)
        if self.divergence is None:
            values = attention.attention_mse(s, t, weights, normalize=self.normalize)
        else:
            values = attention.attention_divergence(s, t, weights, self.divergence)
        return signals.attended_mean(values[attended])


@dataclass(frozen=True)
class Relations(LayerTerm):
    """Match how tokens relate by their queries, keys and values (MiniLMv2); a mean over attended positions.

    Widths and head counts of the models may differ. See `relation_divergence`.

    Args:
        layers: which teacher layer each student layer learns from; the paper takes one: the student's last, from the
            teacher's last or one in its upper half.
        of: which relations; their mean is taken.
        heads: the number of relation heads; by default the teacher's number of heads.

    References:
        Wang et al. 2021 (MiniLMv2), arXiv 2012.15828, section 3.
    """

    layers: LayerMap = LastK(1)
    of: Annotated[tuple[Literal["queries", "keys", "values"], ...], NonEmpty()] = ("queries", "keys", "values")
    _: KW_ONLY
    heads: Annotated[int | None, Range(ge=1)] = None
    name = "relations"
    activations = "vectors"

    def fit(self, student: ModelShape, teacher: ModelShape) -> FittedTerm:
        self.check_heads(student, teacher)
        heads = teacher.heads if self.heads is None else self.heads
        narrowest = min(student.narrowest, teacher.narrowest)
        if heads > narrowest:
            raise ShapeError(f"Relations: expected heads in 1..{narrowest}, the narrowest keys' width, got {heads}.")
        return LayerTerm.fit(replace(self, heads=heads), student, teacher)

    def map_bytes(self, student: ModelShape, teacher: ModelShape, tokens: int) -> int:
        maps = len(self.of) * len(self.layers.pairs(student.layers, teacher.layers))  # kept until the backward pass
        return 4 * tokens**2 * maps * 2 * (self.heads or teacher.heads)

    def compare(self, signals: Signals, student: Layer, teacher: Layer, trained: Any) -> Tensor:
        s, t, attended = self.captured(signals, student, teacher)
        assert self.heads is not None
        pairs = [(getattr(s, kind).float(), getattr(t, kind)) for kind in self.of]
        values = [attention.relation_divergence(*pair, attended, self.heads) for pair in pairs]
        return signals.attended_mean(torch.stack(values).mean(0)[attended])


@dataclass(frozen=True)
class Similarity(LayerTerm):
    """Match how the examples of a batch relate, by their mean hidden states.

    A quantity of the batch of one rank, averaged over batches by their target tokens: it needs large batches, and
    accumulation does not make them larger.

    Args:
        kind: distance or angle (RKD), or distribution: `embedding_divergence`.
        temperature: of the distributions, > 0. No T^2 factor is applied.
        divergence: between the distributions; by default forward KL.

    References:
        Park et al. 2019 (RKD), arXiv 1904.05068; Fang et al. 2021 (SEED), arXiv 2101.04731.
    """

    layers: LayerMap = LastK(1)
    kind: Literal["distance", "angle", "distribution"] = "distance"
    _: KW_ONLY
    temperature: Temperature = 0.1
    divergence: Divergence | None = None
    name = "similarity"
    over = "target"

    def compare(self, signals: Signals, student: Layer, teacher: Layer, trained: Any) -> Tensor:
        *states, attended = self.captured(signals, student, teacher)
        rows = attended.any(1)  # examples with an attended position
        mask = attended[rows].unsqueeze(-1)
        s, t = ((hidden[rows].float() * mask).sum(1) / mask.sum(1) for hidden in states)
        if self.kind != "distribution":
            return signals.batch_mean((rkd_distance if self.kind == "distance" else rkd_angle)(s, t))
        if len(s) < 2:
            return signals.batch_mean(s[:0].sum())
        temperature = value_at(self.temperature, signals.step)
        return signals.batch_mean(embedding_divergence(s, t, temperature=temperature, divergence=self.divergence))
