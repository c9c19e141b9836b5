"""Losses between embedding spaces of different width: vectors [B, Hs] and [B, Ht] of the same examples to a scalar.

They compare the cosine similarities of all pairs. No gradient flows to the teacher.

>>> student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.eye(3)
>>> bool(embedding_divergence(student, teacher, temperature=0.5) > 0)
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.divergences import Divergence, ForwardKL
from potstill.losses.hidden import unit
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import in_compute_dtype, token_divergence

PairLoss = Callable[[Tensor, Tensor], Tensor]

_MAX_RANKED = 2**15  # pairs of a batch whose order is compared: more are slower and no more accurate


def embedding_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.05,
    student_temperature: float | None = None,
    divergence: Divergence | None = None,
) -> Tensor:
    """Compute the divergence between the distributions of similarities to the rest of the batch.

        mean over i of D(p_i, q_i),   q_i = softmax over j != i of cos(s_i, s_j) / student_temperature
                                      p_i = softmax over j != i of cos(t_i, t_j) / temperature

    From vectors of any float dtype, computed in float32 (float64 for float64), to a scalar in nats, without a T^2
    factor; by default forward KL with one temperature for both. In few dimensions similarities vary more than in many,
    which a higher temperature of the student allows. Tung and Mori 2019 (similarity-preserving), arXiv 1907.09682; Fang
    et al. 2021 (SEED), arXiv 2101.04731, section 3.2, for the distributions, here with two temperatures.
    """
    if student_temperature is None:
        student_temperature = temperature
    if not student_temperature > 0:
        raise ShapeError(f"embedding_divergence: expected student_temperature > 0, got {student_temperature}.")
    q, p = map(_off_diagonal, _similarities("embedding_divergence", student, teacher))
    logits = q * (temperature / student_temperature)
    return token_divergence(logits, DenseTargets(p), divergence or ForwardKL(), temperature=temperature).mean()


def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of the similarities of all pairs: mean (cos(s_i, s_j) - cos(t_i, t_j))^2.

    Reimers and Gurevych 2020, arXiv 2004.09813, in a form that needs no equal width.
    """
    s, t = _similarities("similarity_error", student, teacher)
    return (_off_diagonal(s) - _off_diagonal(t)).square().mean()


def pair_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - Pearson's correlation of the similarities of all pairs, in [0, 2]: scale and offset are free."""
    s, t = _similarities("pair_correlation", student, teacher)
    return 1 - _pearson(_pairs(s), _pairs(t))


def rank_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - Spearman's correlation of the similarities of all pairs, in [0, 2]: any monotone map is free.

        1 - pearson(F_s(cos(s_i, s_j)), F_t(cos(t_i, t_j)))

    F is the batch's own distribution function, linear between 64 quantiles. The quantiles are constants in the
    gradient. At most 32,768 pairs of a batch, evenly spaced, are compared. Args and errors as `embedding_divergence`.
    """
    s, t = _similarities("rank_error", student, teacher)
    step = max(1, len(student) * (len(student) - 1) // 2 // _MAX_RANKED)
    return 1 - _pearson(_quantile(_pairs(s, step)), _quantile(_pairs(t, step)))


def matryoshka(loss: PairLoss, student: Tensor, teacher: Tensor, weights: Mapping[int, float]) -> Tensor:
    """Average a loss over prefixes of the student's vectors, so that each prefix is a good vector alone.

        sum_d weights[d] * loss(student[:, :d], teacher) / sum_d weights[d]

    `weights` is prefix length, at most Hs -> weight > 0: with {5: 0.7, 25: 0.3} the first five dimensions are a coarse
    level and all 25 the fine one. Kusupati et al. 2022, arXiv 2205.13147.
    """
    if not weights or not all(0 < d <= student.shape[-1] and w > 0 for d, w in weights.items()):
        expected = f"prefixes of 1 to {student.shape[-1]} dimensions with weights > 0"
        raise ShapeError(f"matryoshka: expected {expected}, got {dict(weights)}.")
    total = torch.stack([weight * loss(student[:, :d], teacher) for d, weight in weights.items()]).sum()
    return total / sum(weights.values())


def reconstruction_error(decoded: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared error of vectors decoded into the teacher's space, divided by the teacher's variance.

    sum |decoded - t|^2 / sum |t - mean t|^2, of decoded and teacher, [B, Ht] for B >= 2.
    """
    if decoded.shape != teacher.shape or decoded.ndim != 2:
        got = f"{list(decoded.shape)} and {list(teacher.shape)}"
        raise ShapeError(f"reconstruction_error: expected decoded and teacher of one shape [B, Ht], got {got}.")
    t = teacher.detach().to(decoded.dtype)
    variance = (t - t.mean(0)).square().sum()
    return (decoded - t).square().sum() / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def _similarities(caller: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both [B, B] matrices of cosines."""
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        got = f"{list(student.shape)} and {list(teacher.shape)}"
        raise ShapeError(f"{caller}: expected vectors [B, Hs] and [B, Ht] of the same B examples, got {got}.")
    if len(student) < 2:
        raise ShapeError(f"{caller}: expected at least two rows, got {len(student)}. One row has no pair.")
    s, t = map(unit, in_compute_dtype(student, teacher))
    return s @ s.T, t @ t.T


def _off_diagonal(matrix: Tensor) -> Tensor:
    """[B, B] to [B, B - 1]: without the diagonal."""
    B = len(matrix)
    return matrix.flatten()[1:].view(B - 1, B + 1)[:, :-1].reshape(B, B - 1)


def _pairs(matrix: Tensor, step: int = 1) -> Tensor:
    """[B, B] to [B (B - 1) / 2]: every `step`-th pair, once."""
    first, second = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)[:, ::step]
    return matrix[first, second]


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    eps = torch.finfo(x.dtype).eps
    return (x * y).mean() / (x.square().mean() * y.square().mean() + eps**2).sqrt()


def _quantile(values: Tensor) -> Tensor:
    """The share of the batch's values below each value, in [0, 1]: differentiable between fixed quantiles."""
    fixed = values.detach()
    sample = fixed[:: max(1, len(fixed) // 4096)].sort().values
    knots = sample[torch.linspace(0, len(sample) - 1, min(64, len(sample)), device=sample.device).long()]
    if len(knots) == 1:
        return values * 0
    upper = torch.searchsorted(knots, fixed.contiguous()).clamp(1, len(knots) - 1)
    low, high = knots[upper - 1], knots[upper]
    width = (high - low).clamp_min(torch.finfo(values.dtype).eps)
    return (upper - 1 + ((values - low) / width).clamp(0, 1)) / (len(knots) - 1)
