"""Relational knowledge distillation (RKD): distances and angles between the examples of one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from potstill.losses.hidden import check_same_rows, unit
from potstill.losses.token_losses import in_compute_dtype


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Huber loss between distances of examples, each divided by their mean.

        mean over i != j of huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t)

    [B, Hs] and [B, Ht], computed in float32 (float64 for float64) without a gradient to the teacher, give a scalar; 0
    for fewer than two examples. Raises `ShapeError` if they are not matrices of as many rows.
    Park et al. 2019 (RKD), arXiv 1904.05068, section 3.2.1.
    """
    check_same_rows("rkd_distance", student, teacher)
    s, t = in_compute_dtype(student, teacher)
    if len(s) < 2:
        return s[:0].sum()
    return huber_loss(_distances(s), _distances(t), reduction="none").mean()


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Huber loss between the angles in triangles of examples. Memory grows with B^3.

        mean over i, j, k, all different, of huber(cos(s_i s_j s_k) - cos(t_i t_j t_k)),   the angle being at s_j

    Shapes, dtypes and errors are those of `rkd_distance`; 0 for fewer than three examples.
    Park et al. 2019 (RKD), arXiv 1904.05068, section 3.2.2.
    """
    check_same_rows("rkd_angle", student, teacher)
    s, t = in_compute_dtype(student, teacher)
    B = len(s)
    if B < 3:
        return s[:0].sum()
    # Where two of the three are the same example both cosines are equal, and add 0.
    return huber_loss(_angles(s), _angles(t), reduction="none").sum() / (B * (B - 1) * (B - 2))


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
