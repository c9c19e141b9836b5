"""Losses between hidden states of student and teacher: by token for equal widths, `linear_cka` for any two widths."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.token_losses import compute_dtype, in_compute_dtype


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference over the dimensions, per token: [..., H] each to [...], unreduced.

        1/H sum_h (s_h - t_h)^2

    Any float dtype; computed in float32 (float64 for float64). No gradient flows to the teacher. It is a `ShapeError`
    if the shapes differ: project the student's (`potstill.Projection`) or select some of the teacher's dimensions.
    Romero et al. 2014 (FitNets), arXiv 1412.6550, equation 3.
    """
    s, t = _checked("hidden_mse", student, teacher)
    return (s - t).square().mean(-1)


def hidden_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean absolute difference per token: 1/H sum_h abs(s_h - t_h). See `hidden_mse`."""
    s, t = _checked("hidden_l1", student, teacher)
    return (s - t).abs().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute one minus the cosine per token: 1 - s.t / (|s| |t|), and 1 where either is zero. See `hidden_mse`.

    Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, section 3.
    """
    s, t = _checked("hidden_cosine", student, teacher)
    return 1 - (unit(s) * unit(t)).sum(-1)


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute linear centred kernel alignment: 1 for features equal up to rotation and scale, 0 for unrelated ones.

        |T'S|_F^2 / (|S'S|_F |T'T|_F),   the columns of S and T centred

    [N, Hs] and [N, Ht], computed in float32 (float64 for float64) without a gradient to the teacher, give a scalar in
    [0, 1]; 0 with a gradient of 0 if either side is constant. In this form the largest matrix is Hs x Ht, whatever the
    number of tokens. With fewer tokens than dimensions it is biased towards 1. Raises `ShapeError` if they are not
    matrices of as many rows. Kornblith et al. 2019, arXiv 1905.00414, section 3 and appendix A.
    """
    check_same_rows("linear_cka", student, teacher)
    s, t = (_standardize(features) for features in in_compute_dtype(student, teacher))
    size = (s.T @ s).norm() * (t.T @ t).norm()
    return (t.T @ s).square().sum() / torch.where(size > 0, size, 1.0)


def unit(vectors: Tensor) -> Tensor:
    """Divide vectors [..., H] by their length; zero vectors stay zero, with a finite gradient."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1.0)


def dimension_importance(gradients: Tensor) -> Tensor:
    """Compute 1/N sum_n abs(dL/dh_n), [H], from gradients [N, H]; Saadi and Wang 2025 (Flex-KD), arXiv 2507.10155."""
    return gradients.to(compute_dtype(gradients.dtype)).abs().sum(0) / max(len(gradients), 1)


def select_dimensions(importance: Tensor, count: int) -> Tensor:
    """Select the `count` most important dimensions, in rising order: [count] int64."""
    if not 0 < count <= importance.numel():
        expected = f"a count in 1..{importance.numel()}, the teacher's width"
        raise ShapeError(f"select_dimensions: expected {expected}, got {count}. A wider student needs a projection.")
    return importance.topk(count).indices.sort().values


def check_same_rows(caller: str, student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        got = f"{list(student.shape)} and {list(teacher.shape)}"
        raise ShapeError(f"{caller}: expected matrices [N, Hs] and [N, Ht] of the same N examples, got {got}.")


def _checked(caller: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        got = f"{list(student.shape)} and {list(teacher.shape)}"
        hint = "Project the student's, select dimensions of the teacher's, or use linear_cka."
        raise ShapeError(f"{caller}: expected hidden states of one shape, got {got}. {hint}")
    return in_compute_dtype(student, teacher)


def _standardize(features: Tensor) -> Tensor:
    """Centre the columns and divide by the norm of the whole: the fourth powers that follow must stay in range."""
    centred = features - features.mean(0)
    # What remains of a constant column is rounding, not variation.
    least = 4 * torch.finfo(features.dtype).eps * features.detach().norm()
    length = centred.norm()
    return torch.where(length > least, centred / torch.where(length > least, length, 1.0), 0.0)
