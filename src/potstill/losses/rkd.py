"""Relational knowledge distillation (RKD): distances and angles between examples of a batch.

Functions of [B, Hs] and [B, Ht] to a scalar, the mean over the batch's pairs or triples. The value depends on which
examples are in one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.losses.hidden import check_same_rows, unit
from potstill.losses.token_losses import in_compute_dtype


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Huber loss between distances of examples, each divided by their mean.

        mean over i != j of huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t)

    Args:
        student: [B, Hs], any float dtype; computed in float32 (float64 for float64).
        teacher: [B, Ht]. No gradient flows to it.

    Returns:
        A scalar; 0 for fewer than two examples.

    Raises:
        ShapeError: they are not matrices with the same number of rows.

    References:
        Park et al. 2019 (RKD), arXiv 1904.05068, section 3.2.1.
    """
    check_same_rows("rkd_distance", student, teacher)
    s, t = in_compute_dtype(student, teacher)
    if len(s) < 2:
        return s[:0].sum()
    return _huber(_distances(s) - _distances(t)).mean()


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Huber loss between the angles in triangles of examples. Memory grows with B^3.

        mean over i, j, k, all different, of huber(cos(s_i s_j s_k) - cos(t_i t_j t_k)),   the angle being at s_j

    Args, Returns, Raises: see `rkd_distance`; 0 for fewer than three examples.

    References:
        Park et al. 2019 (RKD), arXiv 1904.05068, section 3.2.2.
    """
    check_same_rows("rkd_angle", student, teacher)
    s, t = in_compute_dtype(student, teacher)
    B = len(s)
    if B < 3:
        return s[:0].sum()
    # Where two of the three are the same example both cosines are equal, and add 0.
    return _huber(_angles(s) - _angles(t)).sum() / (B * (B - 1) * (B - 2))


def _distances(vectors: Tensor) -> Tensor:
    """Compute the distances [B, B - 1] divided by their mean."""
    lengths: Tensor = torch.linalg.vector_norm(_differences(vectors), dim=-1)
    mean = lengths.mean()
    return lengths / torch.where(mean > 0, mean, 1.0)


def _differences(vectors: Tensor) -> Tensor:
    """Compute the differences [B, B - 1, H] to the others; inner products would lose the digits of near ones."""
    B = len(vectors)
    others = ~torch.eye(B, dtype=torch.bool, device=vectors.device)
    return (vectors.unsqueeze(1) - vectors.unsqueeze(0))[others].reshape(B, B - 1, -1)


def _angles(vectors: Tensor) -> Tensor:
    """Compute at each example the cosines [B, B - 1, B - 1] between the directions to the others."""
    directions = unit(_differences(vectors))
    return directions @ directions.transpose(1, 2)


def _huber(difference: Tensor) -> Tensor:
    """Compute x^2 / 2 up to abs(x) = 1, abs(x) - 1/2 beyond."""
    size = difference.abs()
    return torch.where(size <= 1, size.square() / 2, size - 0.5)
