"""Two spaces of different size say the same when the similarities within them agree.

Each loss takes a batch of the student's vectors and the teacher's of the same B examples, [B, Hs] and [B, Ht], compares
the cosine similarities of all pairs, and gives one number. No gradient flows to the teacher.

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
from potstill.losses.token_losses import compute_dtype, token_divergence

PairLoss = Callable[[Tensor, Tensor], Tensor]

_RANKED = 2**15  # pairs of a batch whose order is compared: more are slower and say no more
_SAMPLE = 4096  # of these, the ones that quantiles are read from
_KNOTS = 64


def embedding_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.05,
    student_temperature: float | None = None,
    divergence: Divergence | None = None,
) -> Tensor:
    """The divergence between the distributions of similarities to the rest of the batch: near ones count.

        mean over i of D(p_i, q_i),   q_i = softmax over j != i of cos(s_i, s_j) / student_temperature
                                      p_i = softmax over j != i of cos(t_i, t_j) / temperature

    Args:
        student: [B, Hs], any float dtype; computed in float32 (float64 for float64).
        teacher: [B, Ht].
        temperature: > 0, of the teacher's softmax; cosines lie in [-1, 1], so that it is small.
        student_temperature: > 0, of the student's; default: the same. In few dimensions similarities spread wider than
            in many, and a larger one lets them.
        divergence: default: `ForwardKL`.

    Returns:
        A scalar, nats; no T^2 factor is applied.

    Raises:
        ShapeError: the shapes do not fit, there is one row, or a temperature is not positive.

    References:
        Tung and Mori 2019 (similarity-preserving), arXiv 1907.09682; Fang et al. 2021 (SEED), arXiv 2101.04731,
        section 3.2, for the distributions, here with two temperatures.
    """
    q, p = (_to_others(each) for each in _similarities("embedding_divergence", student, teacher))
    own = temperature if student_temperature is None else student_temperature
    if not own > 0:
        raise ShapeError(f"embedding_divergence: expected student_temperature > 0, got {own}.")
    each = token_divergence(
        q * (temperature / own), DenseTargets(p), divergence or ForwardKL(), temperature=temperature
    )
    return each.mean()


def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean square of what the similarities of all pairs differ by: `mean (cos(s_i, s_j) - cos(t_i, t_j))^2`.

    References:
        Reimers and Gurevych 2020, arXiv 2004.09813, in the form that needs no equal width.
    """
    s, t = _similarities("similarity_error", student, teacher)
    return (_to_others(s) - _to_others(t)).square().mean()


def pair_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Pearson's correlation of the similarities of all pairs, in [0, 2]: scale and offset are free."""
    s, t = _similarities("pair_correlation", student, teacher)
    return 1 - _pearson(_pairs(s), _pairs(t))


def rank_error(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Spearman's correlation of the similarities of all pairs, in [0, 2]: any rising curve is free.

        1 - pearson(F_s(cos(s_i, s_j)), F_t(cos(t_i, t_j)))

    F is the batch's own distribution function, straight lines between 64 quantiles. The quantiles are held fixed
    in the gradient, which is then the density of pairs times the pull on their rank. Of a large batch 32,768 pairs,
    evenly spread, are compared. Args and errors as `embedding_divergence`.
    """
    s, t = _similarities("rank_error", student, teacher)
    every = max(1, len(student) * (len(student) - 1) // 2 // _RANKED)
    return 1 - _pearson(*(_share_below(_pairs(each, every)) for each in (s, t)))


def matryoshka(loss: PairLoss, student: Tensor, teacher: Tensor, weights: Mapping[int, float]) -> Tensor:
    """One loss over prefixes of the student's vectors, so that each prefix is a good vector of its own.

        sum_d weights[d] * loss(student[:, :d], teacher) / sum_d weights[d]

    With {5: 0.7, 25: 0.3} the first five dimensions are a coarse level and all 25 the fine one.

    Args:
        loss: such as `embedding_divergence`, of (student, teacher).
        student: [B, Hs].
        teacher: [B, Ht].
        weights: prefix length, at most Hs -> weight > 0.

    Raises:
        ShapeError: there is no prefix, one is longer than the vectors, or a weight is not positive.

    References:
        Kusupati et al. 2022, arXiv 2205.13147.
    """
    if not weights or not all(0 < d <= student.shape[-1] and w > 0 for d, w in weights.items()):
        raise ShapeError(
            f"matryoshka: expected prefixes of 1 to {student.shape[-1]} dimensions with weights > 0, got "
            f"{dict(weights)}."
        )
    total = torch.stack([weight * loss(student[:, :d], teacher) for d, weight in weights.items()]).sum()
    return total / sum(weights.values())


def reconstruction_error(decoded: Tensor, teacher: Tensor) -> Tensor:
    """What a decoder back into the teacher's space misses, as a share of the batch's spread.

        sum |decoded - t|^2 / sum |t - mean t|^2

    Args:
        decoded: [B, Ht].
        teacher: [B, Ht], for B >= 2.
    """
    t = teacher.detach().to(decoded.dtype)
    spread = (t - t.mean(0)).square().sum()
    return (decoded - t).square().sum() / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def _similarities(caller: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, B] matrices of cosines."""
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ShapeError(
            f"{caller}: expected vectors [B, Hs] and [B, Ht] of the same B examples, got {list(student.shape)} and "
            f"{list(teacher.shape)}."
        )
    if len(student) < 2:
        raise ShapeError(f"{caller}: expected at least two rows, got {len(student)}. One row has no pair.")
    dtype = compute_dtype(student.dtype)
    s, t = unit(student.to(dtype)), unit(teacher.detach().to(dtype))
    return s @ s.T, t @ t.T


def _to_others(square: Tensor) -> Tensor:
    """[B, B] to [B, B - 1]: without the diagonal, each row in its order."""
    B = len(square)
    return square.flatten()[1:].view(B - 1, B + 1)[:, :-1].reshape(B, B - 1)


def _pairs(square: Tensor, every: int = 1) -> Tensor:
    """[B, B] to [B (B - 1) / 2], each pair once; or to every so-manieth of them."""
    first, second = torch.triu_indices(len(square), len(square), 1, device=square.device)[:, ::every]
    return square[first, second]


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    tiny = torch.finfo(x.dtype).eps
    return (x * y).mean() / (x.square().mean() * y.square().mean() + tiny**2).sqrt()


def _share_below(values: Tensor) -> Tensor:
    """The share of the batch's values below each: differentiable, with fixed quantiles."""
    fixed = values.detach()
    sample = fixed[:: max(1, len(fixed) // _SAMPLE)].sort().values
    knots = sample[torch.linspace(0, len(sample) - 1, min(_KNOTS, len(sample)), device=sample.device).long()]
    if len(knots) == 1:
        return values * 0
    upper = torch.searchsorted(knots, fixed.contiguous()).clamp(1, len(knots) - 1)
    low, high = knots[upper - 1], knots[upper]
    width = (high - low).clamp_min(torch.finfo(values.dtype).eps)
    return (upper - 1 + ((values - low) / width).clamp(0, 1)) / (len(knots) - 1)
