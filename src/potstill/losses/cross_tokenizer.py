"""Losses between models with different tokenizers: chunk likelihoods (ALM), sorted probabilities (ULD)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.divergences import LOG_ZERO, Divergence
from potstill.losses.token_losses import check_temperature, compute_dtype, in_compute_dtype, log_softmax_, with_gradient


def chunk_log_probs(log_probs: Tensor, chunk: Tensor, chunks: int) -> Tensor:
    """Sum token log-probabilities to those of chunks of text; exact, by the chain rule.

        log P(chunk c) = sum of log_probs_n over tokens n with chunk_n = c

    From log-probabilities [N], nats, and the chunk of each token [N], 0 to chunks - 1 or -1 for none, to [chunks].
    """
    in_chunk = chunk >= 0
    return log_probs.new_zeros(chunks).index_add(0, chunk[in_chunk], log_probs[in_chunk])


def chunk_divergence(log_q: Tensor, log_p: Tensor, divergence: Divergence, *, temperature: float = 100.0) -> Tensor:
    """Compute approximate likelihood matching (ALM): a divergence between two models' probabilities of a chunk.

        T * D((p, 1 - p), (q, 1 - q)),   p = P_teacher(chunk)^(1/T),   q = P_student(chunk)^(1/T)

    The factor T keeps the size when T changes: for a large T forward KL tends to l_p log(l_p / l_q) - l_p + l_q, with
    l = -log P. T = 1 is the divergence between the two events themselves. From log-probabilities [C] of the chunks in
    nats, the student's at least float32, without a gradient to the teacher's, and T > 0 to [C] nats, unreduced. Finite
    where the teacher gives probability 0 or 1, and where the student gives 1, which is computed as 1 minus the rounding
    of a number near 1 (Minixhofer et al. 2025, ALM, arXiv 2503.20083).
    """
    if log_q.shape != log_p.shape:
        got = f"{list(log_q.shape)} for the student and {list(log_p.shape)}"
        raise ShapeError(f"chunk_divergence: expected one shape, got {got}.")
    check_temperature("chunk_divergence", temperature)
    with torch.no_grad():
        q, p = (_events(x.to(compute_dtype(log_q.dtype)), temperature) for x in (log_q, log_p))
        value, slope = divergence.pointwise(q, p)
        odds = (q[..., 0] - q[..., 1]).exp()
        # With Q_1 = q and Q_2 = 1 - q: dD/dlog P = (slope_1 - slope_2 Q_1 / Q_2) / T; the factor T cancels 1 / T.
        gradient = slope[..., 0] - slope[..., 1] * odds
    return with_gradient(log_q, temperature * value.sum(-1), gradient, "chunk_divergence")


def _events(log_probs: Tensor, temperature: float) -> Tensor:
    """Compute the logarithms of x^(1/T) and 1 - x^(1/T): [..., 2]."""
    scaled = log_probs.clamp(LOG_ZERO, -torch.finfo(log_probs.dtype).eps) / temperature
    # Each form is used where the other would lose digits.
    near_one = torch.log(-torch.expm1(scaled.clamp_min(-1.0)))
    far = torch.log1p(-torch.exp(scaled))
    return torch.stack([scaled, torch.where(scaled > -math.log(2), near_one, far)], -1)


def sorted_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute universal logit distillation (ULD): the L1 distance between sorted probabilities, whatever the tokens.

        sum_i |q_(i) - p_(i)|,   the shorter of both padded with 0

    It is 0 for a student that gives the teacher's probabilities to other tokens. From logits [..., V] and [..., W],
    computed in float32 (float64 for float64) without a gradient to the teacher, and the temperature > 0 of both to
    [...] in [0, 2], unreduced (Boizard et al. 2024, ULD, arXiv 2402.12030, section 3).
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        got = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise ShapeError(f"sorted_distance: expected logits for the same positions, got {got}.")
    check_temperature("sorted_distance", temperature)
    scaled = (z.clamp_min(LOG_ZERO) / temperature for z in in_compute_dtype(student_logits, teacher_logits))
    q, p = (z.softmax(-1).sort(-1, descending=True).values for z in scaled)
    size = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(x, (0, size - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1)


@torch.no_grad()
def boundary_bias(logits: Tensor, tokens: Tensor, longer: Tensor, position: Tensor) -> Tensor:
    """Compute the share of a token's probability that lies on longer tokens with the same beginning.

        sum of P(t) over the longer t / (that + P(token))

    A model has learnt that a token is not followed by what would have made a longer token. Where that share is large,
    likelihoods of the same bytes do not compare between tokenizers. From logits [n, V] and tokens [n] to [n] in [0, 1];
    `longer` [L] are ids of tokens that begin with a token and go on, and `position` [L] the row of each.
    """
    log_probs = log_softmax_(logits.to(compute_dtype(logits.dtype), copy=True))
    exact = log_probs.gather(-1, tokens[:, None])[:, 0].exp()
    others = torch.zeros_like(exact).index_add_(0, position, log_probs[position, longer].exp())
    total = exact + others
    return torch.where(total > 0, others / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
