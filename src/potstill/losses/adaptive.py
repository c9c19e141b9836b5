"""Forward KL that adapts: to where the models differ (AKL), and to how far the student is (TAID)."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.divergences import LOG_ZERO, ForwardKL, ReverseKL
from potstill.losses.targets import DenseTargets
from potstill.losses.token import compute_dtype, log_probabilities_, token_divergence

# Of so many tokens the head is looked for first: at a vocabulary of 152k, a thirtieth of the time that sorting takes.
LIKELIEST = 256


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, head_mass: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Forward and reverse KL, weighted by where teacher and student differ, per token.

        (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail),   g = sum of abs(p - q) over the head or the tail

    The head is the fewest of the teacher's likeliest tokens that have `head_mass` together. The weights carry no
    gradient; where p = q they are one half each.

    Args:
        student_logits: [..., V], any float dtype; computed in float32 (float64 for float64).
        teacher_logits: [..., V]. No gradient flows to it.
        head_mass: in (0, 1).
        temperature: softmax temperature of both, > 0. No T^2 factor is applied.

    Returns:
        [...] nats, unreduced.

    Raises:
        ShapeError: the head's mass is out of range, or reverse KL is infinite.

    References:
        Wu et al. 2024 (AKL), arXiv 2404.02657, section 4.
    """
    if not 0 < head_mass < 1:
        raise ShapeError(f"adaptive_kl: expected head_mass in (0, 1), got {head_mass}.")
    targets = DenseTargets(teacher_logits)
    forward = token_divergence(student_logits, targets, ForwardKL(), temperature=temperature)
    reverse = token_divergence(student_logits, targets, ReverseKL(), temperature=temperature)
    with torch.no_grad():
        dtype = compute_dtype(student_logits.dtype)
        q, p = (
            log_probabilities_(z.to(dtype, copy=True).div_(temperature)).exp_()
            for z in (student_logits.detach(), teacher_logits)
        )
        gap = (p - q).abs()
        head, total = _of_head(gap, p, head_mass), gap.sum(-1)
        share = torch.where(total > 0, head / torch.where(total > 0, total, 1.0), 0.5)
    return share * forward + (1 - share) * reverse


def _of_head(values: Tensor, probabilities: Tensor, mass: float) -> Tensor:
    """The sum of the values over the fewest likeliest tokens that have the mass together: [...]."""
    ranked, order = probabilities.topk(min(LIKELIEST, probabilities.shape[-1]), -1)
    if bool((ranked.sum(-1) < mass).any()):
        ranked, order = probabilities.sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    return (values.gather(-1, order) * (before < mass)).sum(-1)


def interpolated_logits(student_logits: Tensor, teacher_logits: Tensor, share: float) -> Tensor:
    """TAID's target, on the way from the student to the teacher: (1 - share) z_s + share z_t, without gradient.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V]; -inf stays out of reach.
        share: of the teacher, in [0, 1].

    Returns:
        [..., V] float32 (float64).

    Raises:
        ShapeError: the share is out of range.

    References:
        Shing et al. 2025 (TAID), arXiv 2501.16937, section 3.
    """
    if not 0 <= share <= 1:
        raise ShapeError(f"interpolated_logits: expected a share in [0, 1], got {share}.")
    dtype = compute_dtype(student_logits.dtype)
    s, t = (z.detach().to(dtype).clamp_min(LOG_ZERO / 4) for z in (student_logits, teacher_logits))
    return (1 - share) * s + share * t
