"""Correlations, and comparison of a student's embedding space with the teacher's, on held-out vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from potstill.errors import ShapeError

MOST_ROWS = 1000  # half a million pairs
_NEIGHBOURS = 10
_DOMAIN_ROWS = 100  # of each set, the fewest for a classifier that separates them
Pairs = tuple[Sequence[int], Sequence[int], Sequence[float]]


@dataclass(frozen=True)
class SpaceScores:
    """Similarity structure that a student keeps."""

    all_pairs: float  # Spearman's correlation of all pairwise similarities with the teacher's
    recall: float  # share of the teacher's 10 nearest neighbours that are the student's too
    scores: float | None = None  # Spearman's correlation with human similarity scores; None if there are none

    @property
    def close(self) -> float:
        """Quality on close pairs: by human scores if there are any, else by recall."""
        return self.recall if self.scores is None else self.scores


class SpaceEvaluator:
    """Evaluate students against one set of the teacher's vectors [N, H], of which `most` are compared pairwise.

    `pairs` are row indices of two texts each and human scores of their similarity; all are used.
    """

    def __init__(self, teacher: Tensor, pairs: Pairs | None = None, most: int = MOST_ROWS) -> None:
        rows = len(teacher)
        if rows < 3:
            raise ShapeError(f"held-out vectors: expected at least 3 rows, got {rows}. Hold out more.")
        self.chosen = torch.arange(rows) if rows <= most else (torch.arange(most) * rows) // most
        self.pairs = pairs
        self.upper = torch.triu_indices(len(self.chosen), len(self.chosen), 1)
        self.order, self.nearest = self._structure(teacher)

    def _structure(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Ranks of all pairwise similarities, and the nearest neighbours of each row."""
        similar = cosines(vectors[self.chosen])
        order = ranks(similar[self.upper[0], self.upper[1]])
        similar.fill_diagonal_(-2)
        return order, similar.topk(min(_NEIGHBOURS, len(self.chosen) - 2), dim=1).indices

    @torch.no_grad()
    def __call__(self, student: Tensor) -> SpaceScores:
        """Evaluate a student's vectors [N, d] of the same rows."""
        order, nearest = self._structure(student)
        shared = (nearest.unsqueeze(2) == self.nearest.unsqueeze(1)).any(2).float().mean()
        scores = None
        if self.pairs is not None:
            first, second, human = self.pairs
            unit = normalize(student, dim=-1)
            cosine = (unit[torch.as_tensor(first)] * unit[torch.as_tensor(second)]).sum(-1)
            scores = pearson(ranks(cosine), ranks(torch.as_tensor(human, dtype=torch.float64)))
        return SpaceScores(pearson(order, self.order), float(shared), scores)


def cosines(vectors: Tensor) -> Tensor:
    """Compute pairwise cosines: [N, d] to [N, N]."""
    unit = normalize(vectors.float(), dim=-1)
    return unit @ unit.T


def ranks(values: Tensor) -> Tensor:
    """Compute the ranks of [N] values from 0, float64; ties share their mean rank."""
    _, index, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() + 1) / 2)[index]


def pearson(x: Tensor, y: Tensor) -> float:
    """Compute Pearson's correlation (of ranks: Spearman's); 0 if x or y is constant."""
    x, y = x - x.mean(), y - y.mean()
    norms = x.norm() * y.norm()
    return float(x @ y / norms) if norms > 0 else 0.0


def domain_auc(first: Tensor, second: Tensor) -> float | None:
    """Compute how well a linear classifier tells two sets of vectors, [N, H] and [M, H], apart: 0.5 is not at all.

    The area under the ROC curve of ridge regression, fitted on every second of at most 1,000 rows of each set and
    measured on the others; None for sets of less than 100 rows.
    """
    rows = min(len(first), len(second), MOST_ROWS) // 2 * 2
    if rows < _DOMAIN_ROWS:
        return None
    sets = [normalize(x[torch.arange(rows) * len(x) // rows].double(), dim=-1) for x in (first, second)]
    fitted = torch.cat([x[::2] for x in sets])
    mean = fitted.mean(0)
    x, sign = fitted - mean, torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(rows // 2)
    gram = x.T @ x
    direction = torch.linalg.solve(gram + gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype), x.T @ sign)
    above, below = ((x[1::2] - mean) @ direction for x in sets)
    return float((above[:, None] > below).double().mean())
