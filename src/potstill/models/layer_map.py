"""Layer maps: which teacher layer a student layer learns from. Projections to the teacher's width.

A layer is a block of the model, counted from 0 as in the model's own list of blocks; -1 is the last. Its hidden state
is the output of the block, before the model's final norm. In transformers' `hidden_states` block k is at k + 1, except
for the last, and two hidden states that are of no block have names here: see `State`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from potstill.errors import ShapeError
from potstill.losses.declared import Declared, Either, InPairs, NonEmpty, Range

# What the first block reads, and what the model returns, behind its final norm: hidden_states[0] and hidden_states[-1].
State = Literal["embeddings", "last_hidden_state"]
STATES = get_args(State)
Layer = Annotated[int | State, Either(lambda value: not isinstance(value, str))]
Pairs = tuple[tuple[Layer, Layer], ...]
AnyLayer = TypeVar("AnyLayer", int, int | State)


class LayerMap(Declared):
    """Which teacher layer each student layer learns from.

    In a recipe: `uniform`, `{last_k: 2}`, `{skip: 2}`, or a list of [student layer, teacher layer]. A layer in such a
    list is a block from 0, -1 for the last, or a hidden state by its name: embeddings (what the first block reads) or
    last_hidden_state (what the model returns, behind its final norm).

    >>> LayerMap.uniform().pairs(4, 6)
    ((0, 1), (1, 2), (2, 4), (3, 5))
    >>> LayerMap.skip(2).pairs(3, 6)
    ((0, 1), (1, 3), (2, 5))
    >>> LayerMap.explicit([(-1, -2)]).pairs(4, 6)
    ((3, 4),)
    >>> LayerMap.explicit([("embeddings", "embeddings"), (-1, 5)]).pairs(4, 6)
    (('embeddings', 'embeddings'), (3, 5))
    """

    @abstractmethod
    def choose(self, student: int, teacher: int) -> Sequence[tuple[Layer, Layer]]:
        """Pair layers of two depths; negative ones count from the end."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        """Return the pairs (student layer, teacher layer) for two depths, counted from 0.

        Raises:
            ShapeError: a layer does not exist.
        """
        pairs = self.choose(student, teacher)
        return tuple((layer_index("student", s, student), layer_index("teacher", t, teacher)) for s, t in pairs)

    @classmethod
    def read(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"kind": "pairs", "layers": value}
        if isinstance(value, Mapping) and "kind" not in value:
            if len(value) > 1:
                raise ValueError(f"expected one of {', '.join(cls.kinds)}, got {', '.join(map(str, value))}")
            fields = {"last_k": "k", "skip": "every", "pairs": "layers"}
            return next(({"kind": kind, fields.get(kind, kind): number} for kind, number in value.items()), "uniform")
        return value

    @classmethod
    def shorthands(cls) -> list[dict[str, Any]]:
        layer = {"anyOf": [{"type": "integer"}, {"enum": [*STATES]}]}
        pairs = {"type": "array", "items": {"type": "array", "items": layer}}
        numbers = {"last_k": {"type": "integer"}, "skip": {"type": "integer"}, "pairs": pairs}
        return [{"enum": ["uniform"], "title": "LayerMap"}, {"type": "object", "properties": numbers}, pairs]

    @classmethod
    def _plain(cls, value: Any, handler: Any) -> Any:
        plain = super()._plain(value, handler)
        kind, *numbers = plain.values()
        return {kind: numbers[0]} if kind in ("last_k", "skip", "pairs") else plain if numbers else kind

    @classmethod
    def uniform(cls) -> LayerMap:
        return Uniform()

    @classmethod
    def last_k(cls, k: int = 1) -> LayerMap:
        return LastK(k)

    @classmethod
    def skip(cls, every: int = 2) -> LayerMap:
        return Skip(every)

    @classmethod
    def explicit(cls, pairs: Sequence[tuple[Layer, Layer]]) -> LayerMap:
        return Explicit(tuple(tuple(pair) if isinstance(pair, list) else pair for pair in pairs))


@dataclass(frozen=True)
class Uniform(LayerMap):
    """All student layers, evenly spaced over the teacher's: the last learns from the last (TinyBERT)."""

    name = "uniform"

    def choose(self, student: int, teacher: int) -> Sequence[tuple[int, int]]:
        return [(i, -(-(i + 1) * teacher // student) - 1) for i in range(student)]


@dataclass(frozen=True)
class LastK(LayerMap):
    """The last k layers from the last k."""

    k: Annotated[int, Range(ge=1)] = 1
    name = "last_k"

    def choose(self, student: int, teacher: int) -> Sequence[tuple[int, int]]:
        return [(i, i) for i in range(-self.k, 0)]


@dataclass(frozen=True)
class Skip(LayerMap):
    """Student layer i from teacher layer (i + 1) * every - 1: every n-th, as in DistilBERT and PKD."""

    every: Annotated[int, Range(ge=1)] = 2
    name = "skip"

    def choose(self, student: int, teacher: int) -> Sequence[tuple[int, int]]:
        return [(i, (i + 1) * self.every - 1) for i in range(student)]


@dataclass(frozen=True)
class Explicit(LayerMap):
    """Pairs (student layer, teacher layer); negative layers count from the end. See `LayerMap` for names."""

    layers: Annotated[Pairs, NonEmpty(), InPairs()]
    name = "pairs"

    def choose(self, student: int, teacher: int) -> Sequence[tuple[Layer, Layer]]:
        return self.layers


def layer_index(model: str, layer: AnyLayer, layers: int) -> AnyLayer:
    """Return a layer's index from 0, for one that may count from the end; a `State` is returned as it is."""
    if isinstance(layer, str):
        return layer
    if not isinstance(layer, Integral) or not -layers <= layer < layers:
        raise ShapeError(
            f"LayerMap: expected {model} layers in {-layers}..{layers - 1}, as the {model} has {layers} layers, "
            f"got {layer}."
        )
    return layer % layers


ProjectionKind = Literal["linear", "mlp", "none"]


class Projection(nn.Module):
    """Map from the student's width to the teacher's. Trained with the student, and no part of the exported model.

    The kind is linear (W x + b), mlp (linear, GELU, linear), or none for equal widths.

    Raises:
        ShapeError: the kind is none, and the widths differ.
    """

    def __init__(self, kind: ProjectionKind, student: int, teacher: int) -> None:
        super().__init__()
        if kind == "none" and student != teacher:
            raise ShapeError(
                f"Projection: expected equal widths without a projection, got {student} (student) and {teacher} "
                "(teacher). Use the projection linear or mlp, select dimensions, or compare with cka."
            )
        self.layers = nn.Sequential()
        if kind != "none":
            self.layers.append(nn.Linear(student, teacher))
        if kind == "mlp":
            self.layers.extend([nn.GELU(), nn.Linear(teacher, teacher)])

    def forward(self, hidden: Tensor) -> Tensor:
        """Project [..., student's width] to [..., teacher's width], in the precision of the weights."""
        projected: Tensor = self.layers(hidden.to(next(self.layers.parameters(), hidden).dtype))
        return projected
