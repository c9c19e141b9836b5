"""BiLD: the differences between the largest logits, as both models rank them."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.divergences import LOG_ZERO, ForwardKL
from potstill.losses.targets import DenseTargets
from potstill.losses.token import compute_dtype, token_divergence


def bild(student_logits: Tensor, teacher_logits: Tensor, top_k: int = 8, temperature: float = 3.0) -> Tensor:
    """Bi-directional logits difference, per token.

        sum over who leads of KL(softmax(d_t / T) || softmax(d_s / T)),   d = (z_i - z_j) for i < j

    over the leader's k largest logits, in falling order: once the teacher's, once the student's. What is in neither
    does not matter.

    Args:
        student_logits: [..., V], any float dtype; computed in float32 (float64 for float64).
        teacher_logits: [..., V]. No gradient flows to it.
        top_k: k, at least 2.
        temperature: T, > 0. No T^2 factor is applied.

    Returns:
        [...] nats, unreduced.

    Raises:
        ShapeError: the shapes differ, or k or T is out of range.

    References:
        Li et al. 2024 (BiLD), arXiv 2406.13555, section 3.
    """
    V = student_logits.shape[-1]
    if student_logits.shape != teacher_logits.shape:
        raise ShapeError(
            f"bild: expected logits of one shape, got {list(student_logits.shape)} and {list(teacher_logits.shape)}."
        )
    if not 2 <= top_k <= V:
        raise ShapeError(f"bild: expected top_k in 2..{V}, got {top_k}.")
    dtype = compute_dtype(student_logits.dtype)
    # So far down that differences of two that are ruled out are finite.
    s, t = (z.to(dtype).clamp_min(LOG_ZERO / 4) for z in (student_logits, teacher_logits.detach()))
    first, second = torch.triu_indices(top_k, top_k, 1, device=s.device)

    def led_by(leader: Tensor) -> Tensor:
        ids = leader.detach().topk(top_k).indices
        mine, theirs = (z.gather(-1, ids) for z in (s, t))
        differences = (z[..., first] - z[..., second] for z in (mine, theirs))
        return token_divergence(
            next(differences), DenseTargets(next(differences)), ForwardKL(), temperature=temperature
        )

    return led_by(t) + led_by(s)
