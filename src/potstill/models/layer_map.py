"""Which teacher layer a student layer learns from, and what brings the student's states to the teacher's width.

A layer is a block of the model, counted from 0 as in the model's own list of them; -1 is the last. Its hidden state is
what the block gives, before the model's last norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from potstill.errors import ShapeError

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerMap:
    """Which teacher layer each student layer learns from.

    Args:
        choose: (student layers, teacher layers) -> pairs (student layer, teacher layer), negative ones from the end.

    >>> LayerMap.uniform().pairs(4, 6)
    ((0, 1), (1, 2), (2, 4), (3, 5))
    >>> LayerMap.skip(2).pairs(3, 6)
    ((0, 1), (1, 3), (2, 5))
    >>> LayerMap.explicit([(-1, -2)]).pairs(4, 6)
    ((3, 4),)
    """

    choose: Callable[[int, int], Sequence[tuple[int, int]]]

    def pairs(self, student: int, teacher: int) -> Pairs:
        """The pairs for two depths, each at least 1, with indices from 0.

        Raises:
            ShapeError: a layer is not there.
        """
        return tuple(
            (layer_index("student", s, student), layer_index("teacher", t, teacher))
            for s, t in self.choose(student, teacher)
        )

    @classmethod
    def uniform(cls) -> LayerMap:
        """All student layers, spread evenly over the teacher's: the last learns from the last (TinyBERT)."""
        return cls(lambda student, teacher: [(i, -(-(i + 1) * teacher // student) - 1) for i in range(student)])

    @classmethod
    def last_k(cls, k: int = 1) -> LayerMap:
        """The last k layers from the last k."""
        _positive("last_k", k)
        return cls(lambda student, teacher: [(i, i) for i in range(-k, 0)])

    @classmethod
    def skip(cls, every: int = 2) -> LayerMap:
        """Student layer i from teacher layer (i + 1) * every - 1: every n-th, as DistilBERT and PKD."""
        _positive("skip", every)
        return cls(lambda student, teacher: [(i, (i + 1) * every - 1) for i in range(student)])

    @classmethod
    def explicit(cls, pairs: Sequence[tuple[int, int]]) -> LayerMap:
        """The pairs that are named; negative layers count from the end."""
        fixed = tuple((int(s), int(t)) for s, t in pairs)
        if not fixed:
            raise ShapeError("LayerMap.explicit: expected at least one pair (student layer, teacher layer), got none.")
        return cls(lambda student, teacher: fixed)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ShapeError(f"LayerMap.{name}: expected a number of at least 1, got {value}.")


def layer_index(who: str, layer: int, layers: int) -> int:
    """A layer from 0, of one that may count from the end.

    Raises:
        ShapeError: it is not there.
    """
    if not -layers <= layer < layers:
        raise ShapeError(
            f"LayerMap: expected {who} layers in {-layers}..{layers - 1}, as the {who} has {layers} layers, "
            f"got {layer}."
        )
    return layer % layers


ProjectionKind = Literal["linear", "mlp", "none"]


class Projection(nn.Module):
    """From the student's width to the teacher's: trained with the student, and left behind with the objective.

    Args:
        kind: linear (W x + b), mlp (linear, GELU, linear), or none, for equal widths.
        student: the student's width.
        teacher: the teacher's.

    Raises:
        ShapeError: there is none, and the widths differ.
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
        """[..., student's width] to [..., teacher's], in the precision of the weights."""
        first = next(self.layers.parameters(), hidden)
        projected: Tensor = self.layers(hidden.to(first.dtype))
        return projected
