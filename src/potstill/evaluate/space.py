"""How much of the teacher's space a student keeps, on vectors that it has not learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from potstill.errors import ShapeError
from potstill.evaluate.correlation import pearson, ranks

MOST_ROWS = 1000  # half a million pairs
_NEIGHBOURS = 10


@dataclass(frozen=True)
class Kept:
    """What a student keeps of the teacher's space.

    Args:
        all_pairs: Spearman's correlation of the similarities of all pairs: the whole map.
        recall: the share of the teacher's 10 nearest that are the student's too.
        scores: Spearman's correlation with people's scores of pairs, where there are any.
    """

    all_pairs: float
    recall: float
    scores: float | None = None

    @property
    def close(self) -> float:
        """How well close pairs are kept: by people's scores where there are any, else by recall."""
        return self.recall if self.scores is None else self.scores

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


class Judge:
    """Measures students against one set of the teacher's vectors.

    Args:
        teacher: [N, H], at least 3 rows.
        pairs: rows of two texts each and what people say of their similarity, where that is known.
        most: rows, evenly spread, that are compared with each other; the pairs with scores are all looked at.

    Raises:
        ShapeError: there are fewer than three rows.
    """

    def __init__(
        self,
        teacher: Tensor,
        pairs: tuple[Sequence[int], Sequence[int], Sequence[float]] | None = None,
        most: int = MOST_ROWS,
    ) -> None:
        if len(teacher) < 3:
            raise ShapeError(f"held-out vectors: expected at least 3 rows, got {len(teacher)}. Hold out more.")
        self.chosen = torch.arange(len(teacher))
        if len(teacher) > most:
            self.chosen = (torch.arange(most) * len(teacher)) // most
        self.pairs = pairs
        n = len(self.chosen)
        similar = cosines(teacher[self.chosen])
        self.upper = torch.triu_indices(n, n, 1)
        self.order = ranks(similar[self.upper[0], self.upper[1]])
        similar.fill_diagonal_(-2)
        self.nearest = similar.topk(min(_NEIGHBOURS, n - 2), dim=1).indices

    @torch.no_grad()
    def __call__(self, student: Tensor) -> Kept:
        """Measure a student's vectors [N, d] of the same rows."""
        similar = cosines(student[self.chosen])
        all_pairs = pearson(ranks(similar[self.upper[0], self.upper[1]]), self.order)
        similar.fill_diagonal_(-2)
        found = similar.topk(self.nearest.shape[1], dim=1).indices
        shared = (found.unsqueeze(2) == self.nearest.unsqueeze(1)).any(2).float().mean()
        scores = None
        if self.pairs is not None:
            first, second, said = self.pairs
            unit = normalize(student, dim=-1)
            cosine = (unit[torch.as_tensor(first)] * unit[torch.as_tensor(second)]).sum(-1)
            scores = pearson(ranks(cosine), ranks(torch.as_tensor(said, dtype=torch.float64)))
        return Kept(all_pairs, float(shared), scores)


def cosines(vectors: Tensor) -> Tensor:
    """[N, d] to [N, N]."""
    unit = normalize(vectors.float(), dim=-1)
    return unit @ unit.T
