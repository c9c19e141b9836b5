"""Relations between examples: what a student's vectors say of each other, against a teacher's.

Pure functions of [B, H] and [B, H'] to a scalar, the mean over the batch's pairs, triples or examples. They are
quantities of the batch: the same examples in other batches have other values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.hidden import unit
from potstill.losses.token import compute_dtype


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The Huber loss between the distances of examples, each over their mean.

        mean over i != j of huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t)

    Args:
        student: [B, H], any float dtype; computed in float32 (float64 for float64).
        teacher: [B, H'], for the same B. No gradient flows to it.

    Returns:
        A scalar; 0 for fewer than two examples.

    Raises:
        ShapeError: they are not matrices with equally many rows.

    References:
        Park et al. 2019 (RKD), arXiv 1904.05068, section 3.2.1.
    """
    s, t = _pair("rkd_distance", student, teacher)
    if len(s) < 2:
        return s[:0].sum()
    return _huber(_distances(s) - _distances(t)).mean()


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """The Huber loss between the angles in triangles of examples.

        mean over i, j, k, all different, of huber(cos(s_i s_j s_k) - cos(t_i t_j t_k)),   the angle being at s_j

    Args:
        student: [B, H]; see `rkd_distance`. Memory grows with B^3.
        teacher: [B, H'].

    Returns:
        A scalar; 0 for fewer than three examples.

    Raises:
        ShapeError: they are not matrices with equally many rows.

    References:
        Park et al. 2019 (RKD), arXiv 1904.05068, section 3.2.2.
    """
    s, t = _pair("rkd_angle", student, teacher)
    B = len(s)
    if B < 3:
        return s[:0].sum()
    # Where two of the three are the same example, both cosines are the same: they add 0.
    return _huber(_angles(s) - _angles(t)).sum() / (B * (B - 1) * (B - 2))


def _pair(caller: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ShapeError(
            f"{caller}: expected vectors [B, H] and [B, H'] of the same B examples, got {list(student.shape)} and "
            f"{list(teacher.shape)}."
        )
    dtype = compute_dtype(student.dtype)
    return student.to(dtype), teacher.detach().to(dtype)


def _distances(vectors: Tensor) -> Tensor:
    """[B, B - 1] distances over their mean."""
    lengths: Tensor = torch.linalg.vector_norm(_off_diagonal_differences(vectors), dim=-1)
    mean = lengths.mean()
    return lengths / torch.where(mean > 0, mean, 1.0)


def _off_diagonal_differences(vectors: Tensor) -> Tensor:
    """[B, B - 1, H] differences to the others: not through inner products, which lose the digits of near ones."""
    B = len(vectors)
    others = ~torch.eye(B, dtype=torch.bool, device=vectors.device)
    return (vectors.unsqueeze(1) - vectors.unsqueeze(0))[others].reshape(B, B - 1, -1)


def _angles(vectors: Tensor) -> Tensor:
    """[B, B - 1, B - 1] cosines at each example between the directions to the others."""
    directions = unit(_off_diagonal_differences(vectors))
    return directions @ directions.transpose(1, 2)


def _huber(difference: Tensor) -> Tensor:
    """x^2 / 2 up to 1, |x| - 1/2 from there."""
    size = difference.abs()
    return torch.where(size <= 1, size.square() / 2, size - 0.5)
