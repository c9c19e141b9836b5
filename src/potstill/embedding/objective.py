"""Objective of embedding students: a trade-off between close pairs and the order of all pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from potstill.embedding.heads import PCAKind
from potstill.errors import ShapeError, nearest
from potstill.losses.embedding import embedding_divergence, matryoshka, rank_error

Focus = Literal["local", "balanced", "global"]
FOCUSES: tuple[Focus, ...] = get_args(Focus)

TEMPERATURE = 0.05
# Weight of the rank error; chosen on STS-B's dev split.
RANK_WEIGHT: dict[Focus, float] = {"local": 0.0, "balanced": 3.0, "global": 30.0}
# The PCA that is best for each focus before any training.
START: dict[Focus, PCAKind] = {"local": "whitened", "balanced": "centred", "global": "uncentred"}


class EmbeddingObjective(Protocol):
    """What an `EmbeddingDistiller` minimizes: `PairObjective`, or a class of your own with these two members."""

    @property
    def focus(self) -> Focus:
        """What selects the best epoch on the held-out vectors."""

    def __call__(self, student: Tensor, teacher: Tensor, heat: float = 1.0) -> Tensor:
        """Compute the loss of a batch: a scalar with a gradient to the student's vectors [B, d]."""


@dataclass(frozen=True)
class PairObjective:
    """Divergence of similarities plus the rank error of all pairs, weighted by the focus.

        T^2 embedding_divergence(0.05 T, student's own T) + weight * rank_error

    Args:
        focus: `local` keeps the nearest neighbours, `global` the order of all distances, `balanced` is between.
        prefixes: prefix length -> weight: also train the first dimensions alone; default: all dimensions at once.
    """

    focus: Focus = "balanced"
    prefixes: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        if self.focus not in FOCUSES:
            hint = nearest(self.focus, FOCUSES)
            raise ShapeError(f"focus: expected one of {', '.join(FOCUSES)}, got {self.focus}.{hint}")

    def __call__(self, student: Tensor, teacher: Tensor, heat: float = 1.0) -> Tensor:
        """Compute the loss of a batch [B, d] and [B, H]; `heat` is a factor of both temperatures."""
        temperature, weight = TEMPERATURE * heat, RANK_WEIGHT[self.focus]

        def loss(s: Tensor, t: Tensor) -> Tensor:
            # Cosines vary more in few dimensions, as 1 / sqrt(d): the ratio is 2 for 5 dimensions and 1.3 for 64.
            ratio = 1 + math.sqrt(5 / s.shape[1])
            divergence = embedding_divergence(s, t, temperature=temperature, student_temperature=temperature * ratio)
            divergence = heat**2 * divergence
            return divergence + weight * rank_error(s, t) if weight else divergence

        return loss(student, teacher) if self.prefixes is None else matryoshka(loss, student, teacher, self.prefixes)
