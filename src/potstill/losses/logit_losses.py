"""Losses over full logits of one vocabulary: BiLD, adaptive KL and TAID's target."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.divergences import LOG_ZERO, ForwardKL, ReverseKL
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import compute_dtype, in_compute_dtype, log_softmax_, token_divergence

# Number of top tokens searched for the head first: at a vocabulary of 152k, a thirtieth of the time of a full sort.
TOP_TOKENS = 256


def bild(student_logits: Tensor, teacher_logits: Tensor, top_k: int = 8, temperature: float = 3.0) -> Tensor:
    """Compute the bi-directional logits difference loss (BiLD), per token.

        sum over leaders of KL(softmax(d_t / T) || softmax(d_s / T)),   d = (z_i - z_j) for i < j

    over the leader's k largest logits in falling order; the leader is once the teacher, once the student. Tokens among
    neither's k largest are ignored. From logits [..., V], computed in float32 (float64 for float64) without a gradient
    to the teacher, k = top_k >= 2 and T > 0 to [...] nats, unreduced, without a T^2 factor.
    Li et al. 2024 (BiLD), arXiv 2406.13555, section 3.
    """
    V = student_logits.shape[-1]
    if student_logits.shape != teacher_logits.shape:
        got = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise ShapeError(f"bild: expected logits of one shape, got {got}.")
    if not 2 <= top_k <= V:
        raise ShapeError(f"bild: expected top_k in 2..{V}, got {top_k}.")
    # A quarter of LOG_ZERO: differences of two tokens that are ruled out stay finite.
    s, t = (z.clamp_min(LOG_ZERO / 4) for z in in_compute_dtype(student_logits, teacher_logits))
    first, second = torch.triu_indices(top_k, top_k, 1, device=s.device)

    def led_by(leader: Tensor) -> Tensor:
        top = leader.detach().topk(top_k).indices
        d_s, d_t = (z[..., first] - z[..., second] for z in (s.gather(-1, top), t.gather(-1, top)))
        return token_divergence(d_s, DenseTargets(d_t), ForwardKL(), temperature=temperature)

    return led_by(t) + led_by(s)


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, head_mass: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Compute forward and reverse KL, weighted by where teacher and student differ (AKL), per token.

        (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail),   g = sum of abs(p - q) over the head or the tail

    The head is the fewest of the teacher's top tokens that have `head_mass`, in (0, 1), together. The weights carry no
    gradient; where p = q they are one half each. From logits [..., V], computed in float32 (float64 for float64)
    without a gradient to the teacher, and T > 0 to [...] nats, unreduced, without a T^2 factor. Raises `ShapeError` if
    reverse KL is infinite. Wu et al. 2024 (AKL), arXiv 2404.02657, section 4.
    """
    if not 0 < head_mass < 1:
        raise ShapeError(f"adaptive_kl: expected head_mass in (0, 1), got {head_mass}.")
    targets = DenseTargets(teacher_logits)
    forward = token_divergence(student_logits, targets, ForwardKL(), temperature=temperature)
    reverse = token_divergence(student_logits, targets, ReverseKL(), temperature=temperature)
    with torch.no_grad():
        dtype = compute_dtype(student_logits.dtype)
        q, p = (log_softmax_(z.to(dtype, copy=True).div_(temperature)).exp_() for z in (student_logits, teacher_logits))
        gap = (p - q).abs()
        head, total = _head_sum(gap, p, head_mass), gap.sum(-1)
        share = torch.where(total > 0, head / torch.where(total > 0, total, 1.0), 0.5)
    return share * forward + (1 - share) * reverse


def _head_sum(values: Tensor, probs: Tensor, mass: float) -> Tensor:
    """Sum the values over the fewest top tokens that have the mass together: [...]."""
    ranked, order = probs.topk(min(TOP_TOKENS, probs.shape[-1]), -1)
    if bool((ranked.sum(-1) < mass).any()):
        ranked, order = probs.sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    return (values.gather(-1, order) * (before < mass)).sum(-1)


def interpolated_logits(student_logits: Tensor, teacher_logits: Tensor, share: float) -> Tensor:
    """Compute TAID's target, (1 - share) z_s + share z_t for a share in [0, 1], without gradient.

    Gives [..., V] float32 (float64). Tokens at -inf of the teacher stay ruled out.
    Shing et al. 2025 (TAID), arXiv 2501.16937, section 3.
    """
    if not 0 <= share <= 1:
        raise ShapeError(f"interpolated_logits: expected a share in [0, 1], got {share}.")
    s, t = (z.clamp_min(LOG_ZERO / 4) for z in in_compute_dtype(student_logits.detach(), teacher_logits))
    return (1 - share) * s + share * t
