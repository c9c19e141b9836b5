"""Shapes of one size among which a search chooses: far apart at first, then between the best one and its neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from transformers import PretrainedConfig

from potstill.models.design import Keep, ShapeSearch
from potstill.models.shapes import DesignShape, design_shape, text_config
from potstill.models.size import count_parameters

SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn")


class Candidates:
    """The shapes of a teacher's family with about as many parameters as a first one, the same in all layers."""

    def __init__(self, teacher: PretrainedConfig, first: PretrainedConfig, keep: Keep) -> None:
        self._search = ShapeSearch(text_config(teacher), keep, first.vocab_size, vary_heads=True)
        shape = design_shape(first)
        others = [candidate.shape for candidate in self._search.near(count_parameters(first))]
        self.shapes = [shape, *(other for other in dict.fromkeys(others) if other != shape)]

    def config(self, shape: DesignShape) -> PretrainedConfig:
        return self._search.config(shape)


def next_shape(shapes: Sequence[DesignShape], losses: Mapping[DesignShape, float], number: int) -> DesignShape | None:
    """Choose the shape to measure next, of `number` in all; None where all are measured.

    Up to half of the number it is the one furthest from all that were measured, and the first shape begins; then the
    furthest among those that are nearer to the best than to any other. Distances are between the logarithms of sizes.
    """
    rest = [shape for shape in shapes if shape not in losses]
    if not rest or not losses:
        return rest[0] if rest else None
    if 2 * len(losses) >= number:
        best = min(losses, key=lambda shape: losses[shape])
        rest = [shape for shape in rest if min(losses, key=lambda other: _distance(shape, other)) == best] or rest
    return max(rest, key=lambda shape: min(_distance(shape, other) for other in losses))


def _distance(one: DesignShape, other: DesignShape) -> float:
    pairs = ((getattr(one, size), getattr(other, size)) for size in SIZES)
    return sum(abs(math.log(a / b)) for a, b in pairs if a and b)
