"""What an embedding student minimises: one dial between close pairs and the whole map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from potstill.embedding.heads import Start
from potstill.errors import ShapeError, nearest
from potstill.losses.embedding import embedding_divergence, matryoshka, rank_error

Focus = Literal["local", "balanced", "global"]
FOCUSES: tuple[Focus, ...] = get_args(Focus)

TEMPERATURE = 0.05
# How much the order of all pairs counts beside the divergence of near ones; chosen on STS-B's dev split.
MAP_WEIGHT: dict[Focus, float] = {"local": 0.0, "balanced": 3.0, "global": 30.0}
# Where a head begins: what is nearest to each aim before any training.
START: dict[Focus, Start] = {"local": "whitened", "balanced": "centred", "global": "uncentred"}


class EmbeddingObjective(Protocol):
    """What an `EmbeddingDistiller` minimises: `PairObjective`, or a class of one's own with the same two things."""

    @property
    def focus(self) -> Focus:
        """Which held-out figure decides what the best epoch is."""

    def __call__(self, student: Tensor, teacher: Tensor, heat: float = 1.0) -> Tensor:
        """The loss of a batch: a scalar with gradient to the student's vectors [B, d]."""


@dataclass(frozen=True)
class PairObjective:
    """The divergence of similarities, and the order of all pairs, at the weight that the focus stands for.

        T^2 embedding_divergence(0.05 T, student's own T) + weight * rank_error

    Args:
        focus: local keeps who is near whom, global the order of all distances, balanced something of both.
        prefixes: prefix length -> weight: each prefix is to be good; default: all dimensions at once.
    """

    focus: Focus = "balanced"
    prefixes: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        if self.focus not in FOCUSES:
            raise ShapeError(
                f"focus: expected one of {', '.join(FOCUSES)}, got {self.focus}.{nearest(self.focus, FOCUSES)}"
            )

    def __call__(self, student: Tensor, teacher: Tensor, heat: float = 1.0) -> Tensor:
        """The loss of a batch.

        Args:
            student: [B, d].
            teacher: [B, H].
            heat: what both temperatures are multiplied by.
        """
        if self.prefixes is None:
            return self._of(student, teacher, heat)
        return matryoshka(lambda s, t: self._of(s, t, heat), student, teacher, self.prefixes)

    def _of(self, student: Tensor, teacher: Tensor, heat: float) -> Tensor:
        temperature = TEMPERATURE * heat
        own = temperature * spread(student.shape[1])
        loss = heat**2 * embedding_divergence(student, teacher, temperature=temperature, student_temperature=own)
        weight = MAP_WEIGHT[self.focus]
        return loss + weight * rank_error(student, teacher) if weight else loss


def spread(dimensions: int) -> float:
    """How much wider similarities spread in few dimensions: 2 in 5, 1.3 in 64. It goes with 1 / sqrt(d)."""
    return 1 + math.sqrt(5 / dimensions)
