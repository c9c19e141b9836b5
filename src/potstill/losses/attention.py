"""Losses between attention maps, and between relations of queries, keys and values: by query token, over all heads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.divergences import Divergence, ForwardKL
from potstill.losses.hidden import unit
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import compute_dtype, in_compute_dtype, token_divergence

Importance = Literal["entropy", "variance"]


def attention_mse(
    student: Tensor, teacher: Tensor, head_weights: Tensor | None = None, *, normalize: bool = True
) -> Tensor:
    """Compute the squared distance between the attention of a token, over all heads.

        sum_i w_i | s_i / |s_i|_2 - t_i / |t_i|_2 |_2^2,   s_i and t_i the token's attention in head i

    Without `normalize`, s_i and t_i are not divided by their lengths. The distance is a sum over the T tokens attended
    to: it is T times the mean over them, which would depend on the padding.

    From probabilities [B, A, T, T] of both (see `match_heads`) and w [A] with sum 1 (default: equal) to [B, T] in
    [0, 2], unmasked, unreduced. Zagoruyko and Komodakis 2016, arXiv 1612.03928, equation 2, normalise a whole map; here
    each row is, so that every token has the same weight.
    """
    s, t = _checked("attention_mse", student, teacher)
    distance = unit(s) - unit(t) if normalize else s - t
    return _mean_over_heads(distance.square().sum(-1), head_weights)


def attention_divergence(
    student: Tensor, teacher: Tensor, head_weights: Tensor | None = None, divergence: Divergence | None = None
) -> Tensor:
    """Compute a divergence between attention distributions, per token; default: forward KL.

        sum_i w_i D(t_i, s_i),   i over heads

    The student's attention is clamped to the smallest normal number, below which no gradient flows. Arguments and
    result (in nats) are those of `attention_mse`. Wang et al. 2020 (MiniLM), arXiv 2002.10957, equation 3.
    """
    s, t = _checked("attention_divergence", student, teacher)
    least = torch.finfo(s.dtype).tiny
    values = token_divergence(s.clamp_min(least).log(), DenseTargets(t.log()), divergence or ForwardKL())
    return _mean_over_heads(values, head_weights)


def head_overlap(student_heads: int, teacher_heads: int) -> Tensor:
    """Compute the share of each teacher head that a student head learns from: [Hs, Ht], rows sum to 1.

    Both sets of heads are spaced evenly on a line, and a student head takes the teacher heads it overlaps. Equal counts
    pair up, multiples are averaged (or repeated), and counts that do not divide share heads.

    >>> head_overlap(2, 3)
    tensor([[0.6667, 0.3333, 0.0000],
            [0.0000, 0.3333, 0.6667]])
    """
    ends = torch.arange(1, student_heads + 1).unsqueeze(1) * teacher_heads
    others = torch.arange(1, teacher_heads + 1) * student_heads
    left = torch.maximum(ends - teacher_heads, others - student_heads)
    return (torch.minimum(ends, others) - left).clamp_min(0) / teacher_heads


def match_heads(teacher: Tensor, shares: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average a teacher's maps for the student's heads, and weight the heads.

        map_i = sum_j m_ij t_j,   m_ij = shares_ij c_j / sum_j shares_ij c_j,   w_i = sum_j shares_ij c_j / sum_ij

    From maps [B, Ht, T, T], shares [Hs, Ht] (see `head_overlap`) and importance c [Ht] >= 0 (default: equal) to maps
    [B, Hs, T, T] and head weights [Hs], with sum 1.
    """
    shares = shares.to(teacher)
    weighted = shares if importance is None else shares * importance.to(teacher)
    total = weighted.sum(1, keepdim=True)
    mixing = torch.where(total > 0, weighted / torch.where(total > 0, total, 1.0), shares)
    weights = torch.where(total.sum() > 0, total.squeeze(1), 1.0)
    return torch.einsum("ij,bjqk->biqk", mixing, teacher), weights / weights.sum()


def head_importance(maps: Tensor, mask: Tensor, kind: Importance) -> Tensor:
    """Measure how focused each head of maps [B, A, T, T] is: [A], with sum 1.

        entropy:   1 / (1 + mean over tokens of -sum_k a_k log a_k)
        variance:  mean over tokens of the variance of a_k over k

    The tokens are those of the mask [B, T]. Equal if it is empty or all variances are 0.
    """
    a = maps.detach().to(compute_dtype(maps.dtype))
    by_token = torch.special.entr(a).sum(-1) if kind == "entropy" else a.var(-1, correction=0)
    included = mask.to(a).unsqueeze(1)
    values = (by_token * included).sum((0, 2)) / included.sum().clamp_min(1)
    values = 1 / (1 + values) if kind == "entropy" else values
    total = values.sum()
    return torch.where(total > 0, values / torch.where(total > 0, total, 1.0), 1 / len(values))


def relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Compute forward KL between the relations of a row's tokens (MiniLMv2), per token.

        1/A sum_a KL(R(t_a) || R(s_a)),   R(x) = softmax over the row's tokens of x x' / sqrt(d)

    The queries (or keys, or values) are split into A relation heads x_a, whatever the model's own heads, so that widths
    and head counts may differ. Where the width does not divide, relation heads differ by one dimension.

    From [B, T, Ds] and [B, T, Dt], all heads side by side, and the mask [B, T] of the tokens to relate to, to [B, T]
    nats, unreduced; tokens outside the mask are to be ignored. Wang et al. 2021, arXiv 2012.15828, section 3.1.
    """
    if student.shape[:2] != teacher.shape[:2] or mask.shape != student.shape[:2]:
        got = f"{list(student.shape[:2])}, {list(teacher.shape[:2])} and {list(mask.shape)}"
        raise ShapeError(f"relation_divergence: expected student, teacher and mask of the same [B, T], got {got}.")
    s, t = (_relations(x, mask, heads) for x in in_compute_dtype(student, teacher))
    return token_divergence(s, DenseTargets(t), ForwardKL()).mean(1)


def _relations(vectors: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Compute the scores [B, A, T, T] of tokens for each other, -inf for tokens outside the mask."""
    width = vectors.shape[-1]
    if not 0 < heads <= width:
        expected = f"relation heads in 1..{width}, the narrower width"
        raise ShapeError(f"relation_divergence: expected {expected}, got {heads}.")
    scores = [x @ x.transpose(1, 2) / x.shape[-1] ** 0.5 for x in vectors.tensor_split(heads, dim=-1)]
    present = mask.bool() | ~mask.bool().any(1, keepdim=True)  # an empty row keeps all, to stay finite
    return torch.stack(scores, 1).masked_fill(~present[:, None, None, :], float("-inf"))


def _checked(caller: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.ndim != 4:
        got = f"{list(student.shape)} and {list(teacher.shape)}"
        hint = "Bring the teacher's to the student's heads with match_heads."
        raise ShapeError(f"{caller}: expected maps of one shape [B, A, T, T], got {got}. {hint}")
    return in_compute_dtype(student, teacher)


def _mean_over_heads(values: Tensor, head_weights: Tensor | None) -> Tensor:
    return values.mean(1) if head_weights is None else torch.einsum("bat,a->bt", values, head_weights.to(values))
